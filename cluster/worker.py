"""What one Ray Train worker does: one rank of `trainer.loop.train`."""

from __future__ import annotations

import re
import threading
import time
import traceback
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from cluster.config import EvaluateJob, JobConfig
from cluster.lease import LeaseError, LeaseRecord, check_lease
from cluster.log_setup import set_up_logging, without_secrets
from cluster.tasks import Place, evaluation, pretraining
from pipeline import open_dataset
from pipeline.errors import ManifestError, ShardError
from pipeline.store import Store
from trainer import parallel
from trainer.checkpoint import find_resume, set_aside
from trainer.config import check_world, from_dict
from trainer.errors import CheckpointError, PeerError, TrainingError
from trainer.loop import Hooks, train
from trainer.metrics import EventLog, attempt_directory
from trainer.wishes import Wish

_FATAL = (ValueError, ManifestError, ShardError, CheckpointError, TrainingError, LeaseError)
"""Errors that a restart cannot mend: they would come again."""
_PULSE_S = 1.0


def train_worker(payload: dict[str, Any]) -> str:
    """Run one rank until the run is finished or asked to stop.

    Args:
        payload: `job`, a JobConfig as JSON values; `relay`, the driver's Relay actor; `attempt`, this attempt's number;
            `lease`, the driver's LeaseRecord.

    Returns:
        The StopReason's value, the same on all ranks.
    """
    began = time.time()
    set_up_logging(verbose=True)
    job: JobConfig = from_dict(EvaluateJob if "source" in payload["job"] else JobConfig, payload["job"])
    seat = _Seat(payload["relay"], payload["attempt"], payload["lease"], began)
    try:
        with _Heartbeat(seat):
            return _train_rank(job, seat)
    except Exception as error:
        if not isinstance(error, PeerError):  # then the other rank tells why
            fatal = isinstance(error, _FATAL)
            ray.get(seat.relay.note_error.remote(seat.attempt, one_line(error), fatal))
        leaving = redacted(error)
        if leaving is error:
            raise
    raise leaving  # out here, where it has no context for Ray to print


class RedactedError(Exception):
    """An error that had a secret of a URL in it: its traceback without that."""


def redacted(error: Exception) -> Exception:
    """The error itself if no secret of a URL is in its traceback, or a RedactedError.

    Ray prints what a worker raises, sends it to other processes and keeps it in their logs.
    """
    text = "".join(traceback.format_exception(error))
    clean = without_secrets(text)
    return error if clean == text else RedactedError(clean)


def one_line(error: Exception) -> str:
    """Its type and text in one line, without the place in gloo's sources that a lost connection begins with."""
    text = re.sub(r"^\[\S+:\d+\] ", "", " ".join(str(error).split()))
    return without_secrets(f"{type(error).__name__}: {text}")


@dataclass(frozen=True)
class _Seat:
    """This worker's place: whom it talks to, in which attempt, under which lease."""

    relay: Any
    attempt: int
    lease: LeaseRecord
    began: float


class _Heartbeat(threading.Thread):
    """Tells the driver once a second that this process is alive."""

    def __init__(self, seat: _Seat) -> None:
        super().__init__(daemon=True, name="pulse")
        self._relay, self._attempt = seat.relay, seat.attempt
        self._rank = ray.train.get_context().get_world_rank()
        self._closed = threading.Event()

    def run(self) -> None:
        """Until closed."""
        while not self._closed.is_set():
            self._relay.note_pulse.remote(self._attempt, self._rank)
            self._closed.wait(_PULSE_S)

    def __enter__(self) -> _Heartbeat:
        """Begin."""
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """End."""
        self._closed.set()


def _train_rank(job: JobConfig, seat: _Seat) -> str:
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    check_world(job.train, world_size)
    run = Store(job.run, job.train.store)
    num_threads = max(1, int(job.cpus_per_worker))
    torch.set_num_threads(num_threads)
    device = ray.train.torch.get_device()
    dataset = open_dataset(job.data, job.train.store)
    damage: list[tuple[str, str]] = []
    commit = find_resume(run, lambda path, reason: damage.append((path, reason)))
    step = commit.step if commit else 0
    parallel.from_rank_zero(partial(_begin_attempt, run, seat, damage, world_size=world_size, step=step))
    place = Place(rank, world_size, num_threads, device)
    if isinstance(job, EvaluateJob):
        opened = evaluation(job, dataset, place, commit)
    else:
        opened = pretraining(job, dataset, place, commit)
    hooks = Hooks(
        ask=lambda: ray.get(seat.relay.take_wish.remote(seat.attempt)) if rank == 0 else Wish.GO_ON,
        on_metrics=partial(seat.relay.push.remote, seat.attempt),
        on_event=partial(seat.relay.announce.remote, seat.attempt),
        may_write=partial(check_lease, run, seat.lease),
    )
    with opened as task:
        reason = train(
            job.train,
            task.batches,
            run=run,
            num_samples=dataset.num_samples,
            attempt=seat.attempt,
            device=device,
            resume_from=commit,
            hooks=hooks,
            began=seat.began,
            build=task.build,
            validation=task.validation,
        )
    return reason.value


def _begin_attempt(run: Store, seat: _Seat, damage: list[tuple[str, str]], *, world_size: int, step: int) -> None:
    """On rank 0: set damaged checkpoints aside, and tell the run and the driver."""
    check_lease(run, seat.lease)
    events = EventLog(run.child(attempt_directory(seat.attempt)))
    events.add_all({"event": "damage", "path": path, "reason": reason} for path, reason in damage)
    events.close()
    set_aside(run, damage)
    announce = partial(seat.relay.announce.remote, seat.attempt)
    for path, reason in damage:
        announce({"event": "damage", "path": path, "reason": reason})
    announce({"event": "attempt", "attempt": seat.attempt, "world_size": world_size, "step": step})
