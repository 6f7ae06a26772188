"""Parquet files as Hugging Face's datasets have them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.dataset import open_dataset
from pipeline.errors import SourceError, StoreError
from pipeline.listing import Listing
from pipeline.sources import open_source
from pipeline.store import Store
from pipeline.verify import verify_dataset
from pipeline.write import plan_shards, write_dataset

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_table(
    path: Path,
    images: Sequence[bytes | None],
    labels: Sequence[int | str | None] | None = None,
    names: list[str] | None = None,
    column: str = "image",
    rows: int = 4,
) -> Path:
    """A parquet file with the metadata that `datasets` writes, `rows` in a row group."""
    values = [{"bytes": image, "path": f"{number}.jpg"} for number, image in enumerate(images)]
    columns = {column: pa.array(values, IMAGE)}
    features: dict[str, object] = {column: {"_type": "Image"}}
    if labels is not None:
        columns["label"] = pa.array(labels)
        features["label"] = {"_type": "ClassLabel", "names": names} if names else {"dtype": "int64", "_type": "Value"}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path, row_group_size=rows)
    return path


def contents(location: str, **options: str) -> dict[bytes, str | None]:
    """Image -> class, as a worker process would read them."""
    source = pickle.loads(pickle.dumps(open_source(location, **options)))
    listing: Listing = source.scan()
    assert len({ref.key for ref in listing.refs}) == len(listing.refs)
    return {source.read(ref): listing.classes[ref.label] if listing.classes else None for ref in listing.refs}


@pytest.fixture
def images(photos: list[Path]) -> list[bytes]:
    return [photo.read_bytes() for photo in photos]


LABELS = [number % 3 for number in range(40)]
NAMES = ["zebra", "ant", "cat"]


@pytest.mark.parametrize("column", ["image", "img", "picture"])
def test_a_file_gives_images_labels_and_their_names(images: list[bytes], tmp_path: Path, column: str) -> None:
    path = str(write_table(tmp_path / "train.parquet", images, LABELS, NAMES, column))
    assert contents(path) == {image: NAMES[label] for image, label in zip(images, LABELS, strict=True)}
    assert open_source(path).scan().classes == ("zebra", "ant", "cat")


def test_without_names_numbers_are_the_classes(images: list[bytes], tmp_path: Path) -> None:
    path = str(write_table(tmp_path / "train.parquet", images, LABELS))
    assert contents(path) == {image: str(label) for image, label in zip(images, LABELS, strict=True)}
    (tmp_path / "classes.txt").write_text("\n".join(NAMES))
    named = contents(path, classes=str(tmp_path / "classes.txt"))
    assert named == {image: NAMES[label] for image, label in zip(images, LABELS, strict=True)}


@pytest.mark.parametrize("labels", [None, [-1] * 40, [None] * 40])
def test_without_labels(images: list[bytes], tmp_path: Path, labels: list[int] | None) -> None:
    path = str(write_table(tmp_path / "test.parquet", images, labels, NAMES))
    assert contents(path) == dict.fromkeys(images)


def test_names_may_be_the_labels(images: list[bytes], tmp_path: Path) -> None:
    labels = [NAMES[label] for label in LABELS]
    path = str(write_table(tmp_path / "train.parquet", images, labels))
    assert contents(path) == dict(zip(images, labels, strict=True))


@pytest.mark.parametrize("store_url", ["local", "moto"], indirect=True)
def test_a_folder_of_files_becomes_a_dataset(images: list[bytes], tmp_path: Path, store_url: str) -> None:
    store = Store(store_url)
    for number in range(2):
        part = slice(number * 20, number * 20 + 20)
        path = write_table(tmp_path / "x.parquet", images[part], LABELS[part], NAMES)
        store.write(f"data/train-{number:05d}-of-00002.parquet", path.read_bytes())
    store.write("README.md", b"---")
    source = open_source(store_url)
    manifest = write_dataset(source, str(tmp_path / "dataset"), shard_bytes=150_000, num_workers=2)
    assert (manifest.num_samples, manifest.classes, len(manifest.shards) > 1) == (40, ("zebra", "ant", "cat"), True)
    assert verify_dataset(Store(str(tmp_path / "dataset")), deep=True) == []
    dataset = open_dataset(str(tmp_path / "dataset"))
    labels = [label for shard in range(len(manifest.shards)) for label in dataset.index(shard).label.tolist()]
    found = {dataset.sample_bytes(i): label for i, label in enumerate(labels)}
    assert found == dict(zip(images, LABELS, strict=True))
    again = write_dataset(open_source(store_url), str(tmp_path / "again"), shard_bytes=150_000)
    assert again == manifest


def test_row_groups_are_permuted_and_stay_together(images: list[bytes], tmp_path: Path) -> None:
    refs = open_source(str(write_table(tmp_path / "x.parquet", images, rows=3))).scan().refs

    def groups(seed: int) -> list[int]:
        order = [ref for shard in plan_shards(reversed(refs), seed, 150_000) for ref in shard]
        assert sorted(ref.key for ref in order) == sorted(ref.key for ref in refs)
        starts = [ref.group for ref in order if ref.offset == 0]
        assert [ref.group for ref in order] == [group for group in starts for ref in refs if ref.group == group]
        return starts

    assert sorted(groups(0)) == list(range(14))
    assert groups(0) != sorted(groups(0))
    assert groups(0) != groups(1)


def test_a_row_group_is_read_once(images: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_table(tmp_path / "x.parquet", images, rows=5)
    source = open_source(str(path))
    refs = source.scan().refs
    num_bytes = 0
    read_range = Store.read_range

    def counted(store: Store, name: str, offset: int, length: int) -> bytes:
        nonlocal num_bytes
        data = read_range(store, name, offset, length)
        num_bytes += len(data)
        return data

    monkeypatch.setattr(Store, "read_range", counted)
    assert [source.read(ref) for ref in refs] == images
    # Beside the images, the footer once a group; these files are small, so that it counts.
    assert num_bytes < sum(map(len, images)) + 8 * 2 * 2**16 + 8 * 2**16


def test_rows_without_an_image_are_bad_samples(images: list[bytes], tmp_path: Path) -> None:
    path = write_table(tmp_path / "x.parquet", [*images[:5], None, b"no image"], rows=4)
    manifest = write_dataset(open_source(str(path)), str(tmp_path / "dataset"), max_bad=2)
    assert manifest.num_samples == 5
    assert [(bad.key, bad.reason.split(":")[0]) for bad in manifest.bad_samples] == [
        ("x.parquet, row 1 of row group 1", "cannot be read"),
        ("x.parquet, row 2 of row group 1", "the content is no JPEG, PNG, WebP, BMP, TIFF or GIF image"),
    ]


def test_what_is_unclear_is_refused(images: list[bytes], tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="labels for some images only"):
        open_source(str(write_table(tmp_path / "a" / "x.parquet", images[:2], [0, -1], NAMES))).scan()
    with pytest.raises(SourceError, match="have no rows"):
        open_source(str(write_table(tmp_path / "b" / "x.parquet", []))).scan()
    write_table(tmp_path / "c" / "0.parquet", images[:2], [0, 1], NAMES)
    write_table(tmp_path / "c" / "1.parquet", images[:2], [0, 1], NAMES[::-1])
    with pytest.raises(SourceError, match="name the classes differently"):
        open_source(str(tmp_path / "c")).scan()
    with pytest.raises(SourceError, match="the label 3, but the classes file has 3 names"):
        open_source(str(write_table(tmp_path / "d" / "x.parquet", images[:2], [0, 3], NAMES))).scan()
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "e.parquet")
    with pytest.raises(SourceError, match=r"must have one column of images.*has none among \['text'\]"):
        open_source(str(tmp_path / "e.parquet")).scan()
    with pytest.raises(StoreError, match=r"there is no such (bucket|object)|no such bucket"):
        open_source("memory://nowhere/x.parquet").scan()


def test_a_damaged_file_is_an_error(images: list[bytes], tmp_path: Path) -> None:
    path = write_table(tmp_path / "x.parquet", images)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(SourceError, match=r"x\.parquet is not a whole parquet file"):
        open_source(str(path)).scan()


def test_damage_that_is_found_while_reading_stops_the_run(images: list[bytes], tmp_path: Path) -> None:
    path = write_table(tmp_path / "x.parquet", images)
    source = open_source(str(path))
    refs = source.scan().refs
    data = bytearray(path.read_bytes())
    data[4:1000] = bytes(996)  # the head of the first page
    path.write_bytes(data)
    with pytest.raises(SourceError, match=r"x\.parquet is not a whole parquet file"):
        source.read(refs[0])
    path.unlink()
    with pytest.raises(StoreError, match=r"x\.parquet"):
        source.read(refs[0])


def test_parquet_files_beside_images_are_notes(photos: list[Path], images: list[bytes], tmp_path: Path) -> None:
    write_table(tmp_path / "00000.parquet", images)
    (tmp_path / "00000").mkdir()
    (tmp_path / "00000" / "1.jpg").write_bytes(images[0])
    listing = open_source(str(tmp_path)).scan()
    assert (len(listing.refs), listing.ignored_extensions) == (1, {"parquet": 1})
