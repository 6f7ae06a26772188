"""Repeated augmentation: each sample is read and decoded once, and trained on as so many images."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import AugmentConfig, Batch, DataConfig, Loader, open_dataset
from pipeline.augment import draw_crops
from pipeline.config import check_world
from pipeline.decode import Decoder, mixed_pipeline

ONE = DataConfig(
    global_batch_size=6,
    num_lanes=3,
    shuffle_window_samples=4,
    augment=AugmentConfig(image_size=(32, 48), patch_size=8),
    num_decode_threads=1,
    max_bad_samples=0,
)
THREE = replace(ONE, global_batch_size=18, crops_per_image=3)
NUM_SAMPLES = 28


def load(url: Path, config: DataConfig, num_batches: int, rank: int = 0, world_size: int = 1) -> list[Batch]:
    with Loader(open_dataset(str(url)), config, dp_rank=rank, dp_world_size=world_size) as loader:
        return [next(loader) for _ in range(num_batches)]


def test_the_first_crops_are_those_of_a_run_without_repeats(whole_dataset: Path) -> None:
    for one, three in zip(load(whole_dataset, ONE, 6), load(whole_dataset, THREE, 6), strict=True):
        assert len(three.images) == 18
        assert torch.equal(three.images[::3], one.images)
        assert torch.equal(three.kept_ids[::3], one.kept_ids)
        assert torch.equal(three.masked_ids[::3], one.masked_ids)
        assert torch.equal(three.sample_ids.view(6, 3), one.sample_ids[:, None].expand(6, 3))
        assert torch.equal(three.labels.view(6, 3), one.labels[:, None].expand(6, 3))


def test_every_crop_is_another_one_and_its_pixels_are_those_of_its_own_box(whole_dataset: Path) -> None:
    dataset = open_dataset(str(whole_dataset))
    (batch,) = load(whole_dataset, THREE, 1)
    alone = Decoder(THREE.augment, device="cpu", num_threads=1)
    for row, sample_id in enumerate(batch.sample_ids.tolist()):
        shard, place = (int(value) for value in dataset.locate(sample_id))
        index = dataset.index(shard)
        numbers = (0, sample_id, int(index.height[place]), int(index.width[place]))
        box = draw_crops(THREE.augment, THREE.seed, *(np.array([number]) for number in numbers), row % 3)
        assert torch.equal(alone.decode([dataset.sample_bytes(sample_id)], box)[0], batch.images[row])
    alone.close()
    for first in range(0, 18, 3):
        images, masks = batch.images[first : first + 3], batch.masked_ids[first : first + 3]
        assert not torch.equal(images[0], images[1])
        assert not torch.equal(images[1], images[2])
        assert len({tuple(ids) for ids in masks.tolist()}) == 3


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_and_micro_batches_share_the_same_images(whole_dataset: Path, world_size: int) -> None:
    (whole,) = load(whole_dataset, THREE, 1)
    config = replace(THREE, micro_batch_size=6)
    expected = {(int(i), tuple(kept.tolist())): image for i, kept, image in _rows([whole])}
    found = {}
    for rank in range(world_size):
        num = {2: 2, 3: 1}[world_size]
        batches = load(whole_dataset, config, num, rank, world_size)
        assert all(len(batch.images) % 3 == 0 and 3 <= len(batch.images) <= 6 for batch in batches)
        found |= {(int(i), tuple(kept.tolist())): image for i, kept, image in _rows(batches)}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], image) for key, image in expected.items())


def _rows(batches: list[Batch]) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    return [row for batch in batches for row in zip(batch.sample_ids, batch.kept_ids, batch.images, strict=True)]


def test_a_pass_over_the_data_has_each_sample_as_often_as_it_is_cropped(whole_dataset: Path) -> None:
    config = replace(THREE, global_batch_size=21, num_lanes=7)
    seen = Counter(i for batch in load(whole_dataset, config, NUM_SAMPLES // 7) for i in batch.sample_ids.tolist())
    assert seen == dict.fromkeys(range(NUM_SAMPLES), 3)


def test_a_sample_that_cannot_be_decoded_is_replaced_in_all_its_crops(dataset_folder: Path) -> None:
    dataset = open_dataset(str(dataset_folder))
    (whole,) = load(dataset_folder, THREE, 1)
    bad = int(whole.sample_ids[3])
    shard, row = dataset.locate(bad)
    index, info = dataset.index(shard), dataset.manifest.shards[shard]
    tar = dataset_folder / f"{info.name}.tar"
    data = bytearray(tar.read_bytes())
    at = int(index.offset[row])
    data[at + 100] ^= 255
    tar.write_bytes(bytes(data))
    (batch,) = load(dataset_folder, replace(THREE, max_bad_samples=1), 1)
    (report,) = batch.quarantined
    assert report.sample_id == bad
    assert len(set(batch.sample_ids[3:6].tolist())) == 1
    assert bad not in batch.sample_ids.tolist()
    others = [row for row in range(18) if not 3 <= row < 6]
    assert torch.equal(batch.images[others], whole.images[others])


def test_the_gpus_graph_has_an_output_a_crop() -> None:
    text = mixed_pipeline(None, num_threads=1, max_batch_size=2, image_size=(32, 32), crops_per_image=3).serialize()
    assert text.count(b"start") >= 3
    assert all(f"{name}{number}".encode() in text for name in ("start", "shape", "flip") for number in range(3))


def test_numbers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"crops_per_image \(0\) must be at least 1"):
        replace(ONE, crops_per_image=0)
    with pytest.raises(ValueError, match=r"global_batch_size \(6\) must be divisible by .*lanes \(3\) times .*use 12"):
        replace(ONE, crops_per_image=4)
    with pytest.raises(ValueError, match=r"micro_batch_size \(4\) must be divisible by data.crops_per_image \(3\)"):
        replace(THREE, micro_batch_size=4)
    with pytest.raises(ValueError, match=r"needs 2 micro-batches on a rank that has 1 samples.*use 6 or more"):
        check_world(replace(THREE, global_batch_size=9, num_lanes=3, micro_batch_size=3), 2)
