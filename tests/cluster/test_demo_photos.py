"""The demo's photographs: real JPEGs, of every class, different from each other, the same every time."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from PIL import Image

from cluster.demo_photos import PHOTOGRAPHS, crop_box, plan_crops, write_demo_photos


def digests(folder: Path) -> dict[str, str]:
    files = sorted(folder.rglob("*.jpg"))
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    assert list(write_demo_photos(folder, num_photos=68))[-1] == 68
    return folder


def test_every_class_gets_jpegs_of_imagenet_size(folder: Path) -> None:
    files = sorted(folder.rglob("*.*"))
    assert len(files) == 68
    assert {file.parent.name for file in files} == set(PHOTOGRAPHS)
    for file in files:
        with Image.open(file) as image:
            image.load()
            assert image.format == "JPEG"
            assert max(image.size) == 500
            assert min(image.size) >= 333
            assert image.convert("L").getextrema()[0] != image.convert("L").getextrema()[1]


def test_all_files_differ_and_come_out_the_same_again(folder: Path, tmp_path: Path) -> None:
    first = digests(folder)
    assert len(set(first.values())) == 68
    assert list(write_demo_photos(tmp_path, num_photos=68, num_processes=1))[-1] == 68
    assert digests(tmp_path) == first


@pytest.mark.parametrize("num_photos", [17, 100, 2000, 2003])
def test_plan_has_exactly_the_number_asked_for_and_no_name_twice(num_photos: int, tmp_path: Path) -> None:
    names = [(job.folder, job.first + i) for job in plan_crops(tmp_path, num_photos) for i in range(job.num)]
    assert len(names) == len(set(names)) == num_photos


def test_too_few_photos_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"num_photos \(3\) must be at least the 17 source photographs"):
        plan_crops(tmp_path, 3)


def test_crops_stay_inside_the_photograph_and_keep_the_ratio() -> None:
    boxes = {crop_box(i, (451, 300), (500, 375)) for i in range(500)}
    assert len(boxes) == 500
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= 451
        assert 0 <= top < bottom <= 300
        assert (right - left) / (bottom - top) == pytest.approx(4 / 3)
