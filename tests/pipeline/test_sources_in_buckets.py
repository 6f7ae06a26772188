"""Sources on S3 servers become, on the same server, what they become on a local disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tars import samples, write_tar

from pipeline.dataset import open_dataset
from pipeline.sources import open_source
from pipeline.store import Store
from pipeline.verify import verify_dataset
from pipeline.write import write_dataset

Files = Callable[[Path], dict[str, bytes]]
Make = Callable[[Path, list[Path]], tuple[str, dict[str, str]]]
"""Makes a source in a folder; its path there, and the options that are files."""

SHARD_BYTES = 200_000
LABELS = [number % 3 for number in range(40)]
NAMES = ["zebra", "ant", "cat"]


def flat_folder(folder: Path, photos: list[Path]) -> tuple[str, dict[str, str]]:
    for photo in photos:
        (folder / photo.name).write_bytes(photo.read_bytes())
    return "", {}


def webdataset_tars(folder: Path, photos: list[Path]) -> tuple[str, dict[str, str]]:
    for number in range(4):
        part = slice(number * 10, number * 10 + 10)
        write_tar(folder / f"train-{number}.tar", samples(photos[part], [str(label) for label in LABELS[part]]))
    (folder / "classes.txt").write_text("\n".join(NAMES))
    return "", {"classes": "classes.txt"}


def validation_tar(folder: Path, photos: list[Path]) -> tuple[str, dict[str, str]]:
    members = [(f"ILSVRC2012_val_{at + 1:08d}.JPEG", photo.read_bytes()) for at, photo in enumerate(photos)]
    write_tar(folder / "ILSVRC2012_img_val.tar", members[::-1])
    (folder / "truth.txt").write_text("".join(f"{label + 1}\n" for label in LABELS))
    (folder / "synsets.txt").write_text("\n".join(NAMES))
    return "ILSVRC2012_img_val.tar", {"labels": "truth.txt", "classes": "synsets.txt"}


MAKE: dict[str, Make] = {
    "flat folder": flat_folder,
    "WebDataset tars": webdataset_tars,
    "ImageNet's validation tar": validation_tar,
}


@pytest.mark.parametrize("kind", MAKE)
def test_a_source_in_a_bucket(bucket: str, photos: list[Path], tmp_path: Path, read_files: Files, kind: str) -> None:
    here = tmp_path / "in"
    here.mkdir()
    path, options = MAKE[kind](here, photos)
    there = Store(f"{bucket}/in")
    for name, content in read_files(here).items():
        there.write(name, content)

    def write(base: str, target: str) -> None:
        files = {option: f"{base}/{name}" for option, name in options.items()}
        write_dataset(open_source(f"{base}/{path}".rstrip("/"), **files), target, shard_bytes=SHARD_BYTES)

    write(there.url, f"{bucket}/out")
    write(str(here), str(tmp_path / "out"))
    found = Store(f"{bucket}/out")
    assert {entry.path: found.read(entry.path) for entry in found.list()} == read_files(tmp_path / "out")
    assert verify_dataset(found, deep=True) == []
    dataset = open_dataset(found.url)
    labels = {photo.read_bytes(): NAMES[label] for photo, label in zip(photos, LABELS, strict=True)}
    for sample_id in range(dataset.num_samples):
        (shard,), (row,) = dataset.locate([sample_id])
        label = int(dataset.index(int(shard)).label[int(row)])
        image = dataset.sample_bytes(sample_id)
        if kind == "flat folder":
            assert label == -1
            assert image in labels
        else:
            assert dataset.classes is not None
            assert dataset.classes[label] == labels[image]
    assert dataset.num_samples == len(photos)
