"""From the loader's batches to those that a classifier learns from: augmented, mixed, with soft labels."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from pipeline.hashing import stream_key, uniform
from pipeline.loader import Batch
from pipeline.order import Order, num_micro_steps
from pipeline.reader import Quarantined
from trainer.evaluate.augment import erase, keyed_generator, randaugment
from trainer.evaluate.config import EvaluateConfig, mixes
from trainer.evaluate.mix import mix_group, smooth_labels


@dataclass(frozen=True, slots=True)
class ClassifierBatch:
    """One micro-batch of a rank."""

    images: Shaped[Tensor, "B 3 H W"]
    """uint8 as the loader has them, or float32, normalised, where something was done to them."""
    targets: Float[Tensor, "B classes"]
    branch_scales: Float[Tensor, "B L 2"] | None
    """Drop path of each image, see `Block`."""
    sample_ids: Int[Tensor, " B"]
    step: int
    micro_step: int
    num_micro_steps: int
    num_parts: int
    """In which a frozen encoder takes it; else 1."""
    quarantined: tuple[Quarantined, ...]
    fetched_at: float
    copy_s: float = 0.0

    def to(self, device: torch.device) -> ClassifierBatch:
        """This batch with its tensors on `device`, and the host's time for that added to `copy_s`."""
        started = time.perf_counter()
        scales = self.branch_scales
        moved = replace(
            self,
            images=self.images.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            branch_scales=None if scales is None else scales.to(device, non_blocking=True),
            sample_ids=self.sample_ids.to(device, non_blocking=True),
        )
        return replace(moved, copy_s=self.copy_s + time.perf_counter() - started)


@dataclass(frozen=True, slots=True)
class _Step:
    """All of a rank's images of one step, in the loader's order: arrays [n], the crops of a sample side by side."""

    images: Tensor
    labels: Tensor
    sample_ids: Tensor
    epochs: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.int64]
    """Of the crop among those of its sample."""
    lanes: npt.NDArray[np.int64]
    step: int
    quarantined: tuple[Quarantined, ...]
    fetched_at: float


class ClassifierBatches:
    """Prepares a step while the model is at the one before. An iterator, and a context manager.

    An image is augmented by a generator that (seed, epoch, sample id) key, and mixed within its lane, which no rank
    shares with another: what a step trains on depends on the config and the step alone. For that a rank's share of a
    step is prepared as a whole, and then cut into micro-batches. A linear probe's step stays in one piece, as its batch
    norm needs it, and its encoder takes it in parts.

    Args:
        config: what is done.
        loader: this rank's micro-batches, on the CPU, from the first one of a step on.
        samples_per_shard: of the dataset, [S].
        rank: of this process.
        world_size: number of ranks.
        num_threads: that augment.
        pin_memory: for batches that go to a GPU.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        loader: Iterator[Batch],
        samples_per_shard: npt.NDArray[np.int64],
        *,
        rank: int,
        world_size: int,
        num_threads: int = 1,
        pin_memory: bool = False,
    ) -> None:
        assert config.model.num_classes is not None
        self._config, self._loader, self._pin = config, loader, pin_memory
        self._num_classes = config.model.num_classes
        self._order = Order(samples_per_shard, config.data)
        self._rank, self._world_size = rank, world_size
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="augment")
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        self._ready: deque[ClassifierBatch] = deque()
        self._next: Future[list[ClassifierBatch]] = self._ahead.submit(self._prepare)

    def __iter__(self) -> ClassifierBatches:
        return self

    def __next__(self) -> ClassifierBatch:
        """The next micro-batch. Raises what the loader raises."""
        if not self._ready:
            self._ready += self._next.result()
            self._next = self._ahead.submit(self._prepare)
        return self._ready.popleft()

    def __enter__(self) -> ClassifierBatches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop; a step that is being prepared ends with the loader."""
        for threads in (self._ahead, self._pool):
            threads.shutdown(wait=False, cancel_futures=True)

    def _prepare(self) -> list[ClassifierBatch]:
        step, config = self._read_step(), self._config
        num = num_micro_steps(config.data, self._world_size)
        images = self._augment(step)
        targets = smooth_labels(step.labels, self._num_classes, config.regularize.label_smoothing)
        if mixes(config.regularize):
            self._mix(step, images, targets)
        scales = branch_scales(config, step.epochs, step.sample_ids.numpy(), step.numbers)
        # One piece for a probe; else as the loader cuts, as even as possible, the longer ones first.
        num_micro, num_parts = (1, num) if config.model.frozen_encoder else (num, 1)
        pieces = np.array_split(np.arange(len(images)), num_micro)
        return [
            ClassifierBatch(
                images=self._pinned(images[piece[0] : piece[-1] + 1]),
                targets=self._pinned(targets[piece[0] : piece[-1] + 1]),
                branch_scales=None if scales is None else self._pinned(scales[piece[0] : piece[-1] + 1]),
                sample_ids=self._pinned(step.sample_ids[piece[0] : piece[-1] + 1]),
                step=step.step,
                micro_step=number,
                num_micro_steps=num_micro,
                num_parts=num_parts,
                quarantined=step.quarantined if number == 0 else (),
                fetched_at=step.fetched_at,
            )
            for number, piece in enumerate(pieces)
        ]

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self._pin else tensor

    def _read_step(self) -> _Step:
        """All micro-batches of the loader's next step."""
        batches = [next(self._loader)]
        while batches[-1].micro_step < batches[-1].num_micro_steps - 1:
            batches.append(next(self._loader))
        step, data = batches[0].step, self._config.data
        positions = self._order.rank_positions(step, self._rank, self._world_size).repeat(data.crops_per_image)
        return _Step(
            images=torch.cat([batch.images for batch in batches]),
            labels=torch.cat([batch.labels for batch in batches]),
            sample_ids=torch.cat([batch.sample_ids for batch in batches]),
            epochs=self._order.epochs(positions),
            numbers=np.arange(len(positions)) % data.crops_per_image,
            lanes=positions % data.num_lanes,
            step=step,
            quarantined=tuple(sample for batch in batches for sample in batch.quarantined),
            fetched_at=batches[-1].fetched_at,
        )

    def _augment(self, step: _Step) -> Tensor:
        """The images after RandAugment, normalised, after erasing; as they are if nothing is done to them."""
        regularize = self._config.regularize
        if not (regularize.randaugment_magnitude or regularize.erase_probability or mixes(regularize)):
            return step.images
        augmented = torch.empty(step.images.shape, dtype=torch.float32)
        pixels, results = step.images.permute(0, 2, 3, 1).numpy(), augmented.numpy()
        keys = zip(step.epochs.tolist(), step.sample_ids.tolist(), step.numbers.tolist(), strict=True)
        done = self._pool.map(lambda item: self._augment_one(*item), zip(pixels, results, keys, strict=True))
        for _ in done:
            pass
        return augmented

    def _augment_one(
        self, pixels: npt.NDArray[np.uint8], result: npt.NDArray[np.float32], key: tuple[int, int, int]
    ) -> None:
        regularize, augment = self._config.regularize, self._config.data.augment
        if regularize.randaugment_magnitude:
            generator = keyed_generator(self._config.data.seed, "evaluate/randaugment", *key)
            red, green, blue = (round(255 * value) for value in augment.mean)
            magnitude, deviation = regularize.randaugment_magnitude, regularize.randaugment_std
            pixels = randaugment(np.ascontiguousarray(pixels), generator, magnitude, deviation, (red, green, blue))
        mean, std = (np.array(values, np.float32)[:, None, None] for values in (augment.mean, augment.std))
        np.multiply(pixels.transpose(2, 0, 1), 1 / (255 * std), out=result)
        result -= mean / std
        if regularize.erase_probability:
            generator = keyed_generator(self._config.data.seed, "evaluate/erase", *key)
            erase(result, generator, regularize.erase_probability)

    def _mix(self, step: _Step, images: Tensor, targets: Tensor) -> None:
        for lane in np.unique(step.lanes).tolist():
            rows = torch.from_numpy(np.flatnonzero(step.lanes == lane))
            mixed, mixed_targets = images[rows], targets[rows]
            mix_group(
                self._config.regularize,
                mixed,
                mixed_targets,
                seed=self._config.data.seed,
                step=step.step,
                lane=lane,
            )
            images[rows], targets[rows] = mixed, mixed_targets


def branch_scales(
    config: EvaluateConfig,
    epochs: npt.NDArray[np.int64],
    sample_ids: npt.NDArray[np.int64],
    numbers: npt.NDArray[np.int64],
) -> Tensor | None:
    """What each block's attention and MLP are multiplied by for each image [B, depth, 2]; None without drop path.

    Source:
        Huang et al. 2016, "Deep networks with stochastic depth", with the linear rule of section 3; what stays is
        scaled up in training, so that nothing need be scaled afterwards.
    """
    if config.model.drop_path == 0:
        return None
    depth = config.model.depth
    kept = 1 - np.linspace(0, config.model.drop_path, depth)[None, :, None]
    key = stream_key(config.data.seed, "evaluate/drop_path")
    keys = (values[:, None, None] for values in (epochs, sample_ids, numbers))
    draws = uniform(key, *keys, np.arange(depth)[None, :, None], np.arange(2)[None, None, :])
    return torch.from_numpy(np.where(draws < kept, 1 / kept, 0.0).astype(np.float32))
