"""Ray Train under an attempt: what it took is free again however the attempt ends."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import OutOfMemoryError
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from cluster.config import JobConfig
from cluster.fit import Fit
from cluster.node_agent import NodeAgents
from cluster.nodes import Nodes
from cluster.relay import start_relay
from cluster.watch import Watch
from pipeline.config import DataConfig
from trainer.config import TrainConfig

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]


def last_call_fails() -> TorchConfig:
    """As when Ray's memory monitor has killed a worker: the calls that end the process group raise this."""

    # In here, Ray sends them as they are: its processes cannot import this module.
    class Backend(_TorchBackend):  # type: ignore[misc]
        def on_shutdown(self, *args: Any) -> None:
            raise OutOfMemoryError("a worker was killed due to the node running low on memory")

    class Config(TorchConfig):  # type: ignore[misc]
        @property
        def backend_cls(self) -> type[_TorchBackend]:
            return Backend

    return Config(backend="gloo")


@pytest.fixture
def one_cpu() -> Iterator[None]:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def job(tmp_path: Path) -> JobConfig:
    """Its dataset does not exist, which is the first thing that its workers find out."""
    return JobConfig(
        train=TrainConfig(data=DataConfig(global_batch_size=8, num_lanes=8)),
        data=str(tmp_path / "no-dataset"),
        run=str(tmp_path / "run"),
        stall_timeout_s=5.0,
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray Data's own, which Ray Train imports
def test_the_workers_place_is_free_after_an_attempt_whose_end_fails(one_cpu: None, job: JobConfig) -> None:
    relay = start_relay("test-fit")
    ray.get(relay.begin.remote(1))
    fit = Fit(job, 1, {"relay": relay, "attempt": 1, "lease": 1}, local=True)
    fit._trainer.backend_config = last_call_fails()
    fit.run()
    assert fit.error.startswith("WorkerGroupError")
    news = ray.get(relay.take.remote())
    assert "no-dataset" in f"{news.error} {news.fatal}"
    wait_for_free_cpu()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_worker_that_freezes_before_its_first_sign_of_life_is_killed(one_cpu: None, job: JobConfig) -> None:
    relay = start_relay("test-fit")
    ray.get(relay.begin.remote(1))
    fit = Fit(job, 1, {"relay": relay, "attempt": 1, "lease": 1}, local=True)
    fit.start()
    while not (news := ray.get(relay.take.remote())).workers:
        time.sleep(0.02)
    os.kill(news.workers[0].pid, signal.SIGSTOP)
    agents, events = NodeAgents(), list[str]()
    watch = Watch(
        job,
        1,
        nodes=Nodes(job),
        killer=agents,
        ask=relay.wish.remote,
        tell=lambda kind, **fields: events.append(kind),
        driver_node=news.workers[0].node,
    )
    while fit.is_alive():
        agents.refresh()
        watch.look(ray.get(relay.take.remote()))
        fit.join(0.2)
    assert ray.get(relay.take.remote()).workers[0].silent_s is None
    assert watch.broken == "stall"
    assert "no-dataset" not in fit.error
    wait_for_free_cpu()


def wait_for_free_cpu() -> None:
    deadline = time.monotonic() + 60
    while (free := ray.available_resources().get("CPU", 0.0)) < 1:
        assert time.monotonic() < deadline, f"{free} of 1 CPU is free"
        time.sleep(0.2)
