"""What a classifier learns from: each operation against timm's, each draw against its world size."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data.auto_augment
import torch
from PIL import Image
from tiny_evaluations import ALL_ON, make_dataset, tiny_finetune, tiny_linear

from pipeline import Dataset, Loader, open_dataset
from trainer.evaluate.augment import OPERATIONS, draw_operations, draw_rectangle, erase, keyed_generator
from trainer.evaluate.batches import ClassifierBatch, ClassifierBatches, branch_scales
from trainer.evaluate.config import EvaluateConfig, RegularizeConfig
from trainer.evaluate.mix import draw_box, mix_group, smooth_labels

THEIR_NAMES = {
    **{"Posterize": "PosterizeIncreasing", "Solarize": "SolarizeIncreasing"},
    **{name: f"{name}Increasing" for name in ("Color", "Contrast", "Brightness", "Sharpness")},
    **{"TranslateX": "TranslateXRel", "TranslateY": "TranslateYRel"},
}
FILL = (124, 116, 104)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_timms(name: str, photos: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.open(photos[0]).convert("RGB").resize((48, 32))
    for magnitude in (1.5, 9.0, 9.9):
        operation = timm.data.auto_augment.AugmentOp(
            THEIR_NAMES.get(name, name),
            prob=1.0,
            magnitude=magnitude,
            hparams={"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC},
        )
        for sign, draw in ((1, 0.1), (-1, 0.9)):  # timm turns round what it draws above a half
            monkeypatch.setattr(timm.data.auto_augment.random, "random", lambda draw=draw: draw)
            expected = np.asarray(operation(image))
            found = np.asarray(OPERATIONS[name](image, sign * magnitude / 10, FILL))
            np.testing.assert_array_equal(found, expected)
    assert OPERATIONS[name](image, 1.0, FILL).size == image.size  # of the strongest, Pillow refuses timm's Posterize


def test_the_operations_are_all_of_timms() -> None:
    theirs = timm.data.auto_augment._RAND_INCREASING_TRANSFORMS
    assert [THEIR_NAMES.get(name, name) for name in OPERATIONS] == theirs


def test_operations_are_drawn_as_the_paper_has_it() -> None:
    drawn = [draw_operations(keyed_generator(0, "test", number), 9.0, 0.5) for number in range(4000)]
    assert np.mean([len(operations) for operations in drawn]) == pytest.approx(1.0, abs=0.05)  # two, half the time
    strengths = np.array([strength for operations in drawn for _, strength in operations])
    assert np.mean(strengths > 0) == pytest.approx(0.5, abs=0.03)
    assert np.abs(strengths).max() == 1.0  # cut off at 10
    assert np.median(np.abs(strengths)) == pytest.approx(0.9, abs=0.005)
    counts = np.unique([name for operations in drawn for name, _ in operations], return_counts=True)[1]
    assert len(counts) == 15
    assert counts.min() > 0.75 * counts.mean()


def test_erasing_puts_noise_into_one_rectangle() -> None:
    areas, ratios = [], []
    for number in range(500):
        rows, columns = draw_rectangle(keyed_generator(1, "test", number), 100, 100) or (slice(0), slice(0))
        assert 0 <= rows.start < rows.stop <= 100
        assert 0 <= columns.start < columns.stop <= 100
        areas.append((rows.stop - rows.start) * (columns.stop - columns.start) / 1e4)
        ratios.append((rows.stop - rows.start) / (columns.stop - columns.start))
    assert 0.018 < min(areas) < 0.04
    assert 0.3 < max(areas) < 0.345
    assert 0.25 < min(ratios) < 0.4
    assert 2.5 < max(ratios) < 4
    changed = 0
    for number in range(400):
        pixels = np.full((3, 40, 40), 7.0, np.float32)
        erase(pixels, keyed_generator(2, "test", number), 0.25)
        erased = (pixels != 7).all(axis=0)
        changed += bool(erased.any())
        rows, columns = np.flatnonzero(erased.any(axis=1)), np.flatnonzero(erased.any(axis=0))
        assert erased.sum() == len(rows) * len(columns)
        if erased.sum() > 200:
            assert abs(pixels[:, erased].mean()) < 0.2
            assert pixels[:, erased].std() == pytest.approx(1, abs=0.15)
    assert changed / 400 == pytest.approx(0.25, abs=0.06)


@pytest.mark.parametrize(
    "regularize",
    [RegularizeConfig(mixup_alpha=0.8), RegularizeConfig(cutmix_alpha=1.0), ALL_ON],
    ids=["mixup", "cutmix", "both"],
)
def test_a_target_says_what_is_in_its_image(regularize: RegularizeConfig) -> None:
    kinds = set()
    for step in range(20):
        images = torch.arange(6.0)[:, None, None, None].expand(6, 3, 20, 30).clone()
        targets = torch.eye(6)
        mix_group(regularize, images, targets, seed=0, step=step, lane=3)
        assert torch.allclose(targets.sum(dim=1), torch.ones(6))
        partners = []
        for number in range(6):
            share = float(targets[number, number])
            others = [other for other in range(6) if other != number and targets[number, other] > 0]
            assert len(others) <= 1
            partners += others
            values = images[number].unique().tolist()
            if share == 1:
                assert values == [number]
            elif set(values) <= set(range(6)) and len(values) <= 2:  # cut
                kinds.add("cutmix")
                assert float((images[number, 0] == number).float().mean()) == pytest.approx(share, abs=1e-6)
            else:
                kinds.add("mixup")
                assert values == pytest.approx([share * number + (1 - share) * others[0]], rel=1e-5)
        assert len(partners) == len(set(partners))
    expected = {"mixup", "cutmix"} if regularize is ALL_ON else {"mixup" if regularize.mixup_alpha else "cutmix"}
    assert kinds == expected


def test_boxes_leave_the_share_that_they_are_for() -> None:
    shares = []
    for number in range(300):
        rows, columns = draw_box(keyed_generator(0, "test", number), 0.75, 40, 60)
        assert 0 <= rows.start <= rows.stop <= 40
        assert 0 <= columns.start <= columns.stop <= 60
        shares.append(1 - (rows.stop - rows.start) * (columns.stop - columns.start) / 2400)
    assert min(shares) == 0.75  # 20 x 30 pixels, where the border cuts nothing off
    assert max(shares) > 0.85


def test_labels_are_smoothed_by_the_published_rule() -> None:
    found = smooth_labels(torch.tensor([2, 0]), 4, 0.1)
    torch.testing.assert_close(found, torch.tensor([[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]]))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_dataset(make_dataset(tmp_path_factory.mktemp("batches"), 14, seed=3, size=24))


def drawn(
    config: EvaluateConfig, dataset: Dataset, world_size: int, *, start: int = 0, num_threads: int = 1
) -> dict[tuple[int, int, int], tuple[torch.Tensor, ...]]:
    """Image, target and drop path of steps 3 and 4, by step, sample and crop, of all ranks."""
    found: dict[tuple[int, int, int], tuple[torch.Tensor, ...]] = {}
    for rank in range(world_size):
        with (
            Loader(dataset, config.data, dp_rank=rank, dp_world_size=world_size, start_step=start) as loader,
            ClassifierBatches(
                config,
                loader,
                dataset.samples_per_shard,
                rank=rank,
                world_size=world_size,
                num_threads=num_threads,
            ) as batches,
        ):
            for batch in batches:
                if batch.step > 4:
                    break
                if batch.step >= 3:
                    _collect(found, batch)
    return found


def _collect(found: dict[tuple[int, int, int], tuple[torch.Tensor, ...]], batch: ClassifierBatch) -> None:
    scales = batch.branch_scales if batch.branch_scales is not None else torch.zeros(len(batch.images), 0)
    for row, sample_id in enumerate(batch.sample_ids.tolist()):
        number = sum(key[:2] == (batch.step, sample_id) for key in found)
        found[batch.step, sample_id, number] = (batch.images[row], batch.targets[row], scales[row])


@pytest.mark.parametrize(
    "config",
    [tiny_finetune(), tiny_finetune(crops_per_image=2), tiny_linear()],
    ids=["finetune", "repeated", "linear"],
)
def test_what_a_step_trains_on_does_not_depend_on_how_it_is_shared_out(
    dataset: Dataset, config: EvaluateConfig
) -> None:
    expected = drawn(config, dataset, 1)
    assert len(expected) == 32
    small = dataclasses.replace(config, data=dataclasses.replace(config.data, micro_batch_size=4))
    others: dict[str, Any] = {
        "two ranks": drawn(config, dataset, 2),
        "three ranks": drawn(config, dataset, 3),
        "small micro-batches, threads": drawn(small, dataset, 2, num_threads=3),
        "resumed": drawn(config, dataset, 1, start=3),
    }
    for how, found in others.items():
        assert found.keys() == expected.keys(), how
        for key, tensors in expected.items():
            assert all(torch.equal(*pair) for pair in zip(tensors, found[key], strict=True)), (how, key)
    other_seed = dataclasses.replace(config, data=dataclasses.replace(config.data, seed=1))
    assert drawn(other_seed, dataset, 1).keys() != expected.keys()


def test_a_probe_gets_its_whole_share_at_once_and_fine_tuning_in_parts(dataset: Dataset) -> None:
    shapes = {}
    for config in (tiny_finetune(micro_batch_size=6), tiny_linear(micro_batch_size=6)):
        with (
            Loader(dataset, config.data) as loader,
            ClassifierBatches(config, loader, dataset.samples_per_shard, rank=0, world_size=1) as batches,
        ):
            step = [next(batches) for _ in range(1 if config.model.frozen_encoder else 3)]
        assert {batch.step for batch in step} == {0}
        shapes[config.model.frozen_encoder] = [
            (len(batch.images), batch.micro_step, batch.num_micro_steps, batch.num_parts, str(batch.images.dtype))
            for batch in step
        ]
    sizes = [(6, 0), (5, 1), (5, 2)]
    assert shapes[False] == [(size, number, 3, 1, "torch.float32") for size, number in sizes]
    assert shapes[True] == [(16, 0, 1, 3, "torch.uint8")]


def test_drop_path_rises_linearly_and_keeps_the_mean() -> None:
    config = tiny_finetune()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, depth=4))
    ids = np.arange(20000)
    scales = branch_scales(config, ids * 0, ids, ids * 0)
    assert scales is not None
    assert scales.shape == (20000, 4, 2)
    assert (scales[:, 0] == 1).all()
    for block, rate in ((1, 0.1), (2, 0.2), (3, 0.3)):
        assert float((scales[:, block] == 0).float().mean()) == pytest.approx(rate, abs=0.01)
        assert float(scales[:, block].max()) == pytest.approx(1 / (1 - rate))
        both = float(((scales[:, block] == 0).all(dim=1)).float().mean())
        assert both == pytest.approx(rate**2, abs=0.01)  # attention and MLP each for itself


def test_an_error_of_the_loader_reaches_the_model() -> None:
    def broken() -> Any:
        raise OSError("the shard is gone")
        yield

    config = tiny_finetune()
    with (
        ClassifierBatches(config, broken(), np.array([40]), rank=0, world_size=1) as batches,
        pytest.raises(OSError, match="the shard is gone"),
    ):
        next(batches)
