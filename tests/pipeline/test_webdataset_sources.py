"""Tars that other tools wrote, as sources of images and labels."""

from __future__ import annotations

import gc
import pickle
import warnings
from pathlib import Path

import pytest
import webdataset
from tars import samples, write_tar

from pipeline.dataset import open_dataset
from pipeline.errors import SourceError
from pipeline.listing import Listing
from pipeline.sources import open_source
from pipeline.store import Store
from pipeline.verify import verify_dataset
from pipeline.write import write_dataset


def contents(location: str, **options: str) -> dict[bytes, str | None]:
    """Image -> class, as a worker process would read them."""
    source = pickle.loads(pickle.dumps(open_source(location, **options)))
    listing: Listing = source.scan()
    return {source.read(ref): listing.classes[ref.label] if listing.classes else None for ref in listing.refs}


def expected(photos: list[Path], labels: list[str]) -> dict[bytes, str]:
    return {photo.read_bytes(): label for photo, label in zip(photos, labels, strict=True)}


def test_labels_are_read_from_the_tar(photos: list[Path], tmp_path: Path) -> None:
    numbers = [str(number % 7) for number in range(40)]
    tar = write_tar(tmp_path / "x.tar", samples(photos, [f"{number}\n" for number in numbers]))
    assert contents(str(tar)) == expected(photos, numbers)
    listing = open_source(str(tar)).scan()
    assert listing.classes == ("0", "1", "2", "3", "4", "5", "6")
    assert [ref.label for ref in listing.refs] == [int(number) for number in numbers]
    assert listing.ignored_extensions == {"json": 40}


def test_numbers_keep_their_value_where_some_do_not_occur(photos: list[Path], tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", samples(photos[:2], ["4", "10"]))
    listing = open_source(str(tar)).scan()
    assert [ref.label for ref in listing.refs] == [4, 10]
    assert listing.classes == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10")


def test_a_classes_file_names_the_numbers(photos: list[Path], tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", samples(photos[:3], ["2", "0", "2"]))
    (tmp_path / "classes.txt").write_text("zebra\ncat\nant\n\n")
    classes = str(tmp_path / "classes.txt")
    assert contents(str(tar), classes=classes) == expected(photos[:3], ["ant", "zebra", "ant"])
    assert open_source(str(tar), classes=classes).scan().classes == ("zebra", "cat", "ant")
    (tmp_path / "classes.txt").write_text("zebra\ncat\n")
    with pytest.raises(SourceError, match=r"label 2, but the classes file has 2 names"):
        open_source(str(tar), classes=classes).scan()
    (tmp_path / "classes.txt").write_text("cat\ncat\n")
    with pytest.raises(SourceError, match=r"'cat' twice"):
        open_source(str(tar), classes=classes).scan()
    (tmp_path / "classes.txt").write_text("\n")
    with pytest.raises(SourceError, match=r"is empty"):
        open_source(str(tar), classes=classes).scan()


def test_names_are_numbered_in_their_order_or_the_classes_file_s(photos: list[Path], tmp_path: Path) -> None:
    names = [photo.parent.name for photo in photos]
    tar = write_tar(tmp_path / "x.tar", samples(photos, names))
    assert contents(str(tar)) == expected(photos, names)
    assert open_source(str(tar)).scan().classes == tuple(sorted(set(names)))
    (tmp_path / "classes.txt").write_text("\n".join(sorted(set(names), reverse=True)))
    reverse = open_source(str(tar), classes=str(tmp_path / "classes.txt"))
    assert reverse.scan().classes == tuple(sorted(set(names), reverse=True))
    assert contents(str(tar), classes=str(tmp_path / "classes.txt")) == expected(photos, names)
    (tmp_path / "classes.txt").write_text("cat\ncoins")
    with pytest.raises(SourceError, match=r"class 'astronaut', which is not in the classes file"):
        reverse.scan()


@pytest.mark.parametrize("where", ["local", "memory"])
def test_several_tars_are_one_source(photos: list[Path], tmp_path: Path, where: str) -> None:
    labels = [str(number % 3) for number in range(40)]
    url = str(tmp_path / "tars") if where == "local" else f"memory://several-tars-{tmp_path.name}"
    store = Store(url)
    # The same keys in each, as one writer a process leaves them.
    for number, part in enumerate((slice(0, 25), slice(25, 40))):
        tar = write_tar(tmp_path / "made" / "x.tar", samples(photos[part], labels[part]))
        store.write(f"part/{number:05d}.tar", tar.read_bytes())
    store.write("part/00000_stats.json", b"{}")
    assert contents(url) == expected(photos, labels)
    workers = 2 if where == "local" else 1  # a process has a memory of its own
    manifest = write_dataset(open_source(url), str(tmp_path / "dataset"), shard_bytes=150_000, num_workers=workers)
    assert (manifest.num_samples, manifest.classes) == (40, ("0", "1", "2"))
    assert verify_dataset(Store(str(tmp_path / "dataset")), deep=True) == []
    dataset = open_dataset(str(tmp_path / "dataset"))
    indexes = [dataset.index(shard) for shard in range(len(manifest.shards))]
    assert len({key for index in indexes for key in index.keys}) == 40
    found = [str(label) for index in indexes for label in index.label]
    assert {dataset.sample_bytes(i): label for i, label in enumerate(found)} == expected(photos, labels)


def test_what_webdataset_writes_and_reads(photos: list[Path], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with webdataset.ShardWriter(f"{tmp_path}/in/%04d.tar", maxcount=15, verbose=0) as sink:
            for number, photo in enumerate(photos):
                sink.write({"__key__": f"{number:04d}", "jpg": photo.read_bytes(), "cls": number % 5})
        urls = sorted(str(path) for path in (tmp_path / "in").iterdir())
        assert len(urls) == 3
        theirs = {s["jpg"]: s["cls"].decode() for s in webdataset.WebDataset(urls, shardshuffle=False)}
        gc.collect()
    assert contents(str(tmp_path / "in")) == theirs


def test_captions_without_labels_are_a_dataset_without_labels(photos: list[Path], tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", samples(photos[:5], [None] * 5))
    listing = open_source(str(tar)).scan()
    assert (len(listing.refs), listing.classes, listing.ignored_extensions) == (5, None, {"json": 5})


def test_components_that_look_like_images_are_not_samples(photos: list[Path], tmp_path: Path) -> None:
    photo = photos[0].read_bytes()
    tar = write_tar(
        tmp_path / "x.tar", [("a/0.jpg", photo), ("a/0.seg.png", b"mask"), ("a/0.cls", b"3"), ("a/1.cls", b"2")]
    )
    listing = open_source(str(tar)).scan()
    assert [(ref.key, ref.path, ref.label) for ref in listing.refs] == [("a/0", "a/0.jpg", 3)]
    assert listing.ignored_extensions == {"png": 1, "cls": 1}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("0.jpg", b"x"), ("0.png", b"x"), ("0.cls", b"1")], r"two images in one sample \(0\.jpg and 0\.png\)"),
        ([("0.jpg", b"x"), ("0.cls", b"1"), ("1.jpg", b"x")], r"no \.cls beside 1\.jpg"),
        ([("0.jpg", b"x"), ("0.cls", b"")], r"0\.cls holds b'', which is no label"),
        ([("0.jpg", b"x"), ("0.cls", b"\xff")], r"0\.cls holds b'\\xff', which is no label"),
        ([("0.jpg", b"x"), ("0.cls", b"y" * 2000)], r"which is no label"),
        ([("0.jpg", b"x"), ("0.cls", b"99999999")], r"label 99999999, but there may be 1048576"),
        ([("0.v1.jpg", b"x"), ("0.v1.cls", b"1")], r"a WebDataset key ends at the first dot"),
    ],
)
def test_labels_that_make_no_sense_are_refused(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        open_source(str(write_tar(tmp_path / "x.tar", members))).scan()


def test_a_folder_of_imagenet_s_class_tars_has_their_names_as_classes(photos: list[Path], tmp_path: Path) -> None:
    names = ["n01440764", "n02123045", "n07920052"]
    for name, photo in zip(names, photos, strict=False):
        write_tar(tmp_path / f"{name}.tar", [(f"{name}_1.JPEG", photo.read_bytes())])
    assert contents(str(tmp_path)) == expected(photos[:3], names)


def test_a_bad_image_is_named_with_its_tar(photos: list[Path], tmp_path: Path) -> None:
    for number in range(2):
        write_tar(tmp_path / "in" / f"{number}.tar", samples(photos[:2], ["0", "1"]))
    write_tar(tmp_path / "in" / "2.tar", [("000000.jpg", b"no image"), ("000000.cls", b"0")])
    manifest = write_dataset(open_source(str(tmp_path / "in")), str(tmp_path / "out"), max_bad=1)
    assert [bad.key for bad in manifest.bad_samples] == ["2.tar/000000.jpg"]
    assert manifest.num_samples == 4


def test_a_damaged_tar_among_others_is_named(photos: list[Path], tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", samples(photos[:2], ["0", "1"]))
    (tmp_path / "1.tar").write_bytes((tmp_path / "1.tar").read_bytes()[:3000])
    with pytest.raises(SourceError, match=r"1\.tar is not a whole uncompressed tar"):
        open_source(str(tmp_path)).scan()


def test_a_classes_file_for_images_without_labels_is_refused(photos: list[Path], tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", samples(photos[:2], [None, None]))
    (tmp_path / "classes.txt").write_text("cat\n")
    with pytest.raises(SourceError, match="has no labels, so a classes file says nothing"):
        open_source(str(tar), classes=str(tmp_path / "classes.txt")).scan()
