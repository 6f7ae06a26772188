"""What one Ray Train worker does: one rank of `trainer.loop.train`."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from cluster.config import JobConfig
from pipeline import Loader, open_dataset
from pipeline.errors import ManifestError, ShardError
from pipeline.store import Store
from trainer.checkpoint import find_resume
from trainer.config import check_world, from_dict
from trainer.errors import CheckpointError, TrainingError
from trainer.loop import train
from trainer.metrics import EventLog, attempt_directory, next_attempt

_FATAL = (ValueError, ManifestError, ShardError, CheckpointError, TrainingError)
"""Errors that a restart cannot mend: they would come again."""


REFUSED = "refused"
"""Returned by a worker that the driver's relay did not let begin."""


def train_worker(payload: dict[str, Any]) -> str:
    """Run one rank until the run is finished or asked to stop.

    Args:
        payload: `job`, a JobConfig as JSON values; `relay`, the driver's Relay actor.

    Returns:
        The StopReason's value, or REFUSED; the same on all ranks.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    job: JobConfig = from_dict(JobConfig, payload["job"])
    relay = payload["relay"]
    try:
        return _train_rank(job, relay)
    except Exception as error:
        ray.get(relay.note_error.remote(f"{type(error).__name__}: {error}", isinstance(error, _FATAL)))
        raise


def _train_rank(job: JobConfig, relay: Any) -> str:
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    check_world(job.train, world_size)
    num_threads = max(1, int(job.cpus_per_worker))
    torch.set_num_threads(num_threads)
    device = ray.train.torch.get_device()
    run = Store(job.run, job.train.data.store)
    dataset = open_dataset(job.data, job.train.data.store)
    damage: list[tuple[str, str]] = []
    commit = find_resume(run, lambda path, reason: damage.append((path, reason)))
    step = commit.step if commit else 0
    attempt = _agree_attempt(run, relay, rank=rank, step=step)
    if attempt is None:
        return REFUSED
    if rank == 0:
        _tell(run, relay, damage, attempt=attempt, world_size=world_size, step=step)
    data = job.train.data
    if data.num_decode_threads is None:
        data = dataclasses.replace(data, num_decode_threads=num_threads)
    with Loader(dataset, data, dp_rank=rank, dp_world_size=world_size, start_step=step, device=device) as loader:
        reason = train(
            job.train,
            loader,
            run=run,
            num_samples=dataset.num_samples,
            attempt=attempt,
            device=device,
            resume_from=commit,
            should_stop=lambda: rank == 0 and ray.get(relay.stop_requested.remote()),
            on_metrics=relay.push.remote,
        )
    return reason.value


def _agree_attempt(run: Store, relay: Any, *, rank: int, step: int) -> int | None:
    """The attempt's number, decided by rank 0; None if the driver counts a crash loop or has failed already."""
    told: list[int | None] = [None]
    if rank == 0 and ray.get(relay.begin.remote(step)) is None:
        told = [next_attempt(run)]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def _tell(run: Store, relay: Any, damage: list[tuple[str, str]], *, attempt: int, world_size: int, step: int) -> None:
    """Tell the driver where this attempt starts; tell it, and the run, which checkpoints were walked past."""
    events = EventLog(run.child(attempt_directory(attempt)))
    for path, reason in damage:
        events.add("damage", path=path, reason=reason)
        relay.announce.remote({"event": "damage", "path": path, "reason": reason})
    events.close()
    relay.announce.remote({"event": "attempt", "attempt": attempt, "world_size": world_size, "step": step})
