"""The rows of the step benchmark that have the loop around the step, its log and its questions; and Ray Train."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from benchmarks.peers.step_counts import peak_bytes
from benchmarks.peers.step_models import Spec, batch_of, our_config
from benchmarks.peers.step_turns import Plan, Turns
from cluster.host_memory import keep_freed
from cluster.relay import start_relay
from pipeline.loader import Batch
from pipeline.store import Store
from trainer.loop import Hooks, train
from trainer.metrics import StepRecord
from trainer.wishes import Wish

LOG_EVERY_STEPS = 2
"""Five times as often as a run reads its numbers back, writes them, and asks whether to stop."""


def run_alone(spec: Spec, turns: Turns) -> None:
    """The loop in this process, one rank: what `run_under_ray` measures, without Ray."""
    _train(spec, turns, ask=lambda: Wish.GO_ON, push=lambda record: None)


def run_under_ray(spec: Spec, plan: Plan, address: str) -> None:
    """The loop in a Ray Train worker, which takes the turns; this process has the driver's relay."""
    ray.init(address="local", num_cpus=spec.num_threads, include_dashboard=False, log_to_driver=False)
    try:
        relay = start_relay("step-benchmark")
        ray.get(relay.begin.remote(1))
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"spec": asdict(spec), "plan": asdict(plan), "address": address, "relay": relay},
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": spec.num_threads}),
            run_config=RunConfig(storage_path=str(Path(address).parent), worker_runtime_env={"env_vars": keep_freed()}),
        )
        trainer.fit()
    finally:
        ray.shutdown()


def _worker(payload: dict[str, Any]) -> None:
    relay, spec = payload["relay"], Spec(**payload["spec"])
    torch.set_num_threads(spec.num_threads)
    _train(
        spec,
        Turns(payload["address"], Plan(**payload["plan"])),
        ask=lambda: ray.get(relay.take_wish.remote(1)),
        push=partial(relay.push.remote, 1),
    )


def _train(spec: Spec, turns: Turns, *, ask: Callable[[], Wish], push: Callable[[StepRecord], object]) -> None:
    one, plan = batch_of(spec.batch_size), turns.plan
    num_steps = LOG_EVERY_STEPS + plan.num_turns * plan.num_steps + 1
    config = our_config(spec)
    config = replace(
        config,
        optim=replace(config.optim, num_steps=num_steps),
        log=replace(config.log, every_steps=LOG_EVERY_STEPS),
        checkpoint=replace(config.checkpoint, every_steps=num_steps),  # the last step's, which is in no turn
    )
    losses: list[float] = []
    peak = 0

    def batches() -> Iterator[Batch]:
        # A step is over, with all that comes between two, when the next one's batch is asked for.
        nonlocal peak
        given = (replace(one, step=step) for step in range(num_steps))
        yield from islice(given, LOG_EVERY_STEPS)
        for _ in range(plan.num_turns):
            with turns.turn():
                yield from islice(given, plan.num_steps)
        peak = peak_bytes()
        yield from given

    def take(record: StepRecord) -> None:
        push(record)
        losses.append(record["loss"])

    train(
        config,
        batches(),
        run=Store((turns.folder / "run").as_uri()),
        num_samples=10**6,
        attempt=1,
        device=torch.device("cpu"),
        resume_from=None,
        hooks=Hooks(ask=ask, on_metrics=take),
    )
    turns.tell({"peak_bytes": peak, "loss": losses[0]})
