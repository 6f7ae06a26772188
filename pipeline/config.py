"""What the pipeline is told: storage, order, augmentation. Standard library only.

A field made by `execution` says how a run is carried out (threads, cadence, memory). It never changes which
images, crops, flips and masks a step trains on, so a resumed run may change it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal


def execution(default: Any) -> Any:
    """A dataclass field that does not change a run's result."""
    return field(default=default, metadata={"changes_result": False})


def require(condition: bool, message: str) -> None:
    """Raise ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreConfig:
    """How patient the store is. Credentials and endpoints come from the standard chains (AWS_* and so on)."""

    deadline_s: float = execution(120.0)
    """One request, with all its retries, may take this long, in seconds."""
    read_timeout_s: float = execution(15.0)
    """A connection that sends nothing for this long is dropped and tried again, in seconds."""
    num_attempts: int = execution(8)
    """Tries a request, the first one included."""

    def __post_init__(self) -> None:
        require(self.deadline_s > 0, f"store.deadline_s ({self.deadline_s}) must be positive")
        require(self.read_timeout_s > 0, f"store.read_timeout_s ({self.read_timeout_s}) must be positive")
        require(self.num_attempts >= 1, f"store.num_attempts ({self.num_attempts}) must be at least 1")


def _require_numbers(name: str, value: Any, length: int, use: str, *, whole: bool = False) -> None:
    """Raise ValueError unless `value` is a tuple of that many finite numbers, or of integers if `whole`."""
    kind = "integers" if whole else "finite numbers"
    require(
        isinstance(value, tuple) and len(value) == length and all(_is_number(item, whole=whole) for item in value),
        f"augment.{name} ({value!r}) must be a tuple of {length} {kind}; use {use}",
    )


def _is_number(value: Any, *, whole: bool = False) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return False
    return math.isfinite(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """RandomResizedCrop, flip and mask, with MAE's defaults (He et al. 2022, section 4 and appendix A.1)."""

    image_size: tuple[int, int] = (224, 224)
    """Height and width of a training image, in pixels."""
    patch_size: int = 16
    """Side of a square patch, in pixels."""
    mask_ratio: float = 0.75
    """Fraction of the patches that is removed."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Range of a crop's area, as a fraction of the image's."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of a crop's width over its height."""
    flip_probability: float = 0.5
    """Probability of a horizontal flip."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Channel means of a [0, 1] image, subtracted on the model's device."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Channel standard deviations of a [0, 1] image."""

    def __post_init__(self) -> None:
        _require_numbers("image_size", self.image_size, 2, "(224, 224)", whole=True)
        _require_numbers("crop_scale", self.crop_scale, 2, "(0.2, 1.0)")
        _require_numbers("crop_ratio", self.crop_ratio, 2, "(0.75, 1.3333)")
        _require_numbers("mean", self.mean, 3, "(0.485, 0.456, 0.406)")
        _require_numbers("std", self.std, 3, "(0.229, 0.224, 0.225)")
        require(
            _is_number(self.patch_size, whole=True),
            f"augment.patch_size ({self.patch_size!r}) must be an integer; use 16",
        )
        for name, use in (("mask_ratio", 0.75), ("flip_probability", 0.5)):
            value = getattr(self, name)
            require(_is_number(value), f"augment.{name} ({value!r}) must be a finite number; use {use}")
        height, width = self.image_size
        patch = self.patch_size
        require(
            patch >= 1 and height >= patch and width >= patch and height % patch == 0 and width % patch == 0,
            f"augment.image_size ({height}, {width}) must be multiples of augment.patch_size ({patch})",
        )
        kept = num_kept_patches(self)
        require(
            0 < kept < num_patches(self),
            f"augment.mask_ratio ({self.mask_ratio}) must keep at least one of {num_patches(self)} patches "
            f"and remove at least one; it keeps {kept}",
        )
        low, high = self.crop_scale
        require(0 < low <= high <= 1, f"augment.crop_scale ({low}, {high}) must be 0 < low <= high <= 1")
        low, high = self.crop_ratio
        require(0 < low <= high, f"augment.crop_ratio ({low}, {high}) must be 0 < low <= high")
        require(
            0 <= self.flip_probability <= 1,
            f"augment.flip_probability ({self.flip_probability}) must be in [0, 1]",
        )
        require(min(self.std) > 0, f"augment.std {self.std} must be positive")


def num_patches(augment: AugmentConfig) -> int:
    """Patches N of an image."""
    height, width = augment.image_size
    return (height // augment.patch_size) * (width // augment.patch_size)


def num_kept_patches(augment: AugmentConfig) -> int:
    """Patches K that the encoder sees, `int(N * (1 - mask_ratio))` as in the official code."""
    return int(num_patches(augment) * (1 - augment.mask_ratio))


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which images each step trains on, and how they get there."""

    global_batch_size: int = 4096
    """Images an optimizer step, over all ranks; each crop of a sample counts as one."""
    crops_per_image: int = 1
    """Times that a sample is cropped, flipped and masked in a step, read and decoded once (repeated augmentation)."""
    num_lanes: int = 256
    """Parallel runs through the dataset; ranks share them out, so no more ranks than this can train."""
    seed: int = 0
    """Keys every random choice: order, crops, flips, masks, initial weights."""
    shuffle_window_samples: int = 128
    """Consecutive samples of a lane that are shuffled together, and held in memory together."""
    augment: AugmentConfig = AugmentConfig()
    decode_device: Literal["cpu", "mixed"] = "cpu"
    """`cpu`, or `mixed` for nvJPEG on a GPU. The two resize by different code, so pixels differ a little."""
    micro_batch_size: int | None = execution(None)
    """Images a rank per forward pass; None takes the rank's whole share at once."""
    max_bad_samples: int = execution(100)
    """Damaged samples that a rank may replace before the run stops."""
    num_decode_threads: int | None = execution(None)
    """Threads a rank for decoding; None takes `cpus_per_worker`, and without Ray all CPUs of the process."""
    num_fetches: int = execution(8)
    """Ranged reads in flight a rank."""
    fetch_bytes: int = execution(8 * 2**20)
    """Longest ranged read, in bytes; a longer sample is read in one."""
    read_ahead_steps: int = execution(2)
    """Steps whose bytes are requested ahead of the one being decoded."""
    prefetch_batches: int = execution(2)
    """Decoded micro-batches that wait for the model."""
    cache_dir: str | None = execution(None)
    """A folder on a disk of each node that keeps what its ranks read of the shards; None keeps nothing."""
    cache_bytes: int = execution(64 * 2**30)
    """What the folder may take on each node, in bytes."""

    def __post_init__(self) -> None:
        batch, lanes, crops = self.global_batch_size, self.num_lanes, self.crops_per_image
        require(crops >= 1, f"data.crops_per_image ({crops}) must be at least 1")
        require(lanes >= 1, f"data.num_lanes ({lanes}) must be at least 1")
        require(batch >= 1, f"data.global_batch_size ({batch}) must be at least 1")
        below, above = batch // lanes * lanes, (batch // lanes + 1) * lanes
        require(
            batch % lanes == 0,
            f"data.global_batch_size ({batch}) must be divisible by data.num_lanes ({lanes}); "
            f"use {f'{below} or {above}' if below else above}",
        )
        require(
            batch % (lanes * crops) == 0,
            f"data.global_batch_size ({batch}) must be divisible by data.num_lanes ({lanes}) times "
            f"data.crops_per_image ({crops}); use {-(-batch // (lanes * crops)) * lanes * crops}",
        )
        micro = self.micro_batch_size
        require(
            micro is None or micro < 1 or micro % crops == 0,
            f"data.micro_batch_size ({micro}) must be divisible by data.crops_per_image ({crops})",
        )
        require(
            0 <= self.seed < 2**63,
            f"data.seed ({self.seed}) must be in [0, 2**63)",
        )
        positive = (
            "shuffle_window_samples",
            "num_fetches",
            "fetch_bytes",
            "read_ahead_steps",
            "prefetch_batches",
        )
        for name in positive:
            require(getattr(self, name) >= 1, f"data.{name} ({getattr(self, name)}) must be at least 1")
        require(self.max_bad_samples >= 0, f"data.max_bad_samples ({self.max_bad_samples}) must not be negative")
        for name in ("micro_batch_size", "num_decode_threads"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"data.{name} ({value}) must be at least 1")
        require(
            self.cache_dir is None or (bool(self.cache_dir) and "://" not in self.cache_dir),
            f"data.cache_dir ({self.cache_dir!r}) must be a folder on a disk of the node, and no URL",
        )
        require(self.cache_bytes >= 2**26, f"data.cache_bytes ({self.cache_bytes}) must be at least {2**26}")
        require(
            self.decode_device in ("cpu", "mixed"),
            f"data.decode_device ({self.decode_device!r}) must be 'cpu' or 'mixed'",
        )


def check_world(config: DataConfig, world_size: int, name: str = "num_workers") -> None:
    """Raise ValueError if `world_size` ranks cannot share the global batch.

    Each rank needs a lane, and a sample in every micro-batch.

    Args:
        config: lanes, global batch and micro-batch.
        world_size: number of ranks.
        name: what the caller calls the world size, for the message.
    """
    lanes, batch = config.num_lanes, config.global_batch_size
    require(world_size >= 1, f"{name} ({world_size}) must be at least 1")
    require(
        world_size <= lanes,
        f"{name} ({world_size}) must be at most data.num_lanes ({lanes}); use more lanes or fewer workers",
    )
    largest, smallest = -(-lanes // world_size) * (batch // lanes), lanes // world_size * (batch // lanes)
    micro, crops = config.micro_batch_size or largest, config.crops_per_image
    require(
        -(-largest // micro) <= smallest // crops,
        f"data.micro_batch_size ({micro}) needs {-(-largest // micro)} micro-batches on a rank that has "
        f"{smallest // crops} samples at {name} {world_size}; use {2 * crops} or more",
    )
