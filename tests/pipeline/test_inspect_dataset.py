from __future__ import annotations

import io
import json
from pathlib import Path
from statistics import median_high

import numpy as np
import pytest
from PIL import Image

from pipeline.dataset import open_dataset
from pipeline.errors import ShardError
from pipeline.inspect_dataset import draw_grid, inspect_dataset
from pipeline.sources import FolderSource
from pipeline.write import write_dataset


def test_the_numbers_are_those_of_the_files(small_photos: Path, whole_dataset: Path) -> None:
    summary = inspect_dataset(open_dataset(str(whole_dataset)), num_threads=2)
    files = list(small_photos.rglob("*.JPG"))
    sizes = [Image.open(io.BytesIO(path.read_bytes())).size for path in files]
    tars = [path.stat().st_size for path in whole_dataset.glob("*.tar")]
    assert summary.num_samples == len(files)
    assert summary.num_bytes == sum(tars)
    assert (summary.num_shards, summary.shard_bytes.min, summary.shard_bytes.max) == (
        len(tars),
        min(tars),
        max(tars),
    )
    for spread, values in (
        (summary.heights, [height for _, height in sizes]),
        (summary.widths, [width for width, _ in sizes]),
    ):
        assert (spread.min, spread.median, spread.max) == (min(values), median_high(values), max(values))
    lengths = [path.stat().st_size for path in files]
    assert (summary.image_bytes.min, summary.image_bytes.max) == (min(lengths), max(lengths))
    assert abs(summary.image_bytes.median - median_high(lengths)) < 1024
    assert summary.formats == {"jpg": 28}
    assert (summary.num_classes, summary.num_bad_samples) == (4, 0)
    assert summary.class_samples is not None
    assert (summary.class_samples.min, summary.class_samples.max) == (7, 7)
    assert json.loads(json.dumps(summary.to_dict()))["heights"]["min"] == summary.heights.min


def test_the_smallest_and_the_largest_class_have_names(tmp_path: Path) -> None:
    photo = Image.new("RGB", (8, 8), "red")
    for name, number in (("few", 1), ("many", 3), ("none", 0)):
        (tmp_path / "source" / name).mkdir(parents=True)
        for i in range(number):
            photo.save(tmp_path / "source" / name / f"{i}.png")
    (tmp_path / "source" / "none" / "bad.png").write_bytes(b"")
    write_dataset(FolderSource(str(tmp_path / "source")), str(tmp_path / "dataset"), max_bad=1)
    summary = inspect_dataset(open_dataset(str(tmp_path / "dataset")))
    assert (summary.smallest_class, summary.largest_class) == ("none", "many")
    assert summary.class_samples is not None
    assert (summary.class_samples.min, summary.class_samples.median, summary.class_samples.max) == (0, 1, 3)
    assert (summary.formats, summary.num_bad_samples) == ({"png": 4}, 1)


def test_a_grid_shows_samples_and_depends_on_the_seed_only(whole_dataset: Path) -> None:
    dataset = open_dataset(str(whole_dataset))
    grid = draw_grid(dataset, 9, seed=1)
    assert grid.width == 3 * 160
    pixels = np.asarray(grid).astype(float)
    assert pixels.std() > 20
    for row in range(3):
        for column in range(3):
            cell = pixels[row * 176 : row * 176 + 160, column * 160 : column * 160 + 160]
            assert cell.std() > 5
    np.testing.assert_array_equal(np.asarray(draw_grid(dataset, 9, seed=1)), np.asarray(grid))
    assert not np.array_equal(np.asarray(draw_grid(dataset, 9, seed=2)), np.asarray(grid))
    assert draw_grid(dataset, 1000).width == 6 * 160  # no more than there are


@pytest.mark.parametrize("content", [None, b"v1.2 0\n"])
def test_a_missing_or_damaged_idx_is_an_error_with_a_remedy(dataset_folder: Path, content: bytes | None) -> None:
    path = dataset_folder / "shard-000001.idx"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ShardError, match=r"shard-000001\.idx .*tarmac verify"):
        inspect_dataset(open_dataset(str(dataset_folder)))


def test_no_samples_and_no_threads_are_refused(whole_dataset: Path) -> None:
    dataset = open_dataset(str(whole_dataset))
    with pytest.raises(ValueError, match=r"num_samples \(0\) must be at least 1"):
        draw_grid(dataset, 0)
    with pytest.raises(ValueError, match=r"num_threads \(0\) must be at least 1"):
        inspect_dataset(dataset, num_threads=0)
