"""Which sample stands at which position: a pure function of (samples per shard, config, position).

Positions 0, 1, 2, ... go on for ever. Step `s` is positions `[s * G, (s + 1) * G)`, epoch `e` is positions
`[e * N, (e + 1) * N)`, and position `p` is on lane `p mod L`.

An epoch is a sequence of all N samples: the shards in a keyed order, turned by a keyed offset so that lanes do not
start at the same samples every epoch. The sequence is cut into L runs of (nearly) equal length, one a lane, so that a
lane reads consecutive bytes. A run is cut into windows, the first one of keyed length so that the lanes do not all
reach a new window at once, and each window is shuffled by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from pipeline.config import DataConfig
from pipeline.hashing import hash64, stream_key

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive rows of one shard."""

    shard: int
    first_row: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class Window:
    """Samples of a lane that are shuffled together; each sample is in one window an epoch."""

    epoch: int
    lane_slot: int
    index: int
    runs: tuple[Run, ...]


@dataclass(frozen=True, slots=True)
class _Places:
    """Where positions fall: all arrays are [n]."""

    epoch: Int64
    slot: Int64
    """Which of the epoch's L runs; the lane shifts against it by `e * N` each epoch."""
    window: Int64
    element: Int64
    """Place within the shuffled window."""
    low: Int64
    """The window's first index in the epoch's sequence."""
    size: Int64


@dataclass(frozen=True, slots=True)
class _Epoch:
    """The sequence of an epoch: shards in order, and where each begins before the turn."""

    shards: Int64
    starts: Int64
    offset: int


class Order:
    """The order of a dataset under a config. Building one costs O(shards); a step costs O(its windows)."""

    def __init__(self, samples_per_shard: Int64, config: DataConfig) -> None:
        """Args: samples_per_shard: [S], in manifest order, each at least 1; config: batch, lanes, seed, window."""
        self._sizes = np.asarray(samples_per_shard, dtype=np.int64)
        self._first_ids = np.concatenate([[0], np.cumsum(self._sizes)])
        self.num_samples = int(self._first_ids[-1])
        if self.num_samples < 1:
            raise ValueError("the dataset has 0 samples; an order needs at least 1")
        self._batch, self._lanes = config.global_batch_size // config.crops_per_image, config.num_lanes
        self._window = config.shuffle_window_samples
        self._shard_key = stream_key(config.seed, "order/shards")
        self._offset_key = stream_key(config.seed, "order/offset")
        self._stagger_key = stream_key(config.seed, "order/stagger")
        self._shuffle_key = stream_key(config.seed, "order/shuffle")
        self._epoch = lru_cache(maxsize=4)(self._build_epoch)

    def step_sample_ids(self, step: int) -> Int64:
        """Sample ids [G / crops_per_image] of a step, in the order of their positions."""
        return self.sample_ids(self.step_positions(step))

    def step_positions(self, step: int) -> Int64:
        """Positions [G / crops_per_image] of a step."""
        if step < 0:
            raise ValueError(f"step ({step}) must not be negative")
        return np.arange(step * self._batch, (step + 1) * self._batch, dtype=np.int64)

    def rank_positions(self, step: int, rank: int, world_size: int) -> Int64:
        """Positions [n] of a step that are `rank`'s: those on lanes `rank`, `rank + world_size`, ...

        Raises:
            ValueError: rank outside [0, world_size), or more ranks than lanes.
        """
        if not 0 <= rank < world_size <= self._lanes:
            raise ValueError(
                f"rank ({rank}) must be in [0, world_size) and world_size ({world_size}) at most "
                f"data.num_lanes ({self._lanes})"
            )
        positions = self.step_positions(step)
        mine: Int64 = positions[positions % self._lanes % world_size == rank]
        return mine

    def epochs(self, positions: Int64) -> Int64:
        """Epoch [n] of each position."""
        return positions // self.num_samples

    def sample_ids(self, positions: Int64) -> Int64:
        """Sample ids [n] at `positions` [n]."""
        places = self._places(np.asarray(positions, dtype=np.int64))
        keys = np.stack([places.epoch, places.low, places.size], axis=1)
        windows, which = np.unique(keys, axis=0, return_inverse=True)
        shuffled = self._shuffle(windows)  # [windows, W] indices into the epoch's sequence
        sequence = shuffled[which.reshape(-1), places.element]
        ids = np.empty(len(sequence), dtype=np.int64)
        for epoch in np.unique(places.epoch):
            chosen = places.epoch == epoch
            ids[chosen] = self._ids_of_sequence(int(epoch), sequence[chosen])
        return ids

    def windows(self, positions: Int64) -> list[Window]:
        """The distinct windows that `positions` fall in, in the order of their first use."""
        places = self._places(np.asarray(positions, dtype=np.int64))
        keys = np.stack([places.epoch, places.slot, places.window, places.low, places.size], axis=1)
        _, first = np.unique(keys, axis=0, return_index=True)
        return [
            Window(int(e), int(slot), int(index), self._runs(int(e), int(low), int(size)))
            for e, slot, index, low, size in keys[np.sort(first)]
        ]

    def _places(self, positions: Int64) -> _Places:
        epoch, within = np.divmod(positions, self.num_samples)
        slot, place = within % self._lanes, within // self._lanes
        shortest, longer = divmod(self.num_samples, self._lanes)
        start = slot * shortest + np.minimum(slot, longer)
        length = shortest + (slot < longer)
        first = 1 + (hash64(self._stagger_key, epoch, slot) % np.uint64(self._window)).astype(np.int64)
        window = np.where(place < first, 0, 1 + (place - first) // self._window)
        low = np.where(window == 0, 0, first + (window - 1) * self._window)
        high = np.minimum(first + window * self._window, length)
        return _Places(epoch, slot, window, place - low, start + low, high - low)

    def _shuffle(self, windows: Int64) -> Int64:
        """Sequence indices [windows, W] of each (epoch, low, size), shuffled; the tail past `size` is unused."""
        epoch, low, size = (column[:, None] for column in windows.T)
        element = np.arange(int(size.max()), dtype=np.int64)[None, :]
        keys = hash64(self._shuffle_key, epoch, low + element)
        keys = np.where(element < size, keys, np.uint64(2**64 - 1))
        shuffled: Int64 = low + np.argsort(keys, axis=1, kind="stable")
        return shuffled

    def _ids_of_sequence(self, epoch: int, sequence: Int64) -> Int64:
        order = self._epoch(epoch)
        turned = (sequence + order.offset) % self.num_samples
        shard = np.searchsorted(order.starts, turned, side="right") - 1
        ids: Int64 = self._first_ids[order.shards[shard]] + turned - order.starts[shard]
        return ids

    def _runs(self, epoch: int, low: int, size: int) -> tuple[Run, ...]:
        order, runs, done = self._epoch(epoch), [], 0
        while done < size:
            turned = (low + done + order.offset) % self.num_samples
            at = int(np.searchsorted(order.starts, turned, side="right")) - 1
            shard, row = int(order.shards[at]), turned - int(order.starts[at])
            length = min(size - done, int(self._sizes[shard]) - row)
            runs.append(Run(shard, row, length))
            done += length
        return tuple(runs)

    def _build_epoch(self, epoch: int) -> _Epoch:
        shards = np.argsort(hash64(self._shard_key, epoch, np.arange(len(self._sizes))), kind="stable")
        starts = np.concatenate([[0], np.cumsum(self._sizes[shards])[:-1]])
        offset = int(hash64(self._offset_key, epoch) % np.uint64(self.num_samples))
        return _Epoch(shards, starts, offset)


def num_micro_steps(config: DataConfig, world_size: int) -> int:
    """Forward passes a step, the same on all ranks: what the rank with the most lanes needs."""
    largest = -(-config.num_lanes // world_size) * (config.global_batch_size // config.num_lanes)
    return -(-largest // (config.micro_batch_size or largest))
