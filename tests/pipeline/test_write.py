from __future__ import annotations

import gc
import io
import os
import random
import shutil
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from nvidia.dali import fn, pipeline_def
from PIL import Image

from pipeline.dataset import open_dataset
from pipeline.errors import ManifestError, SourceError, StoreError
from pipeline.listing import SampleRef
from pipeline.manifest import Manifest, read_manifest
from pipeline.shards import tar_header
from pipeline.sources import FolderSource, TarSource, open_source
from pipeline.store import Store
from pipeline.verify import verify_dataset
from pipeline.write import ShardDone, plan_shards, write_dataset

SHARD_BYTES = 12_000
Files = Callable[[Path], dict[str, bytes]]


def write(source: Path, target: Path | str, **options: object) -> Manifest:
    return write_dataset(open_source(str(source)), str(target), **{"shard_bytes": SHARD_BYTES} | options)


def make_tar(folder: Path, path: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        tar.add(folder, ".")
    return path


def test_the_shards_are_webdataset_tars_with_every_image_once(small_photos: Path, whole_dataset: Path) -> None:
    manifest = read_manifest(Store(str(whole_dataset)))
    urls = [str(whole_dataset / f"{shard.name}.tar") for shard in manifest.shards]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves closing its files to the collector
        samples = list(webdataset.WebDataset(urls, shardshuffle=False))
        gc.collect()
    assert len(samples) == manifest.num_samples == 28
    assert len({sample["__key__"] for sample in samples}) == 28
    expected = sorted((path.parent.name, path.read_bytes()) for path in small_photos.rglob("*") if path.is_file())
    assert manifest.classes == tuple(sorted({name for name, _ in expected}))
    assert sorted((manifest.classes[int(sample["cls"])], sample["jpg"]) for sample in samples) == expected


def test_dali_reads_every_sample_by_the_idx(small_photos: Path, whole_dataset: Path) -> None:
    tars = sorted(whole_dataset.glob("*.tar"))

    @pipeline_def(batch_size=28, num_threads=1, device_id=None)
    def read() -> tuple[object, ...]:
        index_paths = [str(tar.with_suffix(".idx")) for tar in tars]
        return tuple(fn.readers.webdataset(paths=list(map(str, tars)), index_paths=index_paths, ext=["jpg", "cls"]))

    images, labels = read().run()
    classes = read_manifest(Store(str(whole_dataset))).classes
    assert classes is not None
    found = sorted((classes[int(bytes(labels.at(i)))], bytes(images.at(i))) for i in range(28))
    assert found == sorted((path.parent.name, path.read_bytes()) for path in small_photos.rglob("*") if path.is_file())


def test_the_index_says_where_each_image_lies(whole_dataset: Path) -> None:
    dataset = open_dataset(str(whole_dataset))
    for shard, info in enumerate(dataset.manifest.shards):
        index = dataset.index(shard)
        with tarfile.open(whole_dataset / f"{info.name}.tar") as tar:
            members = [member for member in tar if member.name.endswith(".jpg")]
            assert len(members) == len(index)
            for row, member in enumerate(members):
                file = tar.extractfile(member)
                assert file is not None
                data = file.read()
                assert member.name == f"{index.keys[row]}.jpg"
                assert (member.offset_data, member.size) == (index.offset[row], index.num_bytes[row])
                assert google_crc32c.value(data) == index.crc32c[row]
                assert Image.open(io.BytesIO(data)).size == (index.width[row], index.height[row])
                assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
                assert (member.uname, member.gname) == ("", "")


def test_the_idx_is_what_dali_writes(whole_dataset: Path, tmp_path: Path) -> None:
    tool = shutil.which("wds2idx", path=os.path.dirname(sys.executable))
    assert tool is not None
    for tar in sorted(whole_dataset.glob("*.tar")):
        subprocess.run([tool, tar, tmp_path / "x.idx"], check=True, capture_output=True)
        assert tar.with_suffix(".idx").read_bytes() == (tmp_path / "x.idx").read_bytes()


def test_unlabelled_images_have_no_cls(small_photos: Path, tmp_path: Path) -> None:
    manifest = write(small_photos / "cat", tmp_path / "dataset")
    assert manifest.classes is None
    index = open_dataset(str(tmp_path / "dataset")).index(0)
    assert set(index.label.tolist()) == {-1}
    with tarfile.open(tmp_path / "dataset" / "shard-000000.tar") as tar:
        assert all(name.endswith(".jpg") for name in tar.getnames())
    tool = str(shutil.which("wds2idx", path=os.path.dirname(sys.executable)))
    subprocess.run([tool, tmp_path / "dataset/shard-000000.tar", tmp_path / "x.idx"], check=True)
    assert (tmp_path / "x.idx").read_bytes() == (tmp_path / "dataset/shard-000000.idx").read_bytes()


@pytest.mark.slow
def test_processes_and_the_kind_of_source_do_not_change_a_byte(
    small_photos: Path, whole_dataset: Path, tmp_path: Path, read_files: Files
) -> None:
    tar = make_tar(small_photos, tmp_path / "photos.tar")
    write(tar, tmp_path / "dataset", num_workers=2)
    assert read_files(tmp_path / "dataset") == read_files(whole_dataset)


def test_seed_and_shard_size_change_the_plan(small_photos: Path, tmp_path: Path) -> None:
    def keys(**options: int) -> list[str]:
        target = tmp_path / str(options)
        write(small_photos, target, **options)
        dataset = open_dataset(str(target))
        return [key for i in range(len(dataset.manifest.shards)) for key in dataset.index(i).keys.tolist()]

    first, other, larger = keys(), keys(seed=1), keys(shard_bytes=10**9)
    assert sorted(first) == sorted(other) == sorted(larger)
    assert first != sorted(first)
    assert first != other
    assert first == larger


def test_shards_are_filled_up_to_their_size() -> None:
    draw = random.Random(0)
    refs = [SampleRef(f"k{i}", f"k{i}", draw.randrange(1, 60), -1) for i in range(500)]
    refs.append(SampleRef("huge", "huge", 1000, -1))
    shards = plan_shards(refs, seed=0, shard_bytes=100)
    assert sorted(ref.key for shard in shards for ref in shard) == sorted(ref.key for ref in refs)
    sizes = [sum(ref.num_bytes for ref in shard) for shard in shards]
    assert all(size <= 100 or len(shard) == 1 for size, shard in zip(sizes, shards, strict=True))
    firsts = [shard[0].num_bytes for shard in shards]
    assert all(size + first > 100 for size, first in zip(sizes, firsts[1:], strict=False))
    assert plan_shards(list(reversed(refs)), seed=0, shard_bytes=100) == shards


def test_odd_formats_and_names(tmp_path: Path, small_photos: Path) -> None:
    photo = Image.open(small_photos / "cat" / "photo 0.v0.JPG")
    source = tmp_path / "source"
    source.mkdir()
    photo.save(source / "a.jpg", "PNG")
    photo.save(source / "a.png", "JPEG")
    photo.convert("CMYK").save(source / "cmyk.jpg")
    photo.save(source / "x.y.webp")
    photo.save(source / "t.tif")
    photo.save(source / ("long" * 30 + ".bmp"))
    manifest = write(source, tmp_path / "dataset", shard_bytes=10**9)
    assert manifest.settings["num_converted"] == 3
    with tarfile.open(tmp_path / "dataset" / "shard-000000.tar") as tar:
        names = sorted(tar.getnames())
    long_name = next(name for name in names if name.startswith("longlong"))
    assert sorted({*names} - {long_name}) == ["a.png", "a=png.jpg", "cmyk.png", "t.png", "x%2Ey.webp"]
    assert len(long_name) <= 100
    assert verify_dataset(Store(str(tmp_path / "dataset")), deep=True) == []


def test_max_side_is_part_of_the_plan(small_photos: Path, tmp_path: Path, read_files: Files) -> None:
    manifest = write(small_photos, tmp_path / "dataset", max_side=80)
    index = open_dataset(str(tmp_path / "dataset")).index(0)
    assert np.maximum(index.height, index.width).max() == 80
    sizes = [Image.open(io.BytesIO(path.read_bytes())).size for path in small_photos.rglob("*.JPG")]
    assert manifest.settings["max_side"] == 80
    assert manifest.settings["num_converted"] == sum(max(size) > 80 for size in sizes)
    assert verify_dataset(Store(str(tmp_path / "dataset")), deep=True) == []
    write(small_photos, tmp_path / "again", max_side=80, num_workers=2)
    assert read_files(tmp_path / "again") == read_files(tmp_path / "dataset")
    for other in (None, 79):
        with pytest.raises(ManifestError, match=rf"max_side \(80, now {other}\) differ"):
            write(small_photos, tmp_path / "dataset", max_side=other)
    (tmp_path / "dataset" / "manifest.json").unlink()
    with pytest.raises(ManifestError, match=r"other settings \(seed, shard_bytes, max_side, check\)"):
        write(small_photos, tmp_path / "dataset", max_side=79)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed"),
        ({"shard_bytes": 0}, "shard_bytes"),
        ({"num_workers": 0}, "num_workers"),
        ({"max_bad": -1}, "max_bad"),
        ({"max_side": 0}, "max_side"),
    ],
)
def test_wrong_options_are_refused(small_photos: Path, tmp_path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=rf"{message} \({options[message]}\) must"):
        write(small_photos, tmp_path / "dataset", **options)
    assert not (tmp_path / "dataset").exists()


def test_an_empty_source_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    with pytest.raises(SourceError, match="holds no images"):
        write(tmp_path / "source", tmp_path / "dataset")
    assert not (tmp_path / "dataset").exists()


@pytest.mark.servers
def test_from_a_tar_in_a_bucket_to_a_dataset_in_a_bucket(
    bucket: str, small_photos: Path, whole_dataset: Path, tmp_path: Path, read_files: Files
) -> None:
    Store(bucket).write("in/photos.tar", make_tar(small_photos, tmp_path / "photos.tar").read_bytes())
    source, target = f"{bucket}/in/photos.tar", f"{bucket}/datasets/photos"
    manifest = write_dataset(open_source(source), target, shard_bytes=SHARD_BYTES, num_workers=2)
    store = Store(target)
    assert {entry.path: store.read(entry.path) for entry in store.list()} == read_files(whole_dataset)
    assert verify_dataset(store, deep=True) == []
    store.remove("manifest.json")
    store.remove("index/shard-000000.parquet")
    done: list[ShardDone] = []
    again = write_dataset(open_source(source), target, shard_bytes=SHARD_BYTES, on_progress=done.append)
    assert again == manifest
    assert [shard.name for shard in done if not shard.resumed] == ["shard-000000"]
    index = open_dataset(target).index(1)
    files = {path.read_bytes() for path in small_photos.rglob("*.JPG")}
    assert open_dataset(target).sample_bytes(manifest.shards[0].num_samples) in files
    assert index.keys[0].count("/") == 1


@pytest.mark.servers
def test_a_missing_bucket_is_told_before_any_work(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no-such-bucket-here"):
        write_dataset(FolderSource(str(tmp_path / "not even read")), "s3://no-such-bucket-here/x")


@pytest.mark.slow
def test_the_real_photographs_go_through(imagenet_photos: Path, tmp_path: Path) -> None:
    tar = make_tar(imagenet_photos, tmp_path / "photos.tar")
    source = TarSource(str(tar))
    manifest = write_dataset(source, str(tmp_path / "dataset"), num_workers=2, shard_bytes=32 * 2**20)
    assert (manifest.num_samples, manifest.bad_samples) == (1000, ())
    dataset = open_dataset(str(tmp_path / "dataset"))
    refs = {ref.key: ref for ref in source.scan().refs}
    for sample_id in np.random.default_rng(0).choice(1000, 50, replace=False).tolist():
        shards, rows = dataset.locate([sample_id])
        key = dataset.index(int(shards[0])).keys[rows[0]]
        assert dataset.sample_bytes(sample_id) == source.read(refs[key])


@given(
    name=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=140),
    num_bytes=st.integers(0, 2**33 - 1),
)
def test_tar_headers_are_those_of_tarfile(name: str, num_bytes: int) -> None:
    expected = tarfile.TarInfo(name)
    expected.size = num_bytes
    try:
        header = expected.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
    except ValueError:
        with pytest.raises(ValueError, match="name is too long"):
            tar_header(name, num_bytes)
    else:
        assert tar_header(name, num_bytes) == header


def test_the_check_is_part_of_the_plan(small_photos: Path, tmp_path: Path) -> None:
    manifest = write(small_photos, tmp_path / "dataset")
    assert manifest.settings["check"] == "structure"
    with pytest.raises(ManifestError, match=r"check \(structure, now pixels\) differ"):
        write(small_photos, tmp_path / "dataset", check="pixels")
