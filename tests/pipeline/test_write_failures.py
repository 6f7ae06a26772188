from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pipeline.dataset import open_dataset
from pipeline.errors import ManifestError, SourceError, StoreError
from pipeline.listing import SampleRef
from pipeline.manifest import BadSample, Manifest, read_manifest
from pipeline.sources import FolderSource, open_source
from pipeline.store import Store
from pipeline.verify import verify_dataset
from pipeline.write import ShardDone, write_dataset

SHARD_BYTES = 12_000
Files = Callable[[Path], dict[str, bytes]]


def write(source: Path, target: Path | str, **options: object) -> Manifest:
    return write_dataset(open_source(str(source)), str(target), **{"shard_bytes": SHARD_BYTES} | options)


KILLED_AFTER_ONE_SHARD = """
import multiprocessing, os, signal, sys
from pipeline.sources import open_source
from pipeline.write import write_dataset

def die(done):
    print(done.name, *(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

source, target, num_workers = sys.argv[1:]
write_dataset(
    open_source(source), target, shard_bytes=12_000, num_workers=int(num_workers), on_progress=die
)
"""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_killed_run_goes_on_where_it_was(
    small_photos: Path, whole_dataset: Path, tmp_path: Path, read_files: Files, num_workers: int
) -> None:
    target = tmp_path / "dataset"
    arguments = [sys.executable, "-c", KILLED_AFTER_ONE_SHARD, small_photos, target, str(num_workers)]
    killed = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    first, *workers = killed.stdout.split()
    assert len(workers) == (num_workers if num_workers > 1 else 0)
    end = time.monotonic() + 20
    while any(is_running(int(pid)) for pid in workers):
        assert time.monotonic() < end, "workers outlived their parent"
        time.sleep(0.05)
    assert not (target / "manifest.json").exists()
    finished = {path.stem for path in (target / "index").glob("shard-*")}
    assert first in finished
    before = {path: path.stat().st_mtime_ns for path in target.rglob("shard-*") if path.stem in finished}
    done: list[ShardDone] = []
    manifest = write(small_photos, target, on_progress=done.append)
    assert {shard.name for shard in done if shard.resumed} == finished
    assert len(done) == len(manifest.shards) == done[0].num_shards
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert read_files(target) == read_files(whole_dataset)


KILLED_WHILE_WRITING = """
import os, signal, sys
from pipeline import store_s3
from pipeline.sources import open_source
from pipeline.write import write_dataset

store_s3.PART_BYTES = 5 * 2**20
parts = []

def append_and_die(sink, data, append=store_s3.S3Sink.append):
    append(sink, data)
    parts.append(len(data))
    if sum(parts) > 23 * 2**20:
        os.kill(os.getpid(), signal.SIGKILL)

store_s3.S3Sink.append = append_and_die
write_dataset(open_source(sys.argv[1]), sys.argv[2], shard_bytes=14 * 2**20)
"""


def test_a_run_killed_in_a_multipart_upload_leaves_no_part_of_a_shard(
    bucket: str, tmp_path: Path, read_files: Files
) -> None:
    (tmp_path / "in").mkdir()
    for number in range(16):  # 32 MB: three shards, of three parts each
        Image.effect_noise((1500, 1500), 80).convert("RGB").save(tmp_path / f"in/{number}.jpg", quality=95)
    source = tmp_path / "in"
    arguments = [sys.executable, "-c", KILLED_WHILE_WRITING, str(source), bucket]
    killed = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = {entry.path for entry in Store(bucket).list()}
    assert left == {"shard-000000.tar", "shard-000000.idx", "index/shard-000000.parquet"}
    done: list[ShardDone] = []
    write(source, bucket, shard_bytes=14 * 2**20, on_progress=done.append)
    assert [shard.name for shard in done if shard.resumed] == ["shard-000000"]
    assert verify_dataset(Store(bucket), deep=True) == []
    write(source, tmp_path / "at once", shard_bytes=14 * 2**20)
    assert {entry.path: Store(bucket).read(entry.path) for entry in Store(bucket).list()} == read_files(
        tmp_path / "at once"
    )


@pytest.mark.parametrize("lost", ["shard-000001.tar", "shard-000001.idx", "index/shard-000001.parquet"])
@pytest.mark.parametrize("how", ["removed", "cut"])
def test_an_unfinished_shard_is_written_again(
    small_photos: Path, whole_dataset: Path, dataset_folder: Path, read_files: Files, lost: str, how: str
) -> None:
    (dataset_folder / "manifest.json").unlink()
    path = dataset_folder / lost
    if how == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100])
    done: list[ShardDone] = []
    write(small_photos, dataset_folder, on_progress=done.append)
    assert [shard.name for shard in done if not shard.resumed] == ["shard-000001"]
    assert read_files(dataset_folder) == read_files(whole_dataset)


def test_a_finished_dataset_is_left_as_it_is(
    small_photos: Path, whole_dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole_dataset.rglob("*")}
    with caplog.at_level("INFO"):
        manifest = write(small_photos, whole_dataset)
    assert manifest == read_manifest(Store(str(whole_dataset)))
    assert "is complete already: 28 samples" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in whole_dataset.rglob("*")} == before


def test_another_dataset_at_the_url_is_never_overwritten(
    small_photos: Path, dataset_folder: Path, read_files: Files
) -> None:
    before = read_files(dataset_folder)
    with pytest.raises(ManifestError, match=r"seed \(0, now 1\), shard_bytes \(12000, now 7\) differ"):
        write(small_photos, dataset_folder, seed=1, shard_bytes=7)
    assert read_files(dataset_folder) == before
    (dataset_folder / "manifest.json").unlink()
    with pytest.raises(ManifestError, match=r"belongs to an unfinished dataset.*another URL"):
        write(small_photos, dataset_folder, seed=1)
    with pytest.raises(ManifestError, match="belongs to an unfinished dataset"):
        write(small_photos, dataset_folder, shard_bytes=10**9)
    assert read_files(dataset_folder) == {k: v for k, v in before.items() if k != "manifest.json"}


def add_bad_files(folder: Path) -> list[BadSample]:
    good = (folder / "cat" / "photo 0.v0.JPG").read_bytes()
    (folder / "cat" / "empty.jpg").write_bytes(b"")
    (folder / "cat" / "half.jpg").write_bytes(good[: len(good) // 2])
    (folder / "hot dog" / "text.jpg").write_text("not an image")
    (folder / "hot dog" / "broken.jpg").symlink_to("nowhere.jpg")
    return [
        BadSample("cat/empty.jpg", "the file is empty"),
        BadSample("cat/half.jpg", "cannot be decoded: image file is truncated (30 bytes not processed)"),
        BadSample("hot dog/broken.jpg", "cannot be read: No such file or directory"),
        BadSample("hot dog/text.jpg", "the content is no JPEG, PNG, WebP, BMP, TIFF or GIF image"),
    ]


def test_bad_files_are_left_out_listed_and_counted(image_folder: Path, tmp_path: Path, read_files: Files) -> None:
    bad = add_bad_files(image_folder)
    done: list[ShardDone] = []
    manifest = write(image_folder, tmp_path / "one", max_bad=4, on_progress=done.append)
    assert [sample.key for sample in manifest.bad_samples] == [sample.key for sample in bad]
    assert manifest.bad_samples[0] == bad[0]
    assert "truncated" in manifest.bad_samples[1].reason
    assert manifest.bad_samples[2:] == tuple(bad[2:])
    assert sum(shard.num_bad for shard in done) == 4
    assert manifest.num_samples == 28
    assert manifest.settings["num_source_images"] == 32
    assert verify_dataset(Store(str(tmp_path / "one")), deep=True) == []
    write(image_folder, tmp_path / "two", max_bad=9, num_workers=2)
    assert read_files(tmp_path / "one") == read_files(tmp_path / "two")


@pytest.mark.parametrize("num_workers", [1, 2])
def test_too_many_bad_files_stop_the_run_and_leave_nothing(
    image_folder: Path, tmp_path: Path, read_files: Files, num_workers: int
) -> None:
    add_bad_files(image_folder)
    target = tmp_path / "dataset"
    with pytest.raises(
        SourceError, match=r"more bad files than --max-bad \(3\) allows.*\n  cat/empty\.jpg: the file is empty"
    ):
        write(image_folder, target, max_bad=3, num_workers=num_workers)
    assert read_files(target) == {}
    with pytest.raises(SourceError, match=r"--max-bad \(0\)"):
        write(image_folder, target, num_workers=num_workers)
    assert read_files(target) == {}


def test_resuming_counts_the_bad_files_of_finished_shards(
    image_folder: Path, tmp_path: Path, read_files: Files
) -> None:
    add_bad_files(image_folder)
    target = tmp_path / "dataset"
    manifest = write(image_folder, target, max_bad=4)
    before = read_files(target)
    (target / "manifest.json").unlink()
    assert write(image_folder, target, max_bad=4) == manifest
    assert read_files(target) == before
    (target / "manifest.json").unlink()
    with pytest.raises(SourceError, match=r"more bad files than --max-bad \(3\) allows"):
        write(image_folder, target, max_bad=3)
    assert read_files(target) == {}


def test_a_shard_without_a_good_image_does_not_exist(image_folder: Path, tmp_path: Path) -> None:
    for number in range(3):  # larger than a shard: one each
        (image_folder / "cat" / f"noise {number}.jpg").write_bytes(bytes(SHARD_BYTES + 1))
    target = tmp_path / "dataset"
    manifest = write(image_folder, target, max_bad=3)
    numbers = [int(shard.name[-6:]) for shard in manifest.shards]
    assert set(numbers) < set(range(len(numbers) + 3))
    assert verify_dataset(Store(str(target)), deep=True) == []
    assert open_dataset(str(target)).num_samples == 28


def test_only_bad_files_make_no_dataset(tmp_path: Path, read_files: Files) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "x.jpg").write_bytes(b"")
    with pytest.raises(SourceError, match=r"no image that can be read:\n  x\.jpg: the file is empty"):
        write(tmp_path / "source", tmp_path / "dataset", max_bad=10)
    assert read_files(tmp_path / "dataset") == {}


def test_a_file_that_changes_while_it_is_read_is_bad(image_folder: Path, tmp_path: Path) -> None:
    class Changing(FolderSource):
        def read(self, ref: SampleRef) -> bytes:
            return super().read(ref) + (b"more" if ref.path.startswith("cat/photo 0") else b"")

    manifest = write_dataset(Changing(str(image_folder)), str(tmp_path / "dataset"), max_bad=1)
    assert [sample.key for sample in manifest.bad_samples] == ["cat/photo 0.v0.JPG"]
    assert "when it was listed" in manifest.bad_samples[0].reason


class DeadlySource(FolderSource):
    """Its reader is killed, as one that runs out of memory is."""

    def read(self, ref: SampleRef) -> bytes:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_a_worker_that_dies_is_an_error_with_a_remedy(small_photos: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"a worker process died.*same command again"):
        write_dataset(DeadlySource(str(small_photos)), str(tmp_path / "x"), shard_bytes=SHARD_BYTES, num_workers=2)


class FailingSource(FolderSource):
    def read(self, ref: SampleRef) -> bytes:
        raise StoreError("the bucket is on fire")


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_error_that_is_no_files_fault_stops_the_run(small_photos: Path, tmp_path: Path, num_workers: int) -> None:
    with pytest.raises(StoreError, match="on fire"):
        write_dataset(
            FailingSource(str(small_photos)),
            str(tmp_path / "x"),
            shard_bytes=SHARD_BYTES,
            num_workers=num_workers,
        )
