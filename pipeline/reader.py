"""A rank's positions to encoded bytes, ahead of time, in few large ranged reads.

A window of the order is a few runs of consecutive rows. Each run is cut at sample borders into pieces of at most
`fetch_bytes`; a piece is read once, when the first step within `read_ahead_steps` needs one of its samples, and goes
when its last sample has been used. So the pieces of the first step come first, and nothing is read that only earlier
steps needed.

Samples are views into their piece. A copy for each would be freed earlier, but a hundred kB here and there on every
thread fragment the heap: measured on 8 lanes, 550 MB and growing, against 370 MB and steady.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from pipeline.augment import replacement_ids
from pipeline.config import DataConfig
from pipeline.dataset import Dataset
from pipeline.errors import ShardError
from pipeline.manifest import ShardIndex
from pipeline.order import Order, Run, Window

logger = logging.getLogger(__name__)

# Replacements tried for one sample; that many damaged in a row is no accident.
_REPLACEMENT_ATTEMPTS = 16
_POLL_S = 0.05
_CLOSE_S = 0.5

Int64 = npt.NDArray[np.int64]
_T = TypeVar("_T")
_P = ParamSpec("_P")
_Key = tuple[int, int, int]  # epoch, shard, row: an id occurs once an epoch, and a step may span epochs


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A damaged sample, and the one that step `step` trained on instead."""

    step: int
    sample_id: int
    replacement_id: int
    reason: str


@dataclass(slots=True)
class EncodedSample:
    """The bytes for one position of a step; whoever takes `data` may empty it.

    `wanted_id` is the order's sample; `sample_id` is the one whose bytes these are, another one only if the wanted
    one is damaged, for `reason`.
    """

    step: int
    epoch: int
    wanted_id: int
    sample_id: int
    data: bytes | memoryview
    height: int
    width: int
    label: int
    reason: str | None = None
    num_replacements: int = 0
    """Replacements tried so far, this one included."""


@dataclass(frozen=True, slots=True)
class _Row:
    data: bytes | memoryview
    reason: str | None
    """Why it is damaged."""
    height: int
    width: int
    label: int


@dataclass(slots=True)
class _Piece:
    """Consecutive rows of a shard, read in one go. `index` holds those rows only."""

    shard: int
    index: ShardIndex
    rows: Future[list[_Row]] | None = None


@dataclass(frozen=True, slots=True)
class _Plan:
    """A rank's part of a step: the samples in position order, and where their bytes will be."""

    epochs: list[int]
    sample_ids: list[int]
    places: list[tuple[_Piece, int]]


class ReaderClosedError(Exception):
    """The reader is closed, perhaps while somebody waited for it."""


class Reader:
    """Reads the encoded samples of one rank, step after step from `start_step`. Use `read_step` from one thread.

    Memory: with P = `(1 + read_ahead_steps) * G / L` positions a lane at hand, a lane holds the windows that these
    touch: in the mean `P + shuffle_window_samples` samples, at most `P + 2 * shuffle_window_samples`. Reads in flight
    belong to these windows; the store may hold their bytes once more, `num_fetches * fetch_bytes`. With images of
    110 kB, 64 lanes over 8 ranks, G = 4096 and the defaults: at most 8 * (192 + 256) * 110 kB = 394 MB, and
    8 * 8 MiB = 67 MB. (docs/memory.md has the rest of a loader's memory.)

    Args:
        dataset: where the bytes lie.
        config: batch, lanes, seed, window, and the bounds on reads.
        rank: which lanes are read: `rank`, `rank + world_size`, ...
        world_size: number of ranks.
        start_step: the first step.

    Raises:
        ValueError: rank and world size do not fit the number of lanes.
    """

    def __init__(self, dataset: Dataset, config: DataConfig, *, rank: int, world_size: int, start_step: int) -> None:
        self._dataset, self._config = dataset, config
        self._rank, self._world_size = rank, world_size
        self._order = Order(dataset.samples_per_shard, config)
        self._order.rank_positions(start_step, rank, world_size)
        self._step = start_step
        self._plans: dict[int, _Plan] = {}
        self._places: dict[_Key, tuple[_Piece, int]] = {}
        self._windows: dict[Window, int] = {}  # window -> the last planned step that uses it
        self._indexes: dict[int, Future[ShardIndex]] = {}
        self._bad_ids: set[int] = set()
        self._closed, self._lock = threading.Event(), threading.Lock()
        self._pool = ThreadPoolExecutor(config.num_fetches, "tarmac-fetch")
        self.wait_s = 0.0
        """Seconds that `read_step` waited for bytes."""
        self.fetched_bytes = 0
        """Bytes read from shards, but for repeats of damaged samples."""

    def read_step(self) -> list[EncodedSample]:
        """The samples of the next step in position order; starts the reads of the steps after it.

        Raises:
            ShardError: a shard or index is missing, short or damaged, or there are too many damaged samples.
            StoreError: the store does not answer or refuses us.
            ReaderClosedError: closed meanwhile.
        """
        if self._closed.is_set():
            raise ReaderClosedError
        step = self._step
        self._plan(step, needed=True)
        for ahead in range(step + 1, step + 1 + self._config.read_ahead_steps):
            if not self._plan(ahead, needed=False):
                break
        self._load_indexes(step + 1 + self._config.read_ahead_steps)
        plan = self._plans.pop(step)
        samples = [self._take(step, *wanted) for wanted in zip(plan.epochs, plan.sample_ids, plan.places, strict=True)]
        self._drop_finished_windows(step)
        self._step = step + 1
        return samples

    def replace(self, sample: EncodedSample, reason: str) -> EncodedSample:
        """The next good replacement of a damaged sample: the same one whenever and wherever it is asked for.

        Raises:
            ShardError: more than `max_bad_samples` damaged samples, or none of the replacements is good.
        """
        self._count_bad(sample.sample_id, reason)
        candidates = replacement_ids(
            self._config.seed, sample.epoch, sample.wanted_id, self._dataset.num_samples, _REPLACEMENT_ATTEMPTS
        )
        reason = sample.reason or reason
        # Known bad ids are tried like any other: what a run has seen before must not decide what it trains on.
        for tried in range(sample.num_replacements, _REPLACEMENT_ATTEMPTS):
            candidate = int(candidates[tried])
            row = self._result(self._submit(self._read_one, candidate))
            if row.reason is not None:
                self._count_bad(candidate, row.reason)
                continue
            message = "step %d: sample %d is damaged (%s); sample %d takes its place"
            logger.warning(message, sample.step, sample.wanted_id, reason, candidate)
            return replace(
                sample,
                sample_id=candidate,
                data=row.data,
                height=row.height,
                width=row.width,
                label=row.label,
                reason=reason,
                num_replacements=tried + 1,
            )
        raise ShardError(
            f"sample {sample.wanted_id} of {self._dataset.store} is damaged ({reason}), and so are all "
            f"{_REPLACEMENT_ATTEMPTS} samples that could take its place; run `tarmac verify {self._dataset.store}`"
        )

    def close(self) -> None:
        """Stop reading. Whoever waits in `read_step` gets ReaderClosedError."""
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        # A read in flight cannot be interrupted; one that hangs ends with the store's deadline, and we don't wait.
        joining = threading.Thread(target=self._pool.shutdown, name="tarmac-fetch-close", daemon=True)
        joining.start()
        joining.join(_CLOSE_S)

    def _plan(self, step: int, *, needed: bool) -> bool:
        """Work out where a step's samples lie and start reading them.

        Args:
            step: which.
            needed: wait for the indexes of its shards; otherwise give up if one has not arrived yet.

        Returns:
            Whether the step is planned.
        """
        if step in self._plans:
            return True
        positions = self._order.rank_positions(step, self._rank, self._world_size)
        windows = self._order.windows(positions)
        indexes = self._load_indexes(step, windows)
        if not needed and not all(future.done() and not future.exception() for future in indexes.values()):
            return False  # an error is raised when the step that needs the index comes
        for window in windows:
            if window not in self._windows:
                for run in window.runs:
                    self._cut(window.epoch, run, self._result(indexes[run.shard]))
            self._windows[window] = step
        for shard in indexes:
            self._indexes.pop(shard, None)  # the dataset's cache has it
        sample_ids, epochs = self._order.sample_ids(positions), self._order.epochs(positions)
        keys = zip(epochs.tolist(), *(column.tolist() for column in self._dataset.locate(sample_ids)), strict=True)
        places = [self._places.pop(key) for key in keys]
        for piece, _ in places:
            if piece.rows is None:
                piece.rows = self._submit(self._fetch, piece.shard, piece.index)
        self._plans[step] = _Plan(epochs.tolist(), sample_ids.tolist(), places)
        return True

    def _load_indexes(self, step: int, windows: list[Window] | None = None) -> dict[int, Future[ShardIndex]]:
        """Start loading the indexes that a step's new windows need."""
        if windows is None:
            windows = self._order.windows(self._order.rank_positions(step, self._rank, self._world_size))
        shards = {run.shard for window in windows if window not in self._windows for run in window.runs}
        for shard in shards - self._indexes.keys():
            self._indexes[shard] = self._submit(self._dataset.index, shard)
        return {shard: self._indexes[shard] for shard in shards}

    def _cut(self, epoch: int, run: Run, index: ShardIndex) -> None:
        """Cut a run into pieces and note where each of its samples will be."""
        for first, stop in _pieces(index, run, self._config.fetch_bytes):
            piece = _Piece(run.shard, index.rows(first, stop))
            for row in range(first, stop):
                self._places[epoch, run.shard, row] = (piece, row - first)

    def _take(self, step: int, epoch: int, sample_id: int, place: tuple[_Piece, int]) -> EncodedSample:
        piece, at = place
        assert piece.rows is not None
        row = self._result(piece.rows)[at]
        sample = EncodedSample(step, epoch, sample_id, sample_id, row.data, row.height, row.width, row.label)
        return sample if row.reason is None else self.replace(sample, row.reason)

    def _drop_finished_windows(self, step: int) -> None:
        """Forget windows that lanes have left behind; after a start in their middle, some samples are unused."""
        for window in [window for window, last in self._windows.items() if last < step]:
            del self._windows[window]
            for run in window.runs:
                for row in range(run.first_row, run.first_row + run.num_rows):
                    self._places.pop((window.epoch, run.shard, row), None)

    def _submit(self, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        try:
            return self._pool.submit(work, *args, **kwargs)
        except RuntimeError as error:
            raise ReaderClosedError from error

    def _result(self, future: Future[_T]) -> _T:
        """The future's result, or ReaderClosedError as soon as the reader is closed."""
        if not future.done():
            started = time.perf_counter()
            while not self._closed.is_set() and not wait([future], timeout=_POLL_S).done:
                pass
            self.wait_s += time.perf_counter() - started
        if self._closed.is_set():
            raise ReaderClosedError
        return future.result()

    def _read_one(self, sample_id: int) -> _Row:
        (shard,), (row,) = self._dataset.locate([sample_id])
        return self._fetch(int(shard), self._dataset.index(int(shard)).rows(int(row), int(row) + 1))[0]

    def _fetch(self, shard: int, index: ShardIndex) -> list[_Row]:
        """Read consecutive rows of a shard."""
        columns = (column.tolist() for column in (index.height, index.width, index.label))
        found = self._dataset.read_rows(shard, index)
        rows = [_Row(*read, *numbers) for read, *numbers in zip(found, *columns, strict=True)]
        with self._lock:
            self.fetched_bytes += int(index.offset[-1] + index.num_bytes[-1] - index.offset[0])
        return rows

    def _count_bad(self, sample_id: int, reason: str) -> None:
        """Count a damaged sample, once however often it comes up."""
        self._bad_ids.add(sample_id)
        limit = self._config.max_bad_samples
        if len(self._bad_ids) > limit:
            raise ShardError(
                f"{len(self._bad_ids)} damaged samples in {self._dataset.store}, more than data.max_bad_samples "
                f"({limit}) allows; the last one is {sample_id}: {reason}; run `tarmac verify {self._dataset.store}` "
                f"and restore what it names, or raise data.max_bad_samples"
            )


def _pieces(index: ShardIndex, run: Run, fetch_bytes: int) -> Iterator[tuple[int, int]]:
    """Rows [first, stop) of each piece of a run: as long as `fetch_bytes` allows, and at least one sample."""
    first, end = run.first_row, run.first_row + run.num_rows
    ends = index.offset + index.num_bytes
    while first < end:
        stop = int(np.searchsorted(ends[:end], index.offset[first] + fetch_bytes, side="right"))
        stop = max(stop, first + 1)
        yield first, stop
        first = stop
