"""Is the pipeline or the model the limit? The model fed from memory, the loader alone, and the two together."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from pipeline.config import num_patches, require
from pipeline.dataset import Dataset
from pipeline.loader import Batch, Loader
from trainer import parallel
from trainer.config import TrainConfig
from trainer.step_numbers import StepNumbers
from trainer.update import Trainee, build, update

Limit = Literal["model", "pipeline", "cpus"]

# Of a step. Below this the model hardly notices: rounds on a shared machine differ by as much.
_SMALL_SHARE = 0.05
# Patches, of all images of a step. A CPU takes a second or two for so many with ViT-B.
_CPU_PATCHES = 16 * 196
_LEAST_LOADER_S = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Headspace:
    """What was measured: medians over the rounds, each of them after a warm-up. One rank, this machine."""

    device: str
    num_rounds: int
    num_steps: int
    """Of each measurement in each round."""
    images_per_step: int
    model_images_per_s: float
    """The model, fed with one batch from memory again and again."""
    loader_images_per_s: float
    """The loader, with nobody else at work."""
    together_images_per_s: float
    """The model, fed by the loader."""
    fetch_wait_share: float
    """Of the time of the last: the model waited, and bytes had not arrived."""
    decode_wait_share: float
    """The bytes were there, the pixels were not."""
    copy_share: float
    """The host handed the batches to the device."""
    model_share: float
    """The rest."""
    bytes_per_image: float
    """Mean size of a stored image, with its part of the shard's headers."""

    @property
    def headspace(self) -> float:
        """Images that the loader alone makes, over those that the model alone takes."""
        return self.loader_images_per_s / self.model_images_per_s

    @property
    def fed_share(self) -> float:
        """Speed of the model fed by the loader, over its speed fed from memory."""
        return self.together_images_per_s / self.model_images_per_s

    @property
    def store_bytes_per_s(self) -> float:
        """What the loader alone reads from the store at its pace."""
        return self.loader_images_per_s * self.bytes_per_image

    @property
    def limit(self) -> Limit:
        """`pipeline` if the model had to wait for it, `cpus` if the two slow each other down, else `model`."""
        if self.headspace < 1 or self.fetch_wait_share + self.decode_wait_share > _SMALL_SHARE:
            return "pipeline"
        return "model" if self.fed_share >= 1 - _SMALL_SHARE else "cpus"

    def verdict(self) -> str:
        """The limit in words, and what to do about it."""
        if self.limit == "model":
            return f"the model is the limit: the pipeline could feed {self.headspace:.1f} x as much"
        if self.limit == "cpus":
            return (
                f"the CPUs are the limit: the model runs at {self.fed_share:.0%} of its speed, though it hardly waits "
                f"for images: the loader alone could feed {self.headspace:.1f} x as much, but they share the CPUs. "
                "Use more CPUs"
            )
        found = f"the pipeline is the limit: the model runs at {self.fed_share:.0%} of its speed"
        if self.fetch_wait_share > self.decode_wait_share:
            return (
                f"{found} and waits for bytes. Raise data.num_fetches or data.read_ahead_steps, keep shards on the "
                "node with data.cache_dir, or use a nearer store"
            )
        return f"{found} and waits for decoding. {self._decode_advice()}"

    def _decode_advice(self) -> str:
        advice = "Use more CPUs, and raise data.num_decode_threads if it is set"
        return f"{advice}; or set data.decode_device to mixed" if self.device.startswith("cuda") else advice


def one_rank_config(config: TrainConfig, device: torch.device, micro_batch_size: int | None) -> TrainConfig:
    """The config as one rank of a run meets it: a step is one micro-batch.

    Args:
        config: the recipe.
        device: on a CPU the micro-batch is 16 images of 196 patches, or as many patches, and decoding is on the CPU.
        micro_batch_size: images a step; None takes the recipe's micro-batch, or its global batch if it has none.

    Raises:
        ValueError: `micro_batch_size` is below 1.
    """
    require(
        micro_batch_size is None or micro_batch_size >= 1, f"micro_batch_size ({micro_batch_size}) must be at least 1"
    )
    data = config.data
    size = micro_batch_size or min(data.micro_batch_size or data.global_batch_size, data.global_batch_size)
    if device.type == "cpu" and micro_batch_size is None:
        size = min(size, max(1, _CPU_PATCHES // num_patches(data.augment)))
    crops = data.crops_per_image
    size = max(size // crops, 1) * crops
    lanes = next(lanes for lanes in range(min(size, data.num_lanes), 0, -1) if size % (lanes * crops) == 0)
    data = dataclasses.replace(
        data,
        global_batch_size=size,
        num_lanes=lanes,
        micro_batch_size=None,
        decode_device="cpu" if device.type == "cpu" else data.decode_device,
    )
    # The rate is 0 here, so its bounds are of no interest, and a small batch must not be refused for them.
    return dataclasses.replace(config, data=data, optim=dataclasses.replace(config.optim, min_lr=0.0))


def measure_headspace(
    config: TrainConfig, dataset: Dataset, *, device: torch.device, num_rounds: int = 5, num_steps: int = 10
) -> Headspace:
    """Measure the three in turn, `num_rounds` times, as one rank. Writes nothing.

    Args:
        config: from `one_rank_config`.
        dataset: what the loader reads.
        device: where the model runs.
        num_rounds: at least 1.
        num_steps: timed steps of each measurement in each round, at least 1; about as many again warm up.

    Raises:
        ValueError: rounds or steps below 1.
        ShardError, StoreError: the dataset cannot be read.
    """
    require(num_rounds >= 1, f"num_rounds ({num_rounds}) must be at least 1")
    require(num_steps >= 1, f"num_steps ({num_steps}) must be at least 1")
    batch = config.data.global_batch_size
    alone: list[float] = []
    loader_only: list[float] = []
    together: list[float] = []
    spent: list[tuple[float, float, float, float]] = []
    with parallel.process_mesh(device) as mesh:
        trial = _Trial(config, build(config, device, mesh), device, dataset.num_samples, num_steps)
        with Loader(dataset, config.data, device=device) as loader:
            one = next(loader)
        for _ in range(num_rounds):
            alone.append(trial.train(_repeat(one))[0])
            with Loader(dataset, config.data, device=device) as loader:
                loader_only.append(trial.load(loader))
            with Loader(dataset, config.data, device=device) as loader:
                seconds, parts = trial.train(loader)
            together.append(seconds)
            spent.append(parts)
    shares = [sum(part) / sum(map(sum, spent)) for part in zip(*spent, strict=True)]
    images = num_steps * batch
    return Headspace(
        device=str(device),
        num_rounds=num_rounds,
        num_steps=num_steps,
        images_per_step=batch,
        model_images_per_s=images / statistics.median(alone),
        loader_images_per_s=batch / statistics.median(loader_only),
        together_images_per_s=images / statistics.median(together),
        fetch_wait_share=shares[0],
        decode_wait_share=shares[1],
        copy_share=shares[2],
        model_share=shares[3],
        bytes_per_image=sum(shard.num_bytes for shard in dataset.manifest.shards) / dataset.num_samples,
    )


@dataclass(frozen=True)
class _Trial:
    """The model and how long it is tried."""

    config: TrainConfig
    trainee: Trainee
    device: torch.device
    num_samples: int
    num_steps: int

    @property
    def _num_warmup(self) -> int:
        # Batches that were decoded while the model was not yet asking are no measure of the loader.
        return self.config.data.prefetch_batches + 2

    def train(self, loader: Iterable[Batch]) -> tuple[float, tuple[float, float, float, float]]:
        """Seconds for the timed steps, and their parts: fetch, decode, copy, model."""
        batches = iter(loader)
        numbers = StepNumbers(self.config, self.num_samples, self.device)
        for step in range(self._num_warmup):
            self._update(batches, numbers, step)
        numbers.read()
        started = time.perf_counter()
        for step in range(self._num_warmup, self._num_warmup + self.num_steps):
            self._update(batches, numbers, step)
        records = [step.record for step in numbers.read()]  # waits for the device
        seconds = time.perf_counter() - started
        names = ("fetch_wait_s", "decode_wait_s", "copy_s", "model_s")
        rows: list[dict[str, Any]] = [dict(record) for record in records]
        fetch, decode, copy, model = (sum(row[name] for row in rows) for name in names)
        return seconds, (fetch, decode, copy, model)

    def load(self, loader: Loader) -> float:
        """Seconds a step, over as many batches, or more: a loader works in bursts, which a short time would show."""
        for _ in range(self._num_warmup):
            next(loader)
        self._finish_copies()
        started = time.perf_counter()
        num_steps = 0
        while num_steps < self.num_steps or time.perf_counter() - started < _LEAST_LOADER_S:
            next(loader)
            num_steps += 1
        self._finish_copies()
        return (time.perf_counter() - started) / num_steps

    def _update(self, batches: Iterator[Batch], numbers: StepNumbers, step: int) -> None:
        # At a rate of 0 the weights stay, and the work is the same.
        update(self.config, self.trainee, batches, numbers, step=step, lr=0.0)

    def _finish_copies(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _repeat(batch: Batch) -> Iterator[Batch]:
    """The same batch for every step."""
    step = 0
    while True:
        yield dataclasses.replace(batch, step=step, copy_s=0.0)
        step += 1
