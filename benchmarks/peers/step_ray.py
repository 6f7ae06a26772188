"""The rows of the step benchmark that have the loop around the step, its log and its questions; and Ray Train."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from benchmarks.peers.step_models import Spec, batch_of, our_config
from benchmarks.peers.step_runner import peak_bytes, repeated
from cluster.relay import start_relay
from pipeline.store import Store
from trainer.loop import Hooks, train
from trainer.metrics import StepRecord
from trainer.wishes import Wish

LOG_EVERY_STEPS = 2
"""Five times as often as a run reads its numbers back, writes them, and asks whether to stop."""


def train_alone(spec: Spec, num_steps: int) -> dict[str, Any]:
    """The loop in this process, one rank: what `train_under_ray` measures, without Ray."""
    with tempfile.TemporaryDirectory(prefix="tarmac-bench-step-") as folder:
        return _train(spec, num_steps, folder, ask=lambda: Wish.GO_ON, push=lambda record: None)


def train_under_ray(spec: Spec, num_steps: int) -> dict[str, Any]:
    """Seconds of each step after the first, from end to end, and CPU seconds of the worker's process."""
    num_cpus = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="tarmac-bench-step-") as folder:
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=False)
        try:
            relay = start_relay("step-benchmark")
            ray.get(relay.begin.remote(1, 1))
            trainer = TorchTrainer(
                _worker,
                train_loop_config={"spec": asdict(spec), "num_steps": num_steps, "folder": folder, "relay": relay},
                torch_config=TorchConfig(backend="gloo"),
                scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": num_cpus}),
                run_config=RunConfig(storage_path=folder),
            )
            found: dict[str, Any] = trainer.fit().return_value
        finally:
            ray.shutdown()
    return found


def _worker(payload: dict[str, Any]) -> dict[str, Any]:
    relay = payload["relay"]
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return _train(
        Spec(**payload["spec"]),
        payload["num_steps"],
        payload["folder"],
        ask=lambda: ray.get(relay.take_wish.remote(1)),
        push=partial(relay.push.remote, 1),
    )


def _train(
    spec: Spec, num_steps: int, folder: str, *, ask: Callable[[], Wish], push: Callable[[StepRecord], object]
) -> dict[str, Any]:
    config = our_config(spec)
    config = replace(
        config,
        optim=replace(config.optim, num_steps=num_steps + 1),
        log=replace(config.log, every_steps=LOG_EVERY_STEPS),
        checkpoint=replace(config.checkpoint, every_steps=num_steps + 1),  # the last step's, which is not timed
    )
    records: list[StepRecord] = []
    cpu_s: list[float] = []

    def take(record: StepRecord) -> None:
        push(record)
        records.append(record)
        cpu_s.append(time.process_time())

    train(
        config,
        repeated(batch_of(spec.batch_size), num_steps + 1),
        run=Store(Path(folder, "run").as_uri()),
        num_samples=10**6,
        attempt=1,
        device=torch.device("cpu"),
        resume_from=None,
        hooks=Hooks(ask=ask, on_metrics=take),
    )
    ends = [record["time"] for record in records]
    seconds = [end - begin for begin, end in pairwise(ends)]
    # Records come LOG_EVERY_STEPS at a time, so that only their ends are known.
    warm = LOG_EVERY_STEPS - 1
    cpu_seconds = [(cpu_s[-1] - cpu_s[warm]) / (len(cpu_s) - 1 - warm)]
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak_bytes(), "loss": records[0]["loss"]}
