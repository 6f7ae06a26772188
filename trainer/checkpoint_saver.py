"""Checkpoints that are written while training goes on: the loop stops for a copy to host memory, and no longer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from pipeline.store import Store
from trainer import checkpoint, parallel
from trainer.checkpoint import Commit


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was committed."""

    commit: Commit
    stall_s: float
    """Time that the loop stood still for it: for the save before to end, and for the copy."""
    seconds: float
    """From the begin of the copy to the commit."""


class CheckpointSaver:
    """Saves in a thread of its own, one checkpoint at a time, over a process group of its own.

    `start`, `failed` and `wait` are called on every rank at the same steps. A context manager: leaving it gives the
    save in flight time to end, and says nothing about how it did.

    Args:
        run: the run's store.
        may_write: called on rank 0, in the thread, before a save writes and before it commits; if it fails, so does
            the save.
        after_commit: likewise, when the checkpoint counts.
        patience_s: how long to wait for a save in flight after an error.
        asynchronous: False copies nothing, and `start` returns when the checkpoint is committed.
    """

    def __init__(
        self,
        run: Store,
        *,
        may_write: Callable[[], None],
        after_commit: Callable[[Commit], None],
        patience_s: float,
        asynchronous: bool = True,
    ) -> None:
        self._run, self._may_write, self._after, self._patience_s = run, may_write, after_commit, patience_s
        self._asynchronous = asynchronous
        self._copies: dict[str, Any] | None = None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._saved: list[Saved] = []
        parallel.gloo_group("checkpoint")  # a collective: not to be left to the thread

    def __enter__(self) -> CheckpointSaver:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give the save in flight time to end."""
        if self._thread is not None:
            self._thread.join(self._patience_s)

    def start(self, state: Mapping[str, Any], *, step: int, samples_seen: int) -> None:
        """Copy `state`, and begin to save the copy. Waits for the save before to end first.

        Args:
            state: from `checkpoint.state_of`.
            step: completed optimizer updates.
            samples_seen: images trained on.

        Raises:
            CheckpointError, StoreError: the save before failed.
        """
        begin = time.perf_counter()
        self.wait()
        copied_from = time.perf_counter()
        if not self._asynchronous:
            self._save(state, step, samples_seen, None, copied_from)
            self.wait()
            return
        self._copies = copy_to_host(state, self._copies)
        arguments = (self._copies, step, samples_seen, time.perf_counter() - begin, copied_from)
        self._thread = threading.Thread(target=self._save, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def failed(self) -> bool:
        """Whether the save in flight is known to have failed on this rank."""
        return self._error is not None

    def wait(self) -> None:
        """Wait for the save in flight, if there is one. Raises what it raised; it fails on all ranks or on none."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def take_saved(self) -> list[Saved]:
        """What was committed since the last call, oldest first."""
        saved, self._saved = self._saved, []
        return saved

    def _save(
        self, state: Mapping[str, Any], step: int, samples_seen: int, stall_s: float | None, copied_from: float
    ) -> None:
        try:
            commit = checkpoint.write(self._run, state, step=step, samples_seen=samples_seen, may_write=self._may_write)
            seconds = time.perf_counter() - copied_from
            self._saved.append(Saved(commit, seconds if stall_s is None else stall_s, seconds))
            if parallel.rank() == 0:
                self._after(commit)
        except Exception as error:
            self._error = error


def copy_to_host(state: Mapping[str, Any], into: Mapping[str, Any] | None) -> dict[str, Any]:
    """Copy a tree of tensors to host memory, sharded ones as they are.

    Args:
        state: tensors, plain or sharded, in dicts of any depth.
        into: an earlier copy, whose memory is used again; None takes new memory.
    """
    copies = _copy(state, into)
    if any(device.type == "cuda" for device in _devices(state)):
        torch.cuda.synchronize()
    assert isinstance(copies, dict)
    return copies


def _copy(value: Any, into: Any) -> Any:
    if isinstance(value, Mapping):
        # The first update gives the optimizer its moments: a copy from before has no place for them.
        return {name: _copy(item, into.get(name) if into else None) for name, item in value.items()}
    assert isinstance(value, Tensor)
    if into is None:
        return value.detach().to("cpu", copy=True)
    parallel.local(into).copy_(parallel.local(value), non_blocking=True)
    return into


def _devices(value: Any) -> set[torch.device]:
    if isinstance(value, Mapping):
        return {device for item in value.values() for device in _devices(item)}
    return {value.device}
