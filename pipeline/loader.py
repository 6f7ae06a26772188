"""The loader of one rank: iterate Batches from a step on, for ever."""

from __future__ import annotations

import atexit
import math
import os
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from pipeline.augment import CropDrawer, Crops, repeated_crops, repeated_masks
from pipeline.config import DataConfig, check_world, require
from pipeline.dataset import Dataset
from pipeline.decode import Decoder, Decoding
from pipeline.order import num_micro_steps
from pipeline.reader import EncodedSample, Quarantined, Reader

_POLL_S = 0.05
_CLOSE_S = 0.4


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch of a rank. Tensors are on the loader's device.

    B is at least 1, and may differ by one sample between the micro-batches of a step. With `crops_per_image` the crops
    of a sample are side by side.
    """

    images: UInt8[Tensor, "B 3 H W"]
    """RGB, 0 to 255, cropped and flipped; in memory the channels are last (`torch.channels_last`)."""
    kept_ids: Int64[Tensor, "B K"]
    """Patches that the encoder sees, in the order of their noise."""
    masked_ids: Int64[Tensor, "B M"]
    """Patches that are removed, likewise."""
    sample_ids: Int64[Tensor, " B"]
    """What was really trained on: replacements, where samples were damaged."""
    labels: Int64[Tensor, " B"]
    """Classes; -1 in a dataset without labels."""
    step: int
    micro_step: int
    num_micro_steps: int
    quarantined: tuple[Quarantined, ...] = ()
    """Samples of this micro-batch that were replaced."""
    fetched_at: float = -math.inf
    """When its last byte was here, by `time.perf_counter`: a wait before that is for bytes, after it for pixels."""
    copy_s: float = 0.0
    """Host time to hand its tensors to the device; on a GPU the copy itself goes on meanwhile."""

    def to(self, device: torch.device) -> Batch:
        """This batch with its tensors on `device`, and the host's time for that added to `copy_s`."""
        started = time.perf_counter()
        moved = _with_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))
        return replace(moved, copy_s=self.copy_s + time.perf_counter() - started)


@dataclass(frozen=True, slots=True)
class LoaderStats:
    """Where a loader's time went since it was made, in seconds, and what it did."""

    fetch_wait_s: float
    """The consumer waited for a batch whose bytes had not all arrived."""
    decode_wait_s: float
    """The consumer waited for a batch that was being decoded."""
    decode_s: float
    """The decoding threads were at work, summed over them."""
    full_s: float
    """Enough batches waited for the consumer: the model is the limit, not the pipeline."""
    fetched_bytes: int
    """Read of shards, from the store or from the cache."""
    cached_bytes: int
    """Read from the cache alone."""
    num_batches: int

    @property
    def wait_s(self) -> float:
        """The consumer waited for a batch."""
        return self.fetch_wait_s + self.decode_wait_s


@dataclass(slots=True)
class _Started:
    """A batch whose images are being decoded from `samples`."""

    batch: Batch
    samples: list[EncodedSample]
    decoding: Decoding


class Loader:
    """Batches of one rank, from a step on, for ever: all micro-batches of a step, then the next step.

    The pixels, masks, ids and labels at a position depend on (dataset, config) alone: not on the world size, the
    number of threads, the micro-batches, or the step that the loader started from.

    Reads run on the reader's threads and decoding on the decoder's; a thread here gives each batch to the decoder as
    soon as its bytes are there. At most `config.prefetch_batches` micro-batches, decoded or not, wait for the model.

    Args:
        dataset: from `open_dataset`.
        config: what and how.
        dp_rank: this rank among those that share the global batch.
        dp_world_size: number of such ranks, at most `config.num_lanes`.
        start_step: the first step.
        device: where the batches go.
        draw_crops: the boxes of each sample's crops; `centre_crops` for a validation set.

    Raises:
        ValueError: rank, world size or step are out of range, micro-batches too small for the world size, or
            `config.cache_dir` cannot be written.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: DataConfig,
        *,
        dp_rank: int = 0,
        dp_world_size: int = 1,
        start_step: int = 0,
        device: torch.device | str = "cpu",
        draw_crops: CropDrawer = repeated_crops,
    ) -> None:
        self._config, self._device, self._draw_crops = config, torch.device(device), draw_crops
        _check(config, dp_rank, dp_world_size, start_step, self._device)
        self.num_micro_steps = num_micro_steps(config, dp_world_size)
        if config.cache_dir is not None:
            dataset = dataset.cached(config.cache_dir, config.cache_bytes)
        self._cache = dataset.cache
        self._reader = Reader(dataset, config, rank=dp_rank, world_size=dp_world_size, start_step=start_step)
        self._decoder = Decoder(
            config.augment,
            crops_per_image=config.crops_per_image,
            device=config.decode_device,
            num_threads=config.num_decode_threads or _num_cpus(),
            device_id=_gpu(self._device) if config.decode_device == "mixed" else None,
            # Pinned here, copied without blocking on the consumer's stream.
            pin_memory=self._device.type == "cuda" and config.decode_device == "cpu",
        )
        self._fetch_wait_s = self._decode_wait_s = self._full_s = 0.0
        self._num_batches = 0
        self._closed = threading.Event()
        self._error: Exception | None = None
        """What ended the thread that fills the queue."""
        self._failure: Exception | None = None
        """What `__next__` raised."""
        self._queue: queue.Queue[_Started | None] = queue.Queue(config.prefetch_batches)
        self._thread = threading.Thread(target=self._produce, args=(start_step,), name="tarmac-batches", daemon=True)
        self._thread.start()
        # A loader that nobody closed: DALI must not be at work while the interpreter goes down.
        atexit.register(self.close)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next micro-batch.

        Raises:
            ShardError: a shard is missing, short or damaged, or there are too many damaged samples.
            StoreError: the store does not answer or refuses us.
            StopIteration: the loader is closed.
        """
        if self._closed.is_set():
            raise StopIteration
        if self._failure is not None:
            raise self._failure
        try:
            batch = self._next()
        except Exception as error:
            self._failure = error  # whoever asks again gets the same answer
            raise
        self._num_batches += 1
        return batch.to(self._device)

    def _next(self) -> Batch:
        asked = time.perf_counter()
        started = self._queue.get()
        fetched = time.perf_counter()
        self._fetch_wait_s += fetched - asked
        if started is None:
            raise StopIteration if self._error is None else self._error
        batch = self._finish(started)
        self._decode_wait_s += time.perf_counter() - fetched
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def stats(self) -> LoaderStats:
        """Where the time went so far."""
        return LoaderStats(
            fetch_wait_s=self._fetch_wait_s,
            decode_wait_s=self._decode_wait_s,
            decode_s=self._decoder.busy_s,
            full_s=self._full_s,
            fetched_bytes=self._reader.fetched_bytes,
            cached_bytes=self._cache.hit_bytes if self._cache is not None else 0,
            num_batches=self._num_batches,
        )

    def close(self) -> None:
        """Stop all threads, within a second; a read that hangs is left to the store's deadline."""
        self._closed.set()
        self._reader.close()
        self._decoder.close()
        self._thread.join(_CLOSE_S)
        atexit.unregister(self.close)
        with suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
        self._end()

    def _produce(self, step: int) -> None:
        """Fill the queue until closed, or until an error, which the consumer meets after the batches before it."""
        try:
            while not self._closed.is_set():
                samples = self._reader.read_step()
                fetched_at = time.perf_counter()
                for micro_step in range(self.num_micro_steps):
                    # As np.array_split: as even as possible, the longer ones first.
                    size = -(-len(samples) // (self.num_micro_steps - micro_step))
                    self._put(self._start(samples[:size], step, micro_step, fetched_at))
                    del samples[:size]
                step += 1
        except Exception as error:
            if not self._closed.is_set():  # closing interrupts whatever goes on here
                self._error = error
        self._put(None)

    def _put(self, batch: _Started | None) -> None:
        started = time.perf_counter()
        while not self._closed.is_set():
            with suppress(queue.Full):
                self._queue.put(batch, timeout=_POLL_S)
                break
        self._full_s += time.perf_counter() - started

    def _end(self) -> None:
        with suppress(queue.Full):
            self._queue.put_nowait(None)

    def _start(self, samples: list[EncodedSample], step: int, micro_step: int, fetched_at: float) -> _Started:
        decoding = self._decoder.start([sample.data for sample in samples], self._crops(samples))
        for sample in samples:
            sample.data = b""  # the decoder drops the bytes when it is done: a batch that waits must not hold them
        batch = self._batch(decoding.images, samples, step, micro_step, fetched_at)
        return _Started(batch, samples, decoding)

    def _batch(
        self, images: Tensor, samples: list[EncodedSample], step: int, micro_step: int, fetched_at: float
    ) -> Batch:
        config = self._config
        ids = _column([sample.sample_id for sample in samples])
        labels = _column([sample.label for sample in samples])
        epochs = _column([sample.epoch for sample in samples])
        kept, masked = repeated_masks(config.augment, config.seed, epochs, ids, config.crops_per_image)
        return Batch(
            images=images,
            kept_ids=self._tensor(np.ascontiguousarray(kept)),
            masked_ids=self._tensor(np.ascontiguousarray(masked)),
            sample_ids=self._tensor(ids.repeat(config.crops_per_image)),
            labels=self._tensor(labels.repeat(config.crops_per_image)),
            step=step,
            micro_step=micro_step,
            num_micro_steps=self.num_micro_steps,
            fetched_at=fetched_at,
            quarantined=tuple(
                Quarantined(step, sample.wanted_id, sample.sample_id, sample.reason)
                for sample in samples
                if sample.reason is not None
            ),
        )

    def _finish(self, started: _Started) -> Batch:
        """Wait for the images; replace the samples that cannot be decoded."""
        batch, samples = started.batch, started.samples
        try:
            bad = started.decoding.wait()
            if not bad:
                return batch
            for index, reason in bad.items():
                images = batch.images.view(len(samples), -1, *batch.images.shape[1:])[index]
                samples[index] = self._replace(samples[index], reason, images)
        except Exception:
            if self._closed.is_set():  # meanwhile, by another thread
                raise StopIteration from None
            raise
        return self._batch(batch.images, samples, batch.step, batch.micro_step, batch.fetched_at)

    def _replace(self, sample: EncodedSample, reason: str, images: Tensor) -> EncodedSample:
        """The first replacement of a sample that can be decoded; its crops go to `images` [crops, 3, H, W]."""
        while True:
            sample = self._reader.replace(sample, reason)
            decoding = self._decoder.start([sample.data], self._crops([sample]))
            bad = decoding.wait()
            if not bad:
                images.copy_(decoding.images)
                return sample
            reason = bad[0]

    def _tensor(self, values: npt.NDArray[np.int64]) -> Tensor:
        tensor = torch.from_numpy(values)
        return tensor.pin_memory() if self._device.type == "cuda" else tensor

    def _crops(self, samples: list[EncodedSample]) -> Crops:
        return self._draw_crops(
            self._config.augment,
            self._config.seed,
            _column([sample.epoch for sample in samples]),
            _column([sample.sample_id for sample in samples]),
            _column([sample.height for sample in samples]),
            _column([sample.width for sample in samples]),
            self._config.crops_per_image,
        )


def _column(values: list[int]) -> npt.NDArray[np.int64]:
    return np.array(values, dtype=np.int64)


def _with_tensors(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    return replace(
        batch,
        images=change(batch.images),
        kept_ids=change(batch.kept_ids),
        masked_ids=change(batch.masked_ids),
        sample_ids=change(batch.sample_ids),
        labels=change(batch.labels),
    )


def _check(config: DataConfig, rank: int, world_size: int, start_step: int, device: torch.device) -> None:
    check_world(config, world_size, "dp_world_size")
    require(0 <= rank < world_size, f"dp_rank ({rank}) must be in [0, dp_world_size ({world_size}))")
    require(start_step >= 0, f"start_step ({start_step}) must not be negative")
    require(
        config.decode_device == "cpu" or device.type == "cuda",
        f"data.decode_device ({config.decode_device}) must be 'cpu' for a loader on device {device}",
    )


def _num_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpu(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
