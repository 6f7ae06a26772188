"""The node's cache gives out the store's bytes and no others: shared, bounded, killed, damaged, full."""

from __future__ import annotations

import logging
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from noise import noise

from pipeline import AugmentConfig, DataConfig, Loader, cache, open_dataset
from pipeline.cache import ShardCache
from pipeline.dataset import Dataset
from pipeline.store import Store
from pipeline.store_backend import Pin

BLOCK = 1000
SHARD = noise(10_500)
CONFIG = DataConfig(
    global_batch_size=8,
    num_lanes=4,
    shuffle_window_samples=4,
    augment=AugmentConfig(image_size=(32, 32)),
    num_decode_threads=1,
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "BLOCK_BYTES", BLOCK)


class Source:
    """The store behind a cache: counts what is read."""

    def __init__(self) -> None:
        self.reads: list[tuple[int, int]] = []

    def __call__(self, offset: int, num_bytes: int) -> bytes:
        self.reads.append((offset, num_bytes))
        return SHARD[offset : offset + num_bytes]

    @property
    def num_bytes(self) -> int:
        return sum(num_bytes for _, num_bytes in self.reads)


def read(cached: ShardCache, source: Source, offset: int, num_bytes: int) -> None:
    assert cached.read(3, len(SHARD), offset, num_bytes, source) == SHARD[offset : offset + num_bytes]


def taken(folder: Path) -> int:
    num_bytes = 0
    for path in folder.glob("*/*-*"):
        with suppress(FileNotFoundError):
            num_bytes += path.stat().st_size if path.suffix != ".part" else 0
    return num_bytes


def test_each_block_is_fetched_once(tmp_path: Path) -> None:
    cached, source = ShardCache(str(tmp_path), 10**6, "digest"), Source()
    rng = random.Random(0)
    for _ in range(200):
        offset = rng.randrange(len(SHARD))
        read(cached, source, offset, rng.randint(1, len(SHARD) - offset))
    assert source.num_bytes == len(SHARD)
    again, nothing = ShardCache(str(tmp_path), 10**6, "digest"), Source()
    read(again, nothing, 0, len(SHARD))
    assert nothing.reads == []
    assert again.hit_bytes == len(SHARD)
    assert taken(tmp_path) == len(SHARD)
    other = Source()
    read(ShardCache(str(tmp_path), 10**6, "another dataset"), other, 0, 10)
    assert other.reads  # whatever has the same name in another dataset


def test_threads_that_need_the_same_block_fetch_it_once(tmp_path: Path) -> None:
    cached, source = ShardCache(str(tmp_path), 10**6, "digest"), Source()

    def slow(offset: int, num_bytes: int) -> bytes:
        time.sleep(0.1)
        return source(offset, num_bytes)

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda at: cached.read(3, len(SHARD), at, 3000, slow), range(0, 4000, 500)))
    assert found == [SHARD[at : at + 3000] for at in range(0, 4000, 500)]
    assert source.num_bytes == 7000


@pytest.mark.parametrize("damage", ["cut", "empty", "gone"])
def test_a_torn_block_is_fetched_again(tmp_path: Path, damage: str) -> None:
    cached, source = ShardCache(str(tmp_path), 10**6, "digest"), Source()
    read(cached, source, 0, 3000)
    (block,) = tmp_path.glob("*/*-00001")
    if damage == "gone":
        block.unlink()
    else:
        os.truncate(block, 0 if damage == "empty" else 10)
    source.reads.clear()
    read(cached, source, 500, 2000)
    assert source.reads == [(1000, 1000)]
    read(cached, Source(), 0, 3000)


def test_the_budget_holds_and_what_is_there_stays(tmp_path: Path) -> None:
    cached, source = ShardCache(str(tmp_path), 5_400, "digest"), Source()
    read(cached, source, 0, len(SHARD))
    assert taken(tmp_path) == 5000
    source.reads.clear()
    read(cached, source, 0, len(SHARD))
    assert source.num_bytes == len(SHARD) - 5000
    # Another dataset, in use: it stays, and this one has to do without.
    newcomer = ShardCache(str(tmp_path), 5_400, "newer")
    read(newcomer, source, 0, 3000)
    assert taken(tmp_path) == 5000
    # Nobody has used it for long: it goes.
    os.utime(tmp_path / "digest", (0, 0))
    read(newcomer, source, 0, 3000)
    assert not (tmp_path / "digest").exists()
    assert taken(tmp_path) == 3000


HAMMER = """
import random, sys
from pipeline import cache
cache.BLOCK_BYTES = 1000
shard = open(sys.argv[2], "rb").read()
cached, rng = cache.ShardCache(sys.argv[1], 30_000, "digest"), random.Random(int(sys.argv[3]))
while True:
    number, offset = rng.randrange(6), rng.randrange(len(shard))
    num_bytes = rng.randint(1, min(3000, len(shard) - offset))
    found = cached.read(number, len(shard), offset, num_bytes, lambda at, n: shard[at : at + n])
    if found != shard[offset : offset + num_bytes]:
        print("torn", number, offset, num_bytes, flush=True)
    if rng.random() < 0.05:
        cached.drop(number, offset, num_bytes)
"""


@pytest.mark.slow
def test_processes_share_it_and_may_be_killed_at_any_moment(tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(SHARD)
    folder, rng, said = tmp_path / "cache", random.Random(1), b""

    def start(seed: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", HAMMER, str(folder), str(tmp_path / "shard"), str(seed)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    running = [start(seed) for seed in range(3)]
    try:
        for seed in range(3, 15):
            time.sleep(rng.uniform(0.3, 0.6))
            assert taken(folder) <= 30_000 + 3 * BLOCK  # blocks come and go while we look
            victim = running.pop(rng.randrange(len(running)))
            victim.send_signal(signal.SIGKILL)
            said += victim.communicate()[0]
            running.append(start(seed))
    finally:
        for process in running:
            process.kill()
            said += process.communicate()[0]
    assert said == b""
    cached = ShardCache(str(folder), 30_000, "digest")  # counts anew
    assert int((folder / "used").read_text()) == taken(folder) <= 30_000
    assert not list(folder.glob("*/*.part"))
    read(cached, Source(), 0, len(SHARD))


@pytest.fixture
def short_files() -> Iterator[None]:
    """The system refuses to write more than 400 bytes into a file of this process: a real EFBIG, as a full disk has."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_takes_no_more_is_told_once_and_reads_go_on(
    tmp_path: Path, short_files: None, caplog: pytest.LogCaptureFixture
) -> None:
    cached, source = ShardCache(str(tmp_path), 10**6, "digest"), Source()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            read(cached, source, 0, len(SHARD))
    assert source.num_bytes == 2 * len(SHARD)
    assert caplog.text.count("reads go on") == 1
    assert taken(tmp_path) == 0


def test_a_full_disk(tmp_path: Path) -> None:
    mounted = tmp_path / "disk"
    mounted.mkdir()
    options = ["-t", "tmpfs", "-o", "size=8k", "tmpfs"]
    if subprocess.run(["mount", *options, str(mounted)], capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        cached, source = ShardCache(str(mounted), 10**6, "digest"), Source()
        for _ in range(2):
            read(cached, source, 0, len(SHARD))
        assert source.num_bytes > len(SHARD)
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


def test_a_folder_that_vanishes(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    cached, source = ShardCache(str(folder), 10**6, "digest"), Source()
    read(cached, source, 0, 5000)
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()
    assert cached.read(3, len(SHARD), 0, len(SHARD), source) == SHARD


class CountingStore(Store):
    num_bytes = 0

    def read_range(self, path: str, offset: int, num_bytes: int, pin: Pin | None = None) -> bytes:
        data = super().read_range(path, offset, num_bytes, pin)
        self.num_bytes += len(data)
        return data


def epochs(dataset: Dataset, config: DataConfig, num_epochs: int = 2) -> list[torch.Tensor]:
    with Loader(dataset, config) as loader:
        return [next(loader).images for _ in range(num_epochs * dataset.num_samples // config.global_batch_size)]


def test_a_loader_gives_the_same_pixels_and_reads_the_store_once(dataset_folder: Path, tmp_path: Path) -> None:
    dataset = open_dataset(str(dataset_folder))
    store = CountingStore(str(dataset_folder))
    config = replace(CONFIG, cache_dir=str(tmp_path / "cache"))
    expected = epochs(dataset, CONFIG)
    for _ in range(2):
        found = epochs(Dataset(store, dataset.manifest), config)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert store.num_bytes <= sum(shard.num_bytes for shard in dataset.manifest.shards)
    # A flipped bit on the node's disk is neither a damaged sample nor a wrong pixel.
    for block in (tmp_path / "cache").glob("*/*-*"):
        data = bytearray(block.read_bytes())
        data[len(data) // 2] ^= 1
        block.write_bytes(data)
    with Loader(Dataset(store, dataset.manifest), config) as loader:
        batches = [next(loader) for _ in range(len(expected))]
        assert loader.stats().cached_bytes > 0
    assert all(torch.equal(batch.images, b) for batch, b in zip(batches, expected, strict=True))
    assert not any(batch.quarantined for batch in batches)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"cache_dir": "s3://bucket/cache"}, "no URL"), ({"cache_bytes": 5}, r"data\.cache_bytes \(5\) must be at least")],
)
def test_values_out_of_range(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


def test_a_folder_that_cannot_be_made_is_named(dataset_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = replace(CONFIG, cache_dir=str(tmp_path / "file" / "cache"))
    with pytest.raises(ValueError, match=r"data\.cache_dir \(.*file/cache\) must be a folder that can be written"):
        Loader(open_dataset(str(dataset_folder)), config)
