"""How fast images become shards: ours, webdataset's ShardWriter, and a plain copy of the same bytes."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from pipeline.sources import FolderSource
from pipeline.store import Store
from pipeline.write import DEFAULT_SHARD_BYTES, write_dataset

SHARD_BYTES = DEFAULT_SHARD_BYTES


def measure(folder: Path, work: Path, s3_url: str | None, num_workers: int, num_rounds: int) -> dict[str, float]:
    """MB/s of each way, the median of rounds that take turns. Also leaves a dataset at `s3_url`.

    Args:
        folder: of images, `class/name`.
        work: on the disk that is written to.
        s3_url: a dataset's URL on the server that the environment names; None leaves the rows out.
        num_workers: processes, of ours and of the copy.
        num_rounds: each from nothing.
    """
    ours, copy = work / "ours", work / "copy"
    num_bytes = sum(path.stat().st_size for path in folder.glob("*/*"))
    with ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_warm, range(4 * num_workers)))  # a copy program has no start-up to speak of

        def write(url: str) -> None:
            write_dataset(FolderSource(str(folder)), url, shard_bytes=SHARD_BYTES, num_workers=num_workers)

        def copy_to_disk() -> None:
            copy.mkdir()
            tars = sorted(ours.glob("*.tar"))
            list(pool.map(_copy_file, tars, [copy / tar.name for tar in tars]))

        def copy_to_s3() -> None:
            tars = sorted(ours.glob("*.tar"))
            list(pool.map(_copy_to_s3, tars, [f"{s3_url}-copy/{tar.name}" for tar in tars]))

        ways: dict[str, Callable[[], None]] = {
            "ours, to disk": lambda: write(str(ours)),
            "ShardWriter, serial, to disk": lambda: _shard_writer(folder, work / "writer"),
            "plain copy, to disk": copy_to_disk,
        }
        if s3_url is not None:
            ways |= {"ours, to S3": lambda: write(s3_url), "plain copy, to S3": copy_to_s3}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(num_rounds):
            for target in (ours, copy, work / "writer"):
                shutil.rmtree(target, ignore_errors=True)
            if s3_url is not None:
                bucket, _, name = s3_url.rpartition("/")
                Store(bucket).remove_tree(name)
                Store(bucket).remove_tree(f"{name}-copy")
            for name, way in ways.items():
                os.sync()  # what the way before left to be written must not be this one's burden
                started = time.perf_counter()
                way()
                times[name].append(time.perf_counter() - started)
    return {name: num_bytes / 1e6 / statistics.median(taken) for name, taken in times.items()}


def _warm(_: int) -> None:
    import s3fs  # noqa: F401

    time.sleep(0.05)  # long enough for every process to get one


def _copy_file(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    _put_on_disk(target)


def _put_on_disk(path: Path) -> None:
    """Ours are on the disk when they are done: so are the others."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _copy_to_s3(source: Path, url: str) -> None:
    import s3fs

    s3fs.S3FileSystem().put_file(str(source), url)


def _shard_writer(folder: Path, target: Path) -> None:
    import webdataset

    target.mkdir()
    sink: Any
    with webdataset.ShardWriter(f"{target}/shard-%06d.tar", maxsize=SHARD_BYTES, maxcount=10**6, verbose=0) as sink:
        for number, path in enumerate(sorted(folder.glob("*/*"))):
            label = int(path.parent.name.removeprefix("class"))
            sink.write({"__key__": f"{number:07d}", "jpg": path.read_bytes(), "cls": label})
    for tar in target.glob("*.tar"):
        _put_on_disk(tar)
