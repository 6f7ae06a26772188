"""What checkpoints cost here: how long the loop stands still, and how fast they are written and read."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from pipeline.config import require
from pipeline.store import Store
from trainer import checkpoint, parallel
from trainer.checkpoint import Commit
from trainer.checkpoint_files import SPAN_BYTES, read_ahead
from trainer.checkpoint_saver import CheckpointSaver
from trainer.config import TrainConfig
from trainer.update import Trainee, build

STALL_GOAL = 0.1
"""Largest share of a synchronous save's time that the loop may stand still."""


@dataclass(frozen=True)
class CheckpointTimes:
    """Medians over the rounds, in seconds, of a checkpoint of `num_bytes`."""

    device: str
    num_rounds: int
    num_bytes: int
    sync_s: float
    """To write and commit it while the loop waits."""
    stall_s: float
    """That the loop stands still where it is written beside the loop."""
    async_s: float
    """From the begin of that to the commit."""
    verify_s: float
    """To read it and check every byte, which comes before a resume."""
    load_s: float
    """To load it into model and optimizer."""
    plain_write_s: float
    """To write as many bytes into one object."""
    plain_read_s: float
    """To read its files as they are."""

    @property
    def stall_share(self) -> float:
        """Of a synchronous save's time."""
        return self.stall_s / self.sync_s

    @property
    def load_share(self) -> float:
        """Speed of a load over that of plain reads."""
        return self.plain_read_s / self.load_s


@dataclass
class _Rounds:
    times: dict[str, list[float]] = field(default_factory=dict)

    def time(self, name: str, action: Callable[[], object]) -> None:
        started = time.perf_counter()
        action()
        self.times.setdefault(name, []).append(time.perf_counter() - started)

    def median(self, name: str) -> float:
        return statistics.median(self.times[name])


def measure_checkpoints(
    config: TrainConfig, run: Store, *, device: torch.device, num_rounds: int = 3
) -> CheckpointTimes:
    """Save and load a model as one rank, in turn in every way, `num_rounds` times.

    Args:
        config: the model.
        run: a URL under which there is nothing; what is written there is removed.
        device: where the model is.
        num_rounds: at least 1.

    Raises:
        ValueError: rounds below 1, or something is at the URL.
        StoreError: the store refuses, or does not answer.
    """
    require(num_rounds >= 1, f"num_rounds ({num_rounds}) must be at least 1")
    require(next(iter(run.list()), None) is None, f"{run} must be a URL under which there is nothing")
    rounds = _Rounds()
    with parallel.process_mesh(device) as mesh, _saver(run) as saver:
        trainee = _trained(build(config, device, mesh))
        state = checkpoint.state_of(trainee.model, trainee.optimizer, trainee.extra_tensors())
        saver.start(state, step=1, samples_seen=1)  # makes the buffers, which a run makes once
        saver.wait()
        try:
            for step in range(2, 2 * num_rounds + 1, 2):
                commit = _time_round(rounds, run, state, saver, trainee, step)
        finally:
            run.remove_tree("checkpoints")
            run.remove("plain")
    return CheckpointTimes(
        device=str(device),
        num_rounds=num_rounds,
        num_bytes=commit.num_bytes,
        **{name: rounds.median(name) for name in rounds.times},
    )


def _time_round(
    rounds: _Rounds, run: Store, state: dict[str, object], saver: CheckpointSaver, trainee: Trainee, step: int
) -> Commit:
    rounds.time("sync_s", lambda: checkpoint.write(run, state, step=step, samples_seen=step))
    started = time.perf_counter()
    rounds.time("stall_s", lambda: saver.start(state, step=step + 1, samples_seen=step + 1))
    saver.wait()
    rounds.times.setdefault("async_s", []).append(time.perf_counter() - started)
    found: list[Commit | None] = []
    rounds.time("verify_s", lambda: found.append(checkpoint.find_resume(run, lambda path, reason: None)))
    commit = found[0]
    assert commit is not None
    rounds.time(
        "load_s", lambda: checkpoint.load(run, commit, trainee.model, trainee.optimizer, trainee.extra_tensors())
    )
    rounds.time("plain_read_s", lambda: _read(run, commit))
    rounds.time("plain_write_s", lambda: _write(run, commit.num_bytes))
    checkpoint.prune(run, 1, commit)
    return commit


def _saver(run: Store) -> CheckpointSaver:
    return CheckpointSaver(run, may_write=lambda: None, after_commit=lambda commit: None, patience_s=60.0)


def _trained(trainee: Trainee) -> Trainee:
    """After an update that changed nothing, but for the moments that are there now."""
    for parameter in trainee.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainee.optimizer.step()
    trainee.optimizer.zero_grad()
    return trainee


def _read(run: Store, commit: Commit) -> None:
    sizes = {name: record.num_bytes for name, record in commit.files.items()}
    ranges = (
        (name, at, min(SPAN_BYTES, size - at)) for name, size in sizes.items() for at in range(0, size, SPAN_BYTES)
    )
    for _ in read_ahead(run.child(commit.directory), ranges):
        pass


def _write(run: Store, num_bytes: int) -> None:
    piece = bytes(2**20)
    with run.writer("plain") as stream:
        for _ in range(num_bytes // len(piece)):
            stream.write(piece)
