"""Crop, flip and mask of each image: pure functions of (config, seed, epoch, sample id)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt

from pipeline.config import AugmentConfig, num_kept_patches, num_patches
from pipeline.hashing import hash64, stream_key, uniform

Int64 = npt.NDArray[np.int64]

_CROP_ATTEMPTS = 10


@dataclass(frozen=True, slots=True)
class Crops:
    """Boxes in pixels of the stored image, each array [B]; `flip` mirrors the resized crop left to right."""

    top: Int64
    left: Int64
    height: Int64
    width: Int64
    flip: npt.NDArray[np.bool_]


def uniforms(seed: int, purpose: str, epochs: Int64, sample_ids: Int64, num: int) -> npt.NDArray[np.float64]:
    """Uniform numbers [B, num] in [0, 1), keyed by (seed, purpose, epoch, sample id).

    Args:
        seed: data.seed.
        purpose: names the stream, so that crops and masks are independent.
        epochs: [B].
        sample_ids: [B].
        num: numbers an image.
    """
    counters = np.arange(num)[None, :]
    return uniform(stream_key(seed, purpose), np.asarray(epochs)[:, None], np.asarray(sample_ids)[:, None], counters)


def draw_crops(
    config: AugmentConfig, seed: int, epochs: Int64, sample_ids: Int64, heights: Int64, widths: Int64, number: int = 0
) -> Crops:
    """Boxes of RandomResizedCrop, and flips.

    Args:
        config: crop_scale, crop_ratio, flip_probability.
        seed: data.seed.
        epochs: [B].
        sample_ids: [B].
        heights: [B], of the stored images, in pixels.
        widths: [B], likewise.
        number: of the crop among those of the same sample in the same step.

    Source: torchvision's RandomResizedCrop.get_params (ten tries, then the largest centred box of a fitting ratio).
    """
    heights, widths = np.asarray(heights, dtype=np.int64), np.asarray(widths, dtype=np.int64)
    draws = uniforms(seed, _stream("crop", number), epochs, sample_ids, 2 * _CROP_ATTEMPTS + 3)
    areas = _between(draws[:, :_CROP_ATTEMPTS], *config.crop_scale) * (heights * widths)[:, None]
    low, high = np.log(config.crop_ratio)
    ratios = np.exp(_between(draws[:, _CROP_ATTEMPTS : 2 * _CROP_ATTEMPTS], low, high))
    tried_w = np.rint(np.sqrt(areas * ratios)).astype(np.int64)
    tried_h = np.rint(np.sqrt(areas / ratios)).astype(np.int64)
    fits = (tried_w > 0) & (tried_w <= widths[:, None]) & (tried_h > 0) & (tried_h <= heights[:, None])
    rows, first, fitted = np.arange(len(fits)), fits.argmax(axis=1), fits.any(axis=1)
    largest_h, largest_w = _largest_box(config, heights, widths)
    height = np.where(fitted, tried_h[rows, first], largest_h)
    width = np.where(fitted, tried_w[rows, first], largest_w)
    at_y, at_x, flip = draws[:, -3], draws[:, -2], draws[:, -1]
    top = np.where(fitted, np.floor(at_y * (heights - height + 1)), (heights - height) // 2)
    left = np.where(fitted, np.floor(at_x * (widths - width + 1)), (widths - width) // 2)
    return Crops(top.astype(np.int64), left.astype(np.int64), height, width, flip < config.flip_probability)


def draw_masks(
    config: AugmentConfig, seed: int, epochs: Int64, sample_ids: Int64, number: int = 0
) -> tuple[Int64, Int64]:
    """Which patches stay and which go: kept ids [B, K] and masked ids [B, N - K], both in the order of their noise.

    `number` is that of the crop, as for `draw_crops`.

    Source: He et al. 2022, section 3: a random permutation of the patches, of which the first K are kept.
    """
    noise = uniforms(seed, _stream("mask", number), epochs, sample_ids, num_patches(config))
    ids = np.argsort(noise, axis=1, kind="stable")
    kept = num_kept_patches(config)
    return ids[:, :kept], ids[:, kept:]


def replacement_ids(seed: int, epoch: int, sample_id: int, num_samples: int, attempts: int) -> Int64:
    """Sample ids [attempts] to take, in this order, in place of a damaged one."""
    draws = hash64(stream_key(seed, "augment/replacement"), epoch, sample_id, np.arange(attempts))
    return (draws % np.uint64(num_samples)).astype(np.int64)


CropDrawer = Callable[[AugmentConfig, int, Int64, Int64, Int64, Int64, int], Crops]
"""What `repeated_crops` is: (config, seed, epochs, sample ids, heights, widths, crops per image) -> boxes."""


def centre_crops(
    config: AugmentConfig,
    seed: int,
    epochs: Int64,
    sample_ids: Int64,
    heights: Int64,
    widths: Int64,
    crops_per_image: int,
    *,
    fraction: float,
) -> Crops:
    """One box in the middle of each image, nothing random in it: for a validation set.

    The largest box of the shape of `config.image_size`, times `fraction`: the part of an image that is left when its
    shorter side is resized to 256 and the middle 224 are cut out, for 224 / 256.

    Args: as for `repeated_crops`, of which image size, heights and widths count; `crops_per_image` must be 1.
    """
    assert crops_per_image == 1
    ratio = config.image_size[1] / config.image_size[0]
    largest = _largest_box(replace(config, crop_ratio=(ratio, ratio)), heights, widths)
    height, width = (np.maximum(np.rint(side * fraction), 1).astype(np.int64) for side in largest)
    top, left = (heights - height) // 2, (widths - width) // 2
    return Crops(top, left, height, width, np.zeros(len(top), dtype=np.bool_))


def repeated_crops(
    config: AugmentConfig,
    seed: int,
    epochs: Int64,
    sample_ids: Int64,
    heights: Int64,
    widths: Int64,
    crops_per_image: int,
) -> Crops:
    """The boxes of all crops of each sample, [B * crops_per_image], those of a sample side by side."""
    drawn = [draw_crops(config, seed, epochs, sample_ids, heights, widths, number) for number in range(crops_per_image)]
    columns = ([getattr(crops, field.name) for crops in drawn] for field in fields(Crops))
    return Crops(*(np.stack(column, axis=1).reshape(-1) for column in columns))


def repeated_masks(
    config: AugmentConfig, seed: int, epochs: Int64, sample_ids: Int64, crops_per_image: int
) -> tuple[Int64, Int64]:
    """The masks of all crops of each sample, in the order of `repeated_crops`."""
    drawn = [draw_masks(config, seed, epochs, sample_ids, number) for number in range(crops_per_image)]
    kept, masked = (np.stack(ids, axis=1).reshape(-1, ids[0].shape[1]) for ids in zip(*drawn, strict=True))
    return kept, masked


def _stream(purpose: str, number: int) -> str:
    return f"augment/{purpose}/{number}" if number else f"augment/{purpose}"


def _between(draws: npt.NDArray[np.float64], low: float, high: float) -> npt.NDArray[np.float64]:
    return low + draws * (high - low)


def _largest_box(config: AugmentConfig, heights: Int64, widths: Int64) -> tuple[Int64, Int64]:
    """The largest boxes, heights and widths [B], whose ratio is within crop_ratio."""
    low, high = config.crop_ratio
    ratio = widths / heights
    box_h = np.where(ratio < low, np.rint(widths / low), heights).astype(np.int64)
    box_w = np.where(ratio > high, np.rint(heights * high), widths).astype(np.int64)
    return np.clip(box_h, 1, heights), np.clip(box_w, 1, widths)
