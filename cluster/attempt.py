"""One attempt at a run: a Ray Train worker group from its start to its end, and what the driver writes about it."""

from __future__ import annotations

import logging
import queue
import tempfile
import threading
from typing import Any

from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2.api.config import LoggingConfig

from cluster.capacity import worker_resources
from cluster.config import JobConfig
from cluster.process_group import torch_config
from cluster.worker import train_worker
from pipeline.errors import StoreError
from pipeline.store import Store
from trainer.config import to_dict
from trainer.loop import StopReason
from trainer.metrics import DRIVER_EVENTS, EventLog, attempt_directory

logger = logging.getLogger(__name__)

_CLOSE_S = 10.0


class Fit(threading.Thread):
    """`trainer.fit()` off the main thread: there it would take SIGINT for itself and abort without a checkpoint.

    Ray Train starts the workers, and ends them all when one fails; it does not start them again. Nothing of its own
    checkpointing is used, so its storage is scratch.

    Args:
        job: what to train.
        num_workers: ranks of this attempt.
        payload: for `train_worker`, beside the job.
        local: all workers are on this machine.
    """

    def __init__(self, job: JobConfig, num_workers: int, payload: dict[str, Any], *, local: bool) -> None:
        super().__init__(daemon=True, name="ray-train-fit")
        self._scratch = tempfile.TemporaryDirectory(prefix="tarmac-ray-train-", ignore_cleanup_errors=True)
        self._trainer = _trainer(job, num_workers, payload, local, self._scratch.name)
        self.reason: StopReason | None = None
        """How it ended; None if it was lost."""
        self.error = ""
        """Why it was lost, in Ray's words."""
        self.found_no_place = False
        """It was lost because Ray had no room for the workers after all."""

    def run(self) -> None:
        """Train."""
        try:
            self.reason = StopReason(self._trainer.fit().return_value)
        except BaseException as error:  # for the main thread to look at
            logger.info("Ray Train gave up", exc_info=error)
            # Not the error itself: its traceback would keep Ray's controller alive, and with it the workers' resources.
            self.error = f"{type(error).__name__}: {error}"
            failure = error.controller_failure if isinstance(error, ControllerError) else None
            self.found_no_place = isinstance(failure, WorkerGroupStartupTimeoutError)
        finally:
            self._scratch.cleanup()


def _trainer(job: JobConfig, num_workers: int, payload: dict[str, Any], local: bool, scratch: str) -> TorchTrainer:
    gpu = job.gpus_per_worker > 0
    return TorchTrainer(
        train_worker,
        train_loop_config={"job": to_dict(job), **payload},
        torch_config=torch_config(gpu=gpu, local=local),
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=gpu, resources_per_worker=worker_resources(job)),
        run_config=RunConfig(
            storage_path=scratch,
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


class DriverLog:
    """An attempt's `driver.jsonl`, written by a thread: a store that is down must not stop the driver from looking."""

    def __init__(self, run: Store, attempt: int) -> None:
        self._attempt = run.child(attempt_directory(attempt))
        self._queue: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="driver-log", daemon=True)
        self._thread.start()

    def add(self, event: dict[str, Any]) -> None:
        """Queue an event; it has its `event` and its `time`."""
        self._queue.put(event)

    def close(self) -> None:
        """Write the rest, or give up after a while."""
        self._queue.put(None)
        self._thread.join(_CLOSE_S)

    def _write(self) -> None:
        log = None
        while (event := self._queue.get()) is not None:
            try:
                log = log or EventLog(self._attempt, DRIVER_EVENTS)
                log.add_all([event])
            except StoreError as error:
                logger.warning("an event of the driver is lost: %s", error)
