"""Tars that somebody else wrote, made a dataset where they are."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def
from PIL import Image
from tars import samples, write_tar

from pipeline.config import AugmentConfig, DataConfig
from pipeline.dataset import Dataset, open_dataset
from pipeline.errors import ManifestError, SourceError
from pipeline.index_dataset import TarIndexed, index_dataset
from pipeline.loader import Loader
from pipeline.manifest import MANIFEST_PATH, parse_index
from pipeline.sources import FolderSource
from pipeline.store import Store
from pipeline.verify import verify_dataset
from pipeline.write import write_dataset

Files = Callable[[Path], dict[str, bytes]]
LABELS = [str(number % 7) for number in range(40)]


@pytest.fixture
def tars(photos: list[Path], tmp_path: Path) -> Path:
    """Three tars, one of them in a folder, with labels and captions."""
    for number, name in enumerate(("train-0", "train-1", "more/train-2")):
        part = slice(number * 15, number * 15 + 15)
        write_tar(tmp_path / "tars" / f"{name}.tar", samples(photos[part], LABELS[part]))
    return tmp_path / "tars"


def labelled(dataset: Dataset) -> dict[bytes, str]:
    """Image -> class, by the indexes."""
    indexes = [dataset.index(shard) for shard in range(len(dataset.manifest.shards))]
    labels = np.concatenate([index.label for index in indexes])
    assert dataset.classes is not None
    return {dataset.sample_bytes(i): dataset.classes[label] for i, label in enumerate(labels)}


def test_tars_become_a_dataset_and_stay_as_they_are(photos: list[Path], tars: Path, read_files: Files) -> None:
    before = read_files(tars)
    seen: list[TarIndexed] = []
    manifest = index_dataset(str(tars), on_progress=seen.append)
    after = read_files(tars)
    assert {path: after[path] for path in before} == before
    assert sorted(set(after) - set(before)) == [
        *("index/more/train-2.parquet", "index/train-0.parquet", "index/train-1.parquet"),
        *("manifest.json", "more/train-2.idx", "train-0.idx", "train-1.idx"),
    ]
    assert [(tar.name, tar.num_samples) for tar in seen] == [("more/train-2", 10), ("train-0", 15), ("train-1", 15)]
    assert (manifest.num_samples, manifest.settings["indexed"]) == (40, True)
    assert manifest.settings["ignored_extensions"] == {"json": 40}
    dataset = open_dataset(str(tars))
    assert dataset.classes == ("0", "1", "2", "3", "4", "5", "6")
    assert labelled(dataset) == {photo.read_bytes(): label for photo, label in zip(photos, LABELS, strict=True)}
    for shard in range(3):
        index = dataset.index(shard)
        first = sum(info.num_samples for info in manifest.shards[:shard])
        sizes = [Image.open(io.BytesIO(dataset.sample_bytes(first + row))).size for row in range(len(index))]
        assert sizes == list(zip(index.width.tolist(), index.height.tolist(), strict=True))
    assert verify_dataset(dataset.store, deep=True) == []


def test_training_reads_it(tars: Path) -> None:
    index_dataset(str(tars))
    augment = AugmentConfig(image_size=(32, 32), patch_size=8)
    config = DataConfig(global_batch_size=8, num_lanes=2, augment=augment)
    with Loader(open_dataset(str(tars)), config) as loader:
        batches = [next(loader) for _ in range(5 * loader.num_micro_steps)]
    assert sorted(int(i) for batch in batches for i in batch.sample_ids) == list(range(40))
    assert all(batch.quarantined == () for batch in batches)


def test_dali_reads_the_tars_by_the_idx(photos: list[Path], tars: Path, tmp_path: Path) -> None:
    index_dataset(str(tars))

    @pipeline_def(batch_size=15, num_threads=1, device_id=None)
    def read() -> tuple[object, ...]:
        where = {"paths": [str(tars / "train-1.tar")], "index_paths": [str(tars / "train-1.idx")]}
        return tuple(fn.readers.webdataset(**where, ext=["jpg", "cls"]))

    images, labels = read().run()
    assert [bytes(images.at(i)) for i in range(15)] == [photo.read_bytes() for photo in photos[15:30]]
    assert [bytes(labels.at(i)).decode() for i in range(15)] == LABELS[15:30]
    tool = str(shutil.which("wds2idx", path=Path(sys.executable).parent))
    subprocess.run([tool, tars / "train-1.tar", tmp_path / "x.idx"], check=True, capture_output=True)
    theirs, ours = ((tmp_path / "x.idx").read_text(), (tars / "train-1.idx").read_text())
    assert sorted(theirs.split()) == sorted(ours.split())  # the image first, otherwise the same


@pytest.mark.servers
def test_in_a_bucket(bucket: str, photos: list[Path], tars: Path, read_files: Files) -> None:
    store = Store(bucket)
    for path, content in read_files(tars).items():
        store.write(path, content)
    index_dataset(bucket)
    index_dataset(str(tars))
    assert {entry.path: store.read(entry.path) for entry in store.list()} == read_files(tars)
    assert verify_dataset(store, deep=True) == []


def test_class_names_are_numbered_over_all_tars(photos: list[Path], tmp_path: Path) -> None:
    names = [photo.parent.name for photo in photos]
    for number in range(4):  # each has other classes
        part = slice(number * 10, number * 10 + 10)
        write_tar(tmp_path / f"{number}.tar", samples(photos[part], names[part]))
    manifest = index_dataset(str(tmp_path))
    assert manifest.classes == tuple(sorted(set(names)))
    expected = {photo.read_bytes(): name for photo, name in zip(photos, names, strict=True)}
    assert labelled(open_dataset(str(tmp_path))) == expected
    assert verify_dataset(Store(str(tmp_path)), deep=True) == []
    # Given a list, the same indexes are written in its order, without reading the tars again.
    (tmp_path / MANIFEST_PATH).unlink()
    (tmp_path / "classes.txt").write_text("\n".join(sorted(set(names), reverse=True)))
    seen: list[TarIndexed] = []
    manifest = index_dataset(str(tmp_path), classes=str(tmp_path / "classes.txt"), on_progress=seen.append)
    assert all(tar.resumed for tar in seen)
    assert manifest.classes == tuple(sorted(set(names), reverse=True))
    assert labelled(open_dataset(str(tmp_path))) == expected
    assert verify_dataset(Store(str(tmp_path)), deep=True) == []


def test_a_killed_run_goes_on_from_the_finished_tars(tars: Path, read_files: Files) -> None:
    index_dataset(str(tars))
    expected = read_files(tars)
    (tars / MANIFEST_PATH).unlink()
    (tars / "train-0.idx").unlink()
    (tars / "index/train-1.parquet").write_bytes(b"half")
    seen: list[TarIndexed] = []
    index_dataset(str(tars), on_progress=seen.append, num_workers=1)
    assert [tar.name for tar in seen if tar.resumed] == ["more/train-2"]
    assert read_files(tars) == expected


def test_it_is_done_once_and_a_changed_folder_is_told(photos: list[Path], tars: Path) -> None:
    manifest = index_dataset(str(tars))
    assert index_dataset(str(tars)) == manifest
    (tars / "classes.txt").write_text("\n".join("abcdefg"))
    with pytest.raises(ManifestError, match=r"indexed already, but with other classes.*remove its manifest\.json"):
        index_dataset(str(tars), classes=str(tars / "classes.txt"))
    write_tar(tars / "train-3.tar", samples(photos[:2], ["0", "1"]))
    with pytest.raises(ManifestError, match=r"but 1 tars were added, removed or changed since, train-3\.tar for one"):
        index_dataset(str(tars))
    (problem,) = verify_dataset(Store(str(tars)))
    assert (problem.path, "not in the manifest" in problem.message) == ("train-3.tar", True)
    (tars / MANIFEST_PATH).unlink()
    assert index_dataset(str(tars)).num_samples == 42


def test_bad_images_are_left_out_up_to_a_bound(photos: list[Path], tmp_path: Path) -> None:
    photo = photos[0].read_bytes()
    gif = io.BytesIO()
    Image.open(photos[0]).save(gif, "GIF")
    members = [("a.jpg", photo), ("a.cls", b"0"), ("b.jpg", photo[: len(photo) // 2]), ("b.cls", b"1")]
    members += [("c.jpg", b"<html>"), ("c.cls", b"0"), ("d.gif", gif.getvalue()), ("d.cls", b"0"), ("e.jpg", b"")]
    members += [("e.cls", b"0"), ("f.jpg", photo + b"more"), ("f.cls", b"1")]
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(SourceError, match=r"more bad images than --max-bad \(3\)") as error:
        index_dataset(str(tmp_path), max_bad=3)
    assert "x.tar/b.jpg: the JPEG is cut off" in str(error.value)
    assert not (tmp_path / MANIFEST_PATH).exists()
    manifest = index_dataset(str(tmp_path), max_bad=4)
    assert [bad.key for bad in manifest.bad_samples] == ["x.tar/b.jpg", "x.tar/c.jpg", "x.tar/d.gif", "x.tar/e.jpg"]
    dataset = open_dataset(str(tmp_path))
    assert dataset.index(0).keys.tolist() == ["a", "f"]
    assert [dataset.sample_bytes(0), dataset.sample_bytes(1)] == [photo, photo + b"more"]
    assert verify_dataset(dataset.store, deep=True) == []


def test_unlabelled_tars_and_names_from_a_folder(photos: list[Path], tmp_path: Path) -> None:
    for number, photo in enumerate(photos[:3]):
        (tmp_path / "in").mkdir(exist_ok=True)
        shutil.copy(photo, tmp_path / "in" / f"{number}.jpg")
    subprocess.run(["tar", "-C", tmp_path / "in", "-cf", tmp_path / "x.tar", "."], check=True)
    shutil.rmtree(tmp_path / "in")
    manifest = index_dataset(str(tmp_path))
    assert (manifest.classes, manifest.num_samples) == (None, 3)
    assert sorted(open_dataset(str(tmp_path)).index(0).keys) == ["0", "1", "2"]
    assert verify_dataset(Store(str(tmp_path)), deep=True) == []


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("0.jpg", None), ("0.png", None)], r"two images in one sample \(0\.jpg and 0\.png\)"),
        ([("0.jpg", None), ("0.cls", b"1"), ("1.jpg", None)], r"no \.cls beside 1\.jpg"),
        ([("0.jpg", None), ("0.cls", b"")], r"0\.cls holds b'', which is no label"),
        ([("0.jpg", None), ("1.jpg", None), ("0.jpg", None)], r"key '0' twice"),
        ([("0.jpg", None), ("0.cls", b"9" * 30)], r"there may be 1048576 classes"),
        ([("0.json", b"{}")], r"has no image that can be indexed"),
    ],
)
def test_what_makes_no_sense_is_refused(
    photos: list[Path], tmp_path: Path, members: list[tuple[str, bytes | None]], message: str
) -> None:
    photo = photos[0].read_bytes()
    write_tar(tmp_path / "x.tar", [(name, photo if content is None else content) for name, content in members])
    with pytest.raises(SourceError, match=message):
        index_dataset(str(tmp_path))
    assert not (tmp_path / MANIFEST_PATH).exists()


def test_labels_in_some_tars_only_are_refused(photos: list[Path], tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", samples(photos[:2], ["0", "1"]))
    write_tar(tmp_path / "1.tar", samples(photos[:2], [None, None]))
    with pytest.raises(SourceError, match=r"1\.tar has no \.cls, but others have"):
        index_dataset(str(tmp_path))
    (tmp_path / "classes.txt").write_text("a\nb\n")
    (tmp_path / "0.tar").unlink()
    with pytest.raises(SourceError, match=r"has no labels, so a classes file says nothing"):
        index_dataset(str(tmp_path), classes=str(tmp_path / "classes.txt"))


@pytest.mark.parametrize("cut", [100, 2000, 60_000])
def test_a_truncated_tar_is_an_error(tars: Path, cut: int) -> None:
    (tars / "train-1.tar").write_bytes((tars / "train-1.tar").read_bytes()[:cut])
    with pytest.raises(SourceError, match=r"train-1\.tar is not a whole uncompressed tar"):
        index_dataset(str(tars))


def test_a_damaged_header_is_an_error_not_an_early_end(tars: Path) -> None:
    data = bytearray((tars / "train-1.tar").read_bytes())
    data[1024 + 3] ^= 255
    (tars / "train-1.tar").write_bytes(data)
    with pytest.raises(SourceError, match="bad header"):
        index_dataset(str(tars))


def test_datasets_of_tarmac_shard_and_empty_folders_are_refused(small_photos: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"holds no \.tar files"):
        index_dataset(str(tmp_path))
    write_dataset(FolderSource(str(small_photos)), str(tmp_path))
    with pytest.raises(ManifestError, match="made by `tarmac shard`"):
        index_dataset(str(tmp_path))
    (tmp_path / MANIFEST_PATH).unlink()
    with pytest.raises(ManifestError, match="unfinished dataset of `tarmac shard`"):
        index_dataset(str(tmp_path))


@pytest.mark.parametrize("what", ["image", "label", "caption"])
def test_verify_finds_a_changed_byte(tars: Path, what: str) -> None:
    index_dataset(str(tars))
    index, _ = parse_index((tars / "index/train-1.parquet").read_bytes(), "")
    data = bytearray((tars / "train-1.tar").read_bytes())
    image = int(index.offset[3])
    after = image + int(index.num_bytes[3])
    after += -after % 512 + 512
    at = {"image": image + 20, "label": image - 1024, "caption": after}[what]
    data[at] ^= 1
    (tars / "train-1.tar").write_bytes(data)
    assert verify_dataset(Store(str(tars))) == []
    messages = [problem.message for problem in verify_dataset(Store(str(tars)), deep=True)]
    wanted = {"image": "sample 3 (000003) has crc32c", "label": "000003.cls holds", "caption": "has sha256"}
    assert wanted[what] in messages[0]
    assert "has sha256" in messages[-1]


@pytest.mark.parametrize(("option", "message"), [("num_workers", "at least 1"), ("max_bad", "negative")])
def test_wrong_options_are_refused(tmp_path: Path, option: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        index_dataset(str(tmp_path), **{option: -1})
