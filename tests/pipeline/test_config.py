from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest

from pipeline.config import AugmentConfig, DataConfig, check_world
from pipeline.order import Order, num_micro_steps


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("image_size", 224, "augment.image_size (224) must be a tuple of 2 integers; use (224, 224)"),
        ("image_size", (224,), "must be a tuple of 2 integers"),
        ("image_size", (224.0, 224.0), "must be a tuple of 2 integers"),
        ("image_size", [224, 224], "([224, 224]) must be a tuple of 2 integers; use (224, 224)"),
        ("image_size", (224, 220), "must be multiples of augment.patch_size (16)"),
        ("patch_size", 16.0, "augment.patch_size (16.0) must be an integer; use 16"),
        ("mask_ratio", math.nan, "augment.mask_ratio (nan) must be a finite number; use 0.75"),
        ("mask_ratio", "0.75", "augment.mask_ratio ('0.75') must be a finite number"),
        ("mask_ratio", 1.5, "must keep at least one of 196 patches"),
        ("crop_scale", 0.5, "augment.crop_scale (0.5) must be a tuple of 2 finite numbers; use (0.2, 1.0)"),
        ("crop_scale", (0.2, math.nan), "must be a tuple of 2 finite numbers"),
        ("crop_scale", (0.2, 1.5), "must be 0 < low <= high <= 1"),
        ("crop_ratio", (0.75,), "augment.crop_ratio ((0.75,)) must be a tuple of 2 finite numbers"),
        ("crop_ratio", (1.0, math.inf), "must be a tuple of 2 finite numbers"),
        ("flip_probability", True, "augment.flip_probability (True) must be a finite number; use 0.5"),
        ("mean", (0.5,), "augment.mean ((0.5,)) must be a tuple of 3 finite numbers; use (0.485, 0.456, 0.406)"),
        ("std", (0.2, 0.2, "0.2"), "must be a tuple of 3 finite numbers; use (0.229, 0.224, 0.225)"),
        ("std", (0.2, 0.2, 0), "must be positive"),
    ],
)
def test_wrong_augmentation_says_what_and_what_to_use(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        AugmentConfig(**{field: value})


def test_whole_numbers_will_do_for_fractions() -> None:
    assert AugmentConfig(mean=(0, 0, 0), std=(1, 1, 1), flip_probability=0).std == (1, 1, 1)


CONFIGS = [
    DataConfig(global_batch_size=lanes * a_lane, num_lanes=lanes, micro_batch_size=micro)
    for lanes in range(1, 9)
    for a_lane in (1, 2, 3)
    for micro in (None, 1, 2, 3, 5)
]


def test_a_world_is_refused_if_a_rank_would_have_an_empty_micro_batch_and_only_then() -> None:
    refused = 0
    for config in CONFIGS:
        order = Order(np.array([100]), config)
        for world_size in range(1, config.num_lanes + 1):
            smallest = min(len(order.rank_positions(0, rank, world_size)) for rank in range(world_size))
            if num_micro_steps(config, world_size) <= smallest:
                check_world(config, world_size)
                continue
            refused += 1
            with pytest.raises(ValueError, match=r"data\.micro_batch_size \(1\) needs .* use 2 or more"):
                check_world(config, world_size)
    assert refused > 0


@pytest.mark.parametrize(
    ("world_size", "rule"), [(0, "at least 1"), (5, r"at most data\.num_lanes \(4\); use more lanes")]
)
def test_a_world_of_the_wrong_size_is_named_as_the_caller_does(world_size: int, rule: str) -> None:
    config = DataConfig(global_batch_size=8, num_lanes=4)
    with pytest.raises(ValueError, match=rf"num_workers \({world_size}\) must be {rule}"):
        check_world(config, world_size)
    with pytest.raises(ValueError, match=rf"dp_world_size \({world_size}\) must be {rule}"):
        check_world(config, world_size, "dp_world_size")
