"""ImageNet as it is handed out: a tar of class tars, and a flat validation tar with its ground truth."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from tars import write_tar

from pipeline.errors import SourceError
from pipeline.listing import Listing
from pipeline.sources import FolderSource, open_source
from pipeline.store import Store
from pipeline.write import write_dataset

SYNSETS = ("n01440764", "n02119789", "n02123045", "n03792782", "n04550184", "n07920052", "n09229709", "n11939491")


def train_tar(path: Path, photos: list[Path]) -> dict[bytes, str]:
    """`n01440764.tar` and so on, each with five photographs, in a tar. What it holds: image -> class."""
    inner = []
    for number, synset in enumerate(SYNSETS):
        part = photos[number * 5 : number * 5 + 5]
        members = [(f"{synset}_{i}.JPEG", photo.read_bytes()) for i, photo in enumerate(part)]
        inner.append((f"{synset}.tar", write_tar(path.parent / "inner" / f"{synset}.tar", members).read_bytes()))
    write_tar(path, inner[::-1])  # the official one is not sorted either
    return {photo.read_bytes(): SYNSETS[number // 5] for number, photo in enumerate(photos)}


def val_tar(path: Path, photos: list[Path]) -> Path:
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, len(photos) + 1)]
    members = list(zip(names, (photo.read_bytes() for photo in photos), strict=True))
    return write_tar(path, members[::-1])


def contents(location: str, **options: str) -> dict[bytes, str]:
    source = pickle.loads(pickle.dumps(open_source(location, **options)))
    listing: Listing = source.scan()
    assert listing.classes is not None
    return {source.read(ref): listing.classes[ref.label] for ref in listing.refs}


@pytest.mark.parametrize("where", ["local", "memory"])
def test_the_training_tar_is_read_through_both_levels(photos: list[Path], tmp_path: Path, where: str) -> None:
    expected = train_tar(tmp_path / "ILSVRC2012_img_train.tar", photos)
    url = str(tmp_path) if where == "local" else "memory://imagenet-train"
    if where == "memory":
        tar = (tmp_path / "ILSVRC2012_img_train.tar").read_bytes()
        Store(url).write("ILSVRC2012_img_train.tar", tar)
    assert contents(f"{url}/ILSVRC2012_img_train.tar") == expected
    assert open_source(f"{url}/ILSVRC2012_img_train.tar").scan().classes == SYNSETS


@pytest.mark.servers
def test_from_a_bucket_it_becomes_what_the_unpacked_folder_becomes(
    bucket: str, photos: list[Path], tmp_path: Path
) -> None:
    train_tar(tmp_path / "train.tar", photos)
    Store(bucket).write("train.tar", (tmp_path / "train.tar").read_bytes())
    manifest = write_dataset(open_source(f"{bucket}/train.tar"), f"{bucket}/dataset", num_workers=2, shard_bytes=10**5)
    for number, photo in enumerate(photos):
        folder = tmp_path / "unpacked" / SYNSETS[number // 5]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{folder.name}_{number % 5}.JPEG").write_bytes(photo.read_bytes())
    folder_source = FolderSource(str(tmp_path / "unpacked"))
    assert write_dataset(folder_source, str(tmp_path / "dataset"), shard_bytes=10**5) == manifest


def test_a_damaged_class_tar_is_an_error(photos: list[Path], tmp_path: Path) -> None:
    inner = bytearray(write_tar(tmp_path / "x.tar", [("a.JPEG", b"x" * 600), ("b.JPEG", b"x")]).read_bytes())
    inner[512 + 1024 + 5] ^= 255
    tar = write_tar(tmp_path / "train.tar", [("n01440764.tar", bytes(inner))])
    with pytest.raises(SourceError, match=r"train\.tar is not a whole.*bad header, after 1 files, in the tar at byte"):
        open_source(str(tar)).scan()


def test_images_beside_class_tars_are_unclear(photos: list[Path], tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "train.tar", [("a.jpg", b"x"), ("n01440764.tar", bytes(10240))])
    with pytest.raises(SourceError, match=r"both images \(a\.jpg\) and tars \(n01440764\.tar\)"):
        open_source(str(tar)).scan()


def labels_file(tmp_path: Path, lines: list[str]) -> str:
    (tmp_path / "labels.txt").write_text("\n".join(lines) + "\n")
    return str(tmp_path / "labels.txt")


def test_the_validation_tar_with_the_kit_s_ids(photos: list[Path], tmp_path: Path) -> None:
    tar = str(val_tar(tmp_path / "ILSVRC2012_img_val.tar", photos))
    ids = [number * 3 % 8 + 1 for number in range(40)]
    labels = labels_file(tmp_path, [str(i) for i in ids])
    listing = open_source(tar, labels=labels).scan()
    assert [ref.label for ref in listing.refs] == [i - 1 for i in ids]
    assert listing.classes == ("1", "2", "3", "4", "5", "6", "7", "8")
    # The kit numbers the classes in its own order; with the names, labels are those of the training set.
    kit = [*SYNSETS[3:], *SYNSETS[:3]]
    (tmp_path / "synsets.txt").write_text("\n".join(kit))
    named = {"labels": labels, "classes": str(tmp_path / "synsets.txt")}
    assert contents(tar, **named) == {photo.read_bytes(): kit[i - 1] for photo, i in zip(photos, ids, strict=True)}
    assert open_source(tar, **named).scan().classes == SYNSETS


@pytest.mark.parametrize("separator", [" ", ",", "\t"])
def test_the_validation_tar_with_names_and_labels(photos: list[Path], tmp_path: Path, separator: str) -> None:
    tar = str(val_tar(tmp_path / "val.tar", photos))
    found = [number * 3 % 8 for number in range(40)]
    lines = [f"val/ILSVRC2012_val_{n + 1:08d}.JPEG{separator}{label}" for n, label in enumerate(found)]
    listing = open_source(tar, labels=labels_file(tmp_path, lines[::-1])).scan()
    assert [ref.label for ref in listing.refs] == found
    lines = [f"ILSVRC2012_val_{n + 1:08d}{separator}{SYNSETS[label]}" for n, label in enumerate(found)]
    expected = {photo.read_bytes(): SYNSETS[label] for photo, label in zip(photos, found, strict=True)}
    assert contents(tar, labels=labels_file(tmp_path, lines)) == expected


def test_a_synset_a_line(photos: list[Path], tmp_path: Path) -> None:
    tar = str(val_tar(tmp_path / "val.tar", photos))
    lines = [SYNSETS[number * 3 % 8] for number in range(40)]
    expected = {photo.read_bytes(): line for photo, line in zip(photos, lines, strict=True)}
    assert contents(tar, labels=labels_file(tmp_path, lines)) == expected


@pytest.mark.parametrize(
    ("lines", "classes", "message"),
    [
        (["1", "2"], None, r"has 2 labels for 3 images"),
        (["1", "2", "a b"], None, r"has the line '1'; each must be"),
        (["a 1", "b 2", "c 3", "a 2"], None, r"gives a two labels, 1 and 2"),
        (["a 1", "b 2"], None, r"has no label for c\.jpg"),
        (["1", "2", "2"], ["x", "y", "z"], r"labels from 1 to 2 and the classes file 3 names: it is unclear"),
        (["0", "2", "2"], ["x", "y"], r"has the label 2, but the classes file has 2 names"),
        (["x", "y", "w"], ["x", "y"], r"has the class 'w', which is not in the classes file"),
    ],
)
def test_labels_that_do_not_fit_are_refused(
    tmp_path: Path, lines: list[str], classes: list[str] | None, message: str
) -> None:
    tar = write_tar(tmp_path / "x.tar", [(f"{name}.jpg", b"x") for name in "abc"])
    options = {"labels": labels_file(tmp_path, lines)}
    if classes is not None:
        (tmp_path / "classes.txt").write_text("\n".join(classes))
        options["classes"] = str(tmp_path / "classes.txt")
    with pytest.raises(SourceError, match=message):
        open_source(str(tar), **options).scan()
