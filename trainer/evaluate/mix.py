"""Mixup and CutMix among images that always come to the same rank, and the labels that go with them."""

from __future__ import annotations

import math

import numpy as np
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trainer.evaluate.augment import keyed_generator
from trainer.evaluate.config import RegularizeConfig

_CUTMIX_PROBABILITY = 0.5


def smooth_labels(labels: Int[Tensor, " B"], num_classes: int, smoothing: float) -> Float[Tensor, "B C"]:
    """One-hot labels with a share `smoothing` of each spread evenly over all classes (Szegedy et al. 2016)."""
    return F.one_hot(labels, num_classes).float() * (1 - smoothing) + smoothing / num_classes


def mix_group(
    config: RegularizeConfig,
    images: Float[Tensor, "B C H W"],
    targets: Float[Tensor, "B K"],
    *,
    seed: int,
    step: int,
    lane: int,
) -> None:
    """Mix each image of a step's lane with another one of it, in place, and its target likewise.

    A lane is never split over ranks, so what is mixed with what, and how, is the same at every world size.

    Args:
        config: the two distributions; at least one is on.
        images: of one lane in one step, in their order.
        targets: theirs.
        seed: data.seed.
        step: updates completed before.
        lane: whose images these are.

    Source:
        Zhang et al. 2018, "mixup"; Yun et al. 2019, "CutMix". One share and one box a group, as in batches elsewhere.
    """
    num = len(images)
    if num < 2:
        return
    generator = keyed_generator(seed, "evaluate/mix", step, lane)
    shift = int(generator.integers(1, num))  # a cyclic shift: nobody is its own partner, and each is one partner
    cut = config.cutmix_alpha > 0 and (config.mixup_alpha == 0 or generator.random() < _CUTMIX_PROBABILITY)
    alpha = config.cutmix_alpha if cut else config.mixup_alpha
    share = float(generator.beta(alpha, alpha))
    partners = images.roll(shift, dims=0)
    if cut:
        rows, columns = draw_box(generator, share, *images.shape[2:])
        images[:, :, rows, columns] = partners[:, :, rows, columns]
        box = (rows.stop - rows.start) * (columns.stop - columns.start)
        share = 1 - box / (images.shape[2] * images.shape[3])  # what the border cut off is not there
    else:
        images.mul_(share).add_(partners, alpha=1 - share)
    targets.copy_(targets * share + targets.roll(shift, dims=0) * (1 - share))


def draw_box(generator: np.random.Generator, share: float, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of a box around a random centre that would leave `share` of the image, cut at its border."""
    side = math.sqrt(1 - share)
    centre_y, centre_x = int(generator.integers(height)), int(generator.integers(width))
    rows, columns = (
        slice(max(centre - length // 2, 0), min(centre + (length + 1) // 2, whole))
        for centre, length, whole in (
            (centre_y, int(height * side), height),
            (centre_x, int(width * side), width),
        )
    )
    return rows, columns
