"""Augmentation: keyed by (seed, epoch, sample id) and by nothing else; distributed as torchvision's."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pipeline.augment import centre_crops, draw_crops, draw_masks, replacement_ids, uniforms
from pipeline.config import AugmentConfig
from pipeline.hashing import hash64, stream_key

CONFIG = AugmentConfig()


def crops_of(ids, epochs, heights, widths, seed=3, config=CONFIG):
    return draw_crops(config, seed, np.asarray(epochs), np.asarray(ids), np.asarray(heights), np.asarray(widths))


@given(
    st.lists(
        st.tuples(st.integers(0, 2**40), st.integers(0, 2_000), st.integers(1, 3_000), st.integers(1, 3_000)),
        min_size=1,
        max_size=20,
    )
)
@settings(max_examples=100, deadline=None)
def test_a_crop_lies_in_its_image_and_does_not_depend_on_the_batch(rows):
    ids, epochs, heights, widths = map(np.array, zip(*rows, strict=True))
    crops = crops_of(ids, epochs, heights, widths)
    assert (crops.height >= 1).all()
    assert (crops.width >= 1).all()
    assert (crops.top >= 0).all()
    assert (crops.left >= 0).all()
    assert (crops.top + crops.height <= heights).all()
    assert (crops.left + crops.width <= widths).all()
    last = crops_of(ids[-1:], epochs[-1:], heights[-1:], widths[-1:])
    for name in ("top", "left", "height", "width", "flip"):
        assert getattr(last, name)[0] == getattr(crops, name)[-1]


@given(st.integers(0, 2**62), st.integers(0, 1_000), st.integers(0, 10**9), st.sampled_from([0.5, 0.75, 0.9]))
@settings(max_examples=50, deadline=None)
def test_a_mask_is_a_permutation_split_in_two_and_does_not_depend_on_the_batch(seed, epoch, sample_id, ratio):
    config = AugmentConfig(mask_ratio=ratio)
    kept, masked = draw_masks(config, seed, np.array([epoch, epoch + 1]), np.array([sample_id, sample_id]))
    assert kept.shape == (2, int(196 * (1 - ratio)))
    assert np.array_equal(np.sort(np.concatenate([kept, masked], axis=1)), np.tile(np.arange(196), (2, 1)))
    alone, _ = draw_masks(config, seed, np.array([epoch]), np.array([sample_id]))
    assert np.array_equal(alone[0], kept[0])
    assert not np.array_equal(kept[0], kept[1])


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (60, 900)])
def test_crops_are_distributed_as_torchvisions(height, width):
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, list(CONFIG.crop_scale), list(CONFIG.crop_ratio)) for _ in range(4_000)]
    )
    crops = crops_of(np.arange(4_000), np.zeros(4_000, int), np.full(4_000, height), np.full(4_000, width))
    ours = np.stack([crops.top, crops.left, crops.height, crops.width], axis=1)
    for column in range(4):
        assert stats.ks_2samp(theirs[:, column], ours[:, column]).pvalue > 1e-3


def test_flips_and_uniforms_are_fair_and_independent():
    crops = crops_of(np.arange(20_000), np.zeros(20_000, int), np.full(20_000, 300), np.full(20_000, 300))
    assert abs(crops.flip.mean() - 0.5) < 0.015  # 4 sigma
    draws = uniforms(5, "test", np.zeros(20_000, int), np.arange(20_000), 8)
    assert stats.kstest(draws.reshape(-1), "uniform").pvalue > 1e-3
    correlation = np.corrcoef(draws, rowvar=False) - np.eye(8)
    assert np.abs(correlation).max() < 0.03
    # Neighbouring ids, and the same id in neighbouring epochs, share nothing.
    later = uniforms(5, "test", np.ones(20_000, int), np.arange(20_000), 8)
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.03
    assert abs(np.corrcoef(draws[:, 0], later[:, 0])[0, 1]) < 0.03


def test_every_patch_is_kept_equally_often():
    kept, _ = draw_masks(CONFIG, 0, np.zeros(20_000, int), np.arange(20_000))
    counts = np.bincount(kept.reshape(-1), minlength=196)
    # Drawing 49 of 196 without replacement: the usual chi-square over-covers by 1 / (1 - 49/196).
    statistic = ((counts - 5_000) ** 2 / 5_000).sum() / 0.75
    assert stats.chi2.sf(statistic, 195) > 1e-3


def test_replacements_are_fixed_and_inside_the_dataset():
    first = replacement_ids(1, 2, 3, 1_000, 5)
    assert np.array_equal(first[:3], replacement_ids(1, 2, 3, 1_000, 3))
    assert ((first >= 0) & (first < 1_000)).all()
    assert not np.array_equal(first, replacement_ids(1, 3, 3, 1_000, 5))


def test_bits_are_the_same_on_every_machine_and_release():
    """Literals: a change here breaks the resume of every run that exists."""
    assert [int(h) for h in hash64(stream_key(0, "a"), [0, 1], 5)] == [4896173052509877126, 17887584542010754016]
    crops = crops_of([0, 1, 2], [0, 0, 9], [375, 375, 60], [500, 500, 900])
    assert [crops.top.tolist(), crops.left.tolist(), crops.height.tolist(), crops.width.tolist()] == [
        [48, 46, 0],
        [186, 19, 410],
        [280, 322, 60],
        [248, 337, 80],
    ]
    assert crops.flip.tolist() == [False, False, False]


@pytest.mark.parametrize(
    ("image_size", "fraction", "expected"),
    [
        # height, width, top, left of a 512 x 384 and of a 300 x 500 (height x width) image
        ((224, 224), 0.875, [(336, 336, 88, 24), (262, 262, 19, 119)]),
        ((448, 448), 1.0, [(384, 384, 64, 0), (300, 300, 0, 100)]),
        ((32, 64), 1.0, [(192, 384, 160, 0), (250, 500, 25, 0)]),
    ],
)
def test_a_centre_crop_is_the_middle_of_the_image(image_size, fraction, expected):
    config = AugmentConfig(image_size=image_size, patch_size=16)
    heights, widths, zeros = np.array([512, 300]), np.array([384, 500]), np.zeros(2, np.int64)
    crops = centre_crops(config, 3, zeros, zeros, heights, widths, 1, fraction=fraction)
    assert list(zip(crops.height, crops.width, crops.top, crops.left, strict=True)) == expected
    assert not crops.flip.any()
