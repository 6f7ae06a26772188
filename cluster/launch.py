"""Brings a run and its driver together: the lease on it, Ray, and the signals that stop it."""

from __future__ import annotations

import io
import logging
import math
import os
from collections.abc import Callable
from contextlib import redirect_stdout, suppress

from cluster.config import JobConfig
from cluster.driver import Driver, RunFailedError
from cluster.lease import Lease, LeaseError, LeaseRecord, acquire, read_lease
from cluster.ray_access import open_ray
from cluster.relay import News
from cluster.stops import Stops
from pipeline.errors import StoreError
from pipeline.store import Store
from trainer.errors import RunError
from trainer.loop import StopReason

__all__ = ["RunFailedError", "launch"]

logger = logging.getLogger(__name__)

_RAY_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    # A dead node may be known as such only after a while: then the driver looks for another place.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    # The driver sees drained nodes itself, and sooner; Ray Train's watcher would be one process more in each attempt.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
}


def launch(job: JobConfig, *, on_news: Callable[[News], None]) -> StopReason:
    """Train `job` on Ray until it is finished, stopped, or failed.

    SIGTERM, SIGINT and `tarmac stop` save a checkpoint and stop; a second signal ends at once.

    Args:
        job: what to train, where, with how many workers.
        on_news: called on this thread a few times a second with what the workers reported.

    Raises:
        LeaseError: another driver has the run, or took it over.
        RunFailedError: a worker's error that a restart cannot mend, or a crash loop.
    """
    run = Store(job.run, job.train.store)
    for name, value in _RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    num_cpus, num_gpus = (math.ceil(job.num_workers * one) for one in (job.cpus_per_worker, job.gpus_per_worker))
    with (
        redirect_stdout(_RayOutput()),
        acquire(run) as lease,
        open_ray(num_cpus=num_cpus, num_gpus=num_gpus) as local,
        Stops(run) as stops,  # last: Ray takes SIGTERM for itself
    ):
        try:
            return Driver(job, run, lease, stops, local=local, on_news=on_news).drive()
        except RunFailedError as error:
            holder = _other_holder(run, lease)
            if holder is not None:  # whatever failed here, the run goes on
                raise LeaseError(f"{run} was taken over by {holder}; this driver stops") from error
            raise


def _other_holder(run: Store, lease: Lease) -> LeaseRecord | None:
    """The driver that has the run now, if it is another one, as far as the store tells."""
    with suppress(StoreError, RunError):
        newest = read_lease(run)
        if newest is not None and newest.driver != lease.record.driver:
            return newest
    return None


class _RayOutput(io.TextIOBase):
    """Ray prints raylet errors on the driver's stdout whatever its logging level; they belong in the log."""

    def write(self, text: str, /) -> int:
        if text.strip():
            logger.info("%s", text.strip())
        return len(text)
