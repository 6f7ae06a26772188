"""The training loop: batches in, updates, records and checkpoints out, until the end or a request to stop."""

from __future__ import annotations

import dataclasses
import enum
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from pipeline.errors import StoreError
from pipeline.store import Store
from trainer import checkpoint, parallel
from trainer.checkpoint import Commit
from trainer.checkpoint_saver import CheckpointSaver
from trainer.config import LoopConfig, num_steps
from trainer.errors import TrainingError
from trainer.metrics import Event, RunLog, SilentLog, StepRecord, attempt_directory
from trainer.optim import learning_rate
from trainer.step_numbers import StepNumbers, StepRead
from trainer.update import Trainee, update
from trainer.update import build as build_mae_trainee
from trainer.wishes import Wish

if TYPE_CHECKING:
    from pipeline.reader import Quarantined

__all__ = ["Hooks", "StopReason", "TrainingError", "Wish", "train"]

logger = logging.getLogger(__name__)

_ASK_S = 1.0


@runtime_checkable
class Validation(Protocol):
    """Looks at the model between two steps, now and then, at the same ones on every rank."""

    def due(self, step: int) -> bool:
        """Whether it looks when `step` updates are complete."""

    def run(self, model: nn.Module, step: int, log: RunLog) -> None:
        """Look, and tell `log`. A collective; before the checkpoint of `step`, which so never comes without it."""


class StopReason(enum.Enum):
    """Why `train` returned. Either way the last checkpoint is of the last step."""

    FINISHED = "finished"
    """The run has all its steps."""
    STOPPED = "stopped"
    """It was asked to; the same run can go on from here."""


@dataclasses.dataclass(frozen=True)
class Hooks:
    """Whom a run asks and tells on its way; as it is, nobody."""

    ask: Callable[[], Wish] = lambda: Wish.GO_ON
    """Called between steps, about once a second and after each log interval; all ranks do what any of them is asked."""
    on_metrics: Callable[[StepRecord], None] = lambda record: None
    """Given every step's record, on rank 0."""
    on_event: Callable[[Event], None] = lambda event: None
    """Given every event, likewise."""
    may_write: Callable[[], None] = lambda: None
    """Called on rank 0 before a checkpoint is written, and again before it is committed; it is not if this raises."""


def train(
    config: LoopConfig,
    loader: Iterable[Any],
    *,
    run: Store,
    num_samples: int,
    attempt: int,
    device: torch.device,
    resume_from: Commit | None,
    hooks: Hooks = Hooks(),
    began: float | None = None,
    build: Callable[[Any, torch.device, DeviceMesh], Trainee] = build_mae_trainee,
    validation: Validation | None = None,
) -> StopReason:
    """Train from a checkpoint, or from the start, to the end of the run or to a request to stop.

    A collective: every rank calls it, with its own loader and device.

    Args:
        config: the recipe and its cadences.
        loader: this rank's micro-batches, from the step of `resume_from` on.
        run: the run's store; checkpoints, step records and events go there.
        num_samples: images in the dataset.
        attempt: number of this attempt, of which no other has the same.
        device: where this rank's part of the model lives.
        resume_from: from `checkpoint.find_resume`.
        hooks: asked and told on the way.
        began: when this process turned to the attempt, in seconds since 1970, for the `start` event; None is now.
        build: makes what is trained: a masked autoencoder, unless told otherwise.
        validation: looks at the model on the way.

    Raises:
        TrainingError: too many updates in a row were skipped because loss or gradient were not finite or spiked, or
            the loader gave another step than the one due. No checkpoint holds anything of these steps.
        CheckpointError, StoreError: a checkpoint could not be written or loaded.
    """
    total_steps = num_steps(config, num_samples)
    step = resume_from.step if resume_from else 0
    if step >= total_steps:
        return StopReason.FINISHED
    began = time.time() if began is None else began
    shard_size = config.parallel.shard_size
    with (
        parallel.process_mesh(device, shard_size) as mesh,
        _open_log(config, run, attempt, hooks) as log,
    ):
        trainee = build(config, device, mesh)
        if resume_from is not None:
            checkpoint.load(run, resume_from, trainee.model, trainee.optimizer, trainee.extra_tensors())
        _log_start(log, attempt, resume_from, began)
        numbers = StepNumbers(config, num_samples, device)
        with _saver(config, run, log, hooks.may_write) as saver:
            questions = _Questions(hooks.ask, step)
            steps = _Steps(config, trainee, numbers, log, saver, questions, validation, total_steps)
            step = steps.take(iter(loader), step)

        reason = StopReason.FINISHED if step == total_steps else StopReason.STOPPED
        log.event("stop", step=step, reason=reason.value)
    return reason


@dataclasses.dataclass
class _Steps:
    """An attempt's steps, and what is due between two of them; on every rank at the same ones."""

    config: LoopConfig
    trainee: Trainee
    numbers: StepNumbers
    log: RunLog
    saver: CheckpointSaver
    questions: _Questions
    validation: Validation | None
    total_steps: int
    quarantined: list[Quarantined] = dataclasses.field(default_factory=list)
    """Samples that were replaced and not told of yet."""

    def take(self, batches: Iterator[Any], step: int) -> int:
        """From `step` to the end of the run or to a request to stop, with the last save; returns the step reached."""
        stopping = False
        while step < self.total_steps and not stopping:
            lr = learning_rate(self.config, step, self.total_steps)
            self.quarantined += update(self.config, self.trainee, batches, self.numbers, step=step, lr=lr)
            step += 1
            stopping = self._between(step)
        self.saver.wait()
        _log_saved(self.log, self.saver)
        return step

    def _between(self, step: int) -> bool:
        """Tell, ask, validate and save what is due after `step` updates; whether to stop then."""
        at_end = step == self.total_steps
        look_due = step % self.config.log.every_steps == 0 or at_end
        save_due = step % self.config.checkpoint.every_steps == 0 or at_end
        validation_due = self.validation is not None and self.validation.due(step)
        stopping = False
        if look_due or save_due or validation_due:
            self._tell()
        if look_due or self.questions.due(step):
            stopping, saving, failed = self.questions.put(step, self.saver)
            if failed:
                self.saver.wait()
            save_due = save_due or saving or stopping
            if saving or stopping:
                self._tell()  # a checkpoint's steps are on record before it is
        if self.validation is not None and validation_due:
            self.validation.run(self.trainee.model, step, self.log)
            self.numbers.restart_clock()
        if save_due:
            trainee = self.trainee
            state = checkpoint.state_of(trainee.model, trainee.optimizer, trainee.extra_tensors())
            samples_seen = step * self.config.data.global_batch_size
            self.saver.start(state, step=step, samples_seen=samples_seen)
            self.numbers.restart_clock()
        return stopping

    def _tell(self) -> None:
        max_skipped = self.config.optim.max_skipped_steps
        self.questions.pace(_report(self.log, self.numbers, self.quarantined, max_skipped))
        _log_saved(self.log, self.saver)


class _Questions:
    """Puts `ask` to the ranks about once a second, at steps that all of them know."""

    def __init__(self, ask: Callable[[], Wish], step: int) -> None:
        self._ask = ask
        self._last, self._every = step, 1

    def due(self, step: int) -> bool:
        """Whether a second has gone by, after `step` updates."""
        return step - self._last >= self._every

    def put(self, step: int, saver: CheckpointSaver) -> tuple[bool, bool, bool]:
        """Whether any rank is asked to stop, is asked to save, and had a save that failed. A collective."""
        self._last = step
        wish = parallel.together(self._ask)
        stop, save, failed = parallel.any_of(wish is Wish.STOP, wish is Wish.SAVE, saver.failed())
        return stop, save, failed

    def pace(self, steps: list[StepRead]) -> None:
        """Learn from the last steps, which are the same on all ranks, how many make a second."""
        if steps:
            step_s = sum(read.record["step_s"] for read in steps) / len(steps)
            self._every = max(1, int(_ASK_S / step_s))


def _open_log(config: LoopConfig, run: Store, attempt: int, hooks: Hooks) -> RunLog:
    if parallel.rank() != 0:
        return SilentLog()
    return RunLog(run.child(attempt_directory(attempt)), config.log.flush_s, hooks.on_metrics, hooks.on_event)


def _log_start(log: RunLog, attempt: int, resume_from: Commit | None, began: float) -> None:
    processes = parallel.gather((os.getpid(), socket.gethostname()))
    log.event(
        "start",
        step=resume_from.step if resume_from else 0,
        attempt=attempt,
        world_size=len(processes),
        began=began,
        resumed_from=resume_from.directory if resume_from else None,
        pids=[pid for pid, _ in processes],
        hosts=[host for _, host in processes],
    )


def _report(
    log: RunLog, numbers: StepNumbers, quarantined: list[Quarantined], max_skipped_steps: int
) -> list[StepRead]:
    """Read the numbers of the last steps, and write them, skipped steps and replaced samples to the log."""
    replaced = [sample for rank in parallel.gather(quarantined) for sample in rank]
    log.events({"event": "quarantined", **dataclasses.asdict(sample)} for sample in replaced)
    quarantined.clear()
    steps = numbers.read()
    log.events(_skipped_event(step) for step in steps if step.record["skipped"])
    log.records(step.record for step in steps)
    last = max(steps, key=lambda step: step.skipped_in_a_row, default=None)
    if last is not None and last.skipped_in_a_row > max_skipped_steps:
        event = _skipped_event(last)
        found = f"loss {last.record['loss']:g}, gradient norm {last.record['grad_norm']:g}"
        log.event("stop", step=last.record["step"], reason=event["reason"], found=found)
        raise TrainingError(
            f"{last.skipped_in_a_row} updates in a row were skipped, more than optim.max_skipped_steps "
            f"({max_skipped_steps}); the last, step {last.record['step']}, was "
            f"{'not finite' if event['reason'] == 'non_finite' else 'a spike'} ({found}; samples {last.suspects}). "
            "No checkpoint holds them. Lower optim.base_lr, or train with parallel.precision fp32"
        )
    return steps


def _skipped_event(step: StepRead) -> dict[str, Any]:
    record = step.record
    finite = math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])
    return {
        "event": "skipped",
        "step": record["step"],
        "reason": "spike" if finite else "non_finite",
        "loss": record["loss"],
        "grad_norm": record["grad_norm"],
        "sample_ids": step.suspects,
    }


def _saver(config: LoopConfig, run: Store, log: RunLog, may_write: Callable[[], None]) -> CheckpointSaver:
    def prune(commit: Commit) -> None:
        try:
            checkpoint.prune(run, config.checkpoint.keep_last, commit, config.checkpoint.keep_every_steps)
        except StoreError as error:
            logger.warning("old checkpoints stay: %s", error)

    def flush_and_ask() -> None:
        # A step that is in a checkpoint is never done again, so its record must not be lost: first the records.
        log.flush()
        may_write()

    return CheckpointSaver(
        run,
        may_write=flush_and_ask,
        after_commit=prune,
        patience_s=config.store.deadline_s,
        asynchronous=config.checkpoint.asynchronous,
    )


def _log_saved(log: RunLog, saver: CheckpointSaver) -> None:
    for saved in saver.take_saved():
        numbers = {"stall_s": saved.stall_s, "seconds": saved.seconds, "num_bytes": saved.commit.num_bytes}
        log.event("save", step=saved.commit.step, **numbers)
