"""What one Ray Train worker does: one rank of `trainer.loop.train`."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from cluster.config import EvaluateJob, JobConfig
from cluster.tasks import Place, evaluation, pretraining
from pipeline import open_dataset
from pipeline.errors import ManifestError, ShardError, StoreError
from pipeline.store import Store
from trainer import parallel
from trainer.checkpoint import find_resume, newest_step, set_aside
from trainer.config import check_world, from_dict
from trainer.errors import CheckpointError, PeerError, TrainingError
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
    job: JobConfig = from_dict(EvaluateJob if "source" in payload["job"] else JobConfig, payload["job"])
    relay = payload["relay"]
    try:
        return _train_rank(job, relay)
    except PeerError:
        raise  # the other rank tells why
    except Exception as error:
        ray.get(relay.note_error.remote(f"{type(error).__name__}: {error}", isinstance(error, _FATAL)))
        raise


def _train_rank(job: JobConfig, relay: Any) -> str:
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    check_world(job.train, world_size)
    run = Store(job.run, job.train.store)
    if not parallel.from_rank_zero(lambda: ray.get(relay.admit.remote(_committed_step(run)))):
        return REFUSED
    num_threads = max(1, int(job.cpus_per_worker))
    torch.set_num_threads(num_threads)
    device = ray.train.torch.get_device()
    dataset = open_dataset(job.data, job.train.store)
    damage: list[tuple[str, str]] = []
    commit = find_resume(run, lambda path, reason: damage.append((path, reason)))
    step = commit.step if commit else 0
    begin = partial(_begin_attempt, run, relay, damage, world_size=world_size, step=step)
    attempt = parallel.from_rank_zero(begin)
    place = Place(rank, world_size, num_threads, device)
    if isinstance(job, EvaluateJob):
        opened = evaluation(job, dataset, place, commit, announce=relay.announce.remote)
    else:
        opened = pretraining(job, dataset, place, commit)
    with opened as task:
        reason = train(
            job.train,
            task.batches,
            run=run,
            num_samples=dataset.num_samples,
            attempt=attempt,
            device=device,
            resume_from=commit,
            should_stop=lambda: rank == 0 and ray.get(relay.stop_requested.remote()),
            on_metrics=relay.push.remote,
            build=task.build,
            validation=task.validation,
        )
    return reason.value


def _committed_step(run: Store) -> int | None:
    """Of the newest checkpoint; None where the store does not answer, which is found out again, and told, later."""
    try:
        return newest_step(run) or 0
    except StoreError:
        return None


def _begin_attempt(run: Store, relay: Any, damage: list[tuple[str, str]], *, world_size: int, step: int) -> int:
    """On rank 0: number the attempt, set damaged checkpoints aside, and tell the run and the driver."""
    attempt = next_attempt(run)
    events = EventLog(run.child(attempt_directory(attempt)))
    events.add_all({"event": "damage", "path": path, "reason": reason} for path, reason in damage)
    events.close()
    set_aside(run, damage)
    for path, reason in damage:
        relay.announce.remote({"event": "damage", "path": path, "reason": reason})
    relay.announce.remote({"event": "attempt", "attempt": attempt, "world_size": world_size, "step": step})
    return attempt
