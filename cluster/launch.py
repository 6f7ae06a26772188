"""A Ray Train worker group that runs `trainer.loop.train`, and the driver that watches it."""

from __future__ import annotations

import io
import logging
import math
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from types import FrameType
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import LoggingConfig

from cluster.config import JobConfig
from cluster.relay import News, start_relay
from cluster.stop_request import clear_stop, stop_asked
from cluster.worker import REFUSED, train_worker
from pipeline.errors import StoreError
from pipeline.store import Store
from trainer.config import to_dict
from trainer.loop import StopReason

logger = logging.getLogger(__name__)

_POLL_S = 0.25
_ABORT_S = 120.0
_WAIT_TOLD_S = 30.0
_STOP_POLL_S = 2.0
_OBJECT_STORE_BYTES = 256 * 2**20
"""Of a local Ray: no training data passes through Ray's object store."""


class RunFailedError(Exception):
    """The run ended by an error that a restart cannot mend."""


def launch(job: JobConfig, *, on_news: Callable[[News], None]) -> StopReason:
    """Train `job` on Ray until it is finished, stopped by a signal, or failed.

    SIGTERM and SIGINT save a checkpoint and stop; a second one ends at once.

    Args:
        job: what to train, where, with how many workers.
        on_news: called on this thread a few times a second with what the workers reported.

    Raises:
        RunFailedError: a worker's error that a restart cannot mend, or a crash loop.
    """
    with (
        redirect_stdout(_RayOutput()),
        _ray(job),
        tempfile.TemporaryDirectory(prefix="tarmac-ray-train-") as scratch,
        _StopSignals() as signals,
    ):
        relay = start_relay(job.max_attempts_without_progress)
        fit, workers = _Fit(_trainer(job, relay, scratch)), _WorkersAwaited(job)
        request = _StopRequest(Store(job.run, job.train.store))
        fit.start()
        running = True
        while running:
            fit.join(_POLL_S)
            running = fit.is_alive()
            news = ray.get(relay.take.remote())
            if signals.take():
                relay.request_stop.remote()
                news.events.append({"event": "stopping", "signal": signals.name})
            if request.take():
                relay.request_stop.remote()
                news.events.append({"event": "stopping", "signal": "tarmac stop"})
            news.events += workers.look(news)
            on_news(news)
            if news.fatal is not None:
                # Ray starts the workers once more, they are refused, and the fit ends in order.
                fit.join(_ABORT_S)
                raise RunFailedError(news.fatal)
        reason = fit.outcome()
        request.clear()
        return reason


class _StopRequest:
    """The bucket's stop request, looked for now and then."""

    def __init__(self, run: Store) -> None:
        self._run = run
        self._taken = False
        self._next = 0.0

    def take(self) -> bool:
        """Whether a stop was asked for since the last call."""
        if self._taken or time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + _STOP_POLL_S
        try:
            self._taken = stop_asked(self._run)
        except StoreError as error:
            logger.warning("no answer about a stop request: %s", error)
        return self._taken

    def clear(self) -> None:
        """It was honoured, if there was one."""
        if self._taken:
            clear_stop(self._run)


class _WorkersAwaited:
    """Tells what the cluster lacks while no attempt begins: Ray waits for resources in silence, and for ever."""

    def __init__(self, job: JobConfig) -> None:
        self._need = {"CPU": job.num_workers * job.cpus_per_worker, "GPU": job.num_workers * job.gpus_per_worker}
        self._next: float | None = time.monotonic() + _WAIT_TOLD_S

    def look(self, news: News) -> list[dict[str, Any]]:
        """A `waiting` event now and then, from the loss of an attempt to the beginning of the next."""
        kinds = [event["event"] for event in news.events]
        if "attempt" in kinds or news.records:
            self._next = None
        elif "error" in kinds:
            self._next = time.monotonic() + _WAIT_TOLD_S
        if self._next is None or time.monotonic() < self._next:
            return []
        self._next = time.monotonic() + _WAIT_TOLD_S
        return [{"event": "waiting", "need": self._need, "have": _resources(self._need)}]


def _resources(kinds: Iterable[str]) -> dict[str, float]:
    """What the cluster has in all, in use or not."""
    have: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return {kind: float(have.get(kind, 0.0)) for kind in kinds}


class _RayOutput(io.TextIOBase):
    """Ray prints raylet errors on the driver's stdout whatever its logging level; they belong in the log."""

    def write(self, text: str, /) -> int:
        if text.strip():
            logger.info("%s", text.strip())
        return len(text)


class _Fit(threading.Thread):
    """`trainer.fit()` off the main thread: there it would take SIGINT for itself and abort without a checkpoint."""

    def __init__(self, trainer: TorchTrainer) -> None:
        super().__init__(daemon=True, name="ray-train-fit")
        self._trainer = trainer
        self._reason: StopReason | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            returned = self._trainer.fit().return_value
            self._reason = None if returned == REFUSED else StopReason(returned)
        except BaseException as error:  # carried to the main thread by outcome()
            self._error = error

    def outcome(self) -> StopReason:
        if self._reason is None:
            logger.info("Ray Train gave up", exc_info=self._error)
            first_lines = " ".join(str(self._error).split("\n")[:2])
            raise RunFailedError(f"Ray Train gave up: {first_lines} (all of it with tarmac -v)") from self._error
        return self._reason


def _trainer(job: JobConfig, relay: Any, scratch: str) -> TorchTrainer:
    gpu = job.gpus_per_worker > 0
    return TorchTrainer(
        train_worker,
        train_loop_config={"job": to_dict(job), "relay": relay},
        # gloo beside nccl: checkpoints and agreements pass plain CPU values.
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=job.num_workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": job.cpus_per_worker, **({"GPU": job.gpus_per_worker} if gpu else {})},
        ),
        # Ray restarts the group as often as it takes; the relay refuses attempts in a crash loop. Nothing of Ray's own
        # checkpointing is used, so its storage is scratch.
        run_config=RunConfig(
            storage_path=scratch,
            failure_config=FailureConfig(max_failures=-1, max_preemption_failures=-1),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


@contextmanager
def _ray(job: JobConfig) -> Iterator[None]:
    """RAY_ADDRESS's cluster, or a local one with as many logical CPUs as the workers need."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = os.environ.get("RAY_ADDRESS")
    if address is None:
        needed = math.ceil(job.num_workers * job.cpus_per_worker)
        options |= {"num_cpus": max(os.cpu_count() or 1, needed), "include_dashboard": False}
        options["object_store_memory"] = _OBJECT_STORE_BYTES
    ray.init(address=address or "local", **options)
    if address is None and job.gpus_per_worker:
        have, need = _resources(["GPU"])["GPU"], job.num_workers * job.gpus_per_worker
        if have < need:
            ray.shutdown()
            raise RunFailedError(
                f"num_workers ({job.num_workers}) at gpus_per_worker {job.gpus_per_worker:g} needs {need:g} GPUs and "
                f"this machine has {have:g}; use fewer workers, --gpus-per-worker 0, or a cluster (RAY_ADDRESS)"
            )
    try:
        yield
    except KeyboardInterrupt:
        raise  # Ray dies with this process; shut down under the fitting thread it takes the process with it
    except BaseException:
        ray.shutdown()
        raise
    ray.shutdown()


class _StopSignals:
    """SIGTERM and SIGINT are noted for the watching loop; the second one raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.name = ""
        self._new = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def take(self) -> bool:
        """Whether a stop was asked for since the last call."""
        new, self._new = self._new, False
        return new

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name:
            raise KeyboardInterrupt
        self.name, self._new = signal.Signals(number).name, True
