from __future__ import annotations

import pickle
import threading
import time
import tracemalloc
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipeline
from pipeline.config import DataConfig
from pipeline.dataset import Dataset, open_dataset
from pipeline.errors import ManifestError, ShardError
from pipeline.manifest import Manifest, ShardIndex, ShardInfo
from pipeline.store import Store
from pipeline.store_backend import Pin


def dataset_of(sizes: list[int], **options: int) -> Dataset:
    shards = tuple(ShardInfo(f"shard-{i:06d}", n, 10_240, *["a" * 64] * 3) for i, n in enumerate(sizes))
    return Dataset(Store("/nowhere"), Manifest(sum(sizes), 0, None, {}, shards, ()), **options)


def index_of(num_samples: int) -> ShardIndex:
    zeros = np.zeros(num_samples, np.int64)
    return ShardIndex(zeros.astype(str), *[zeros] * 6)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.data())
def test_locate_counts_through_the_shards(sizes: list[int], data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, sum(sizes) - 1)))
    shards, rows = dataset_of(sizes).locate(ids)
    starts = [0, *accumulate(sizes)]
    assert shards.tolist() == [bisect_right(starts, i) - 1 for i in ids]
    assert rows.tolist() == [i - starts[bisect_right(starts, i) - 1] for i in ids]
    assert shards.dtype == rows.dtype == np.int64


@pytest.mark.parametrize("wrong", [-1, 7])
def test_locate_refuses_ids_that_do_not_exist(wrong: int) -> None:
    with pytest.raises(ValueError, match=rf"sample id \({wrong}\) must be in \[0, 7\)"):
        dataset_of([3, 4]).locate([0, wrong])


def test_a_billion_samples_in_a_hundred_thousand_shards_are_located_at_once() -> None:
    dataset = dataset_of([10_000] * 100_000)
    start = time.perf_counter()
    shards, rows = dataset.locate(np.arange(0, 10**9, 10**4) + 17)
    assert time.perf_counter() - start < 1
    np.testing.assert_array_equal(shards, np.arange(100_000))
    assert set(rows.tolist()) == {17}


def test_every_sample_is_the_file_it_came_from(small_photos: Path, whole_dataset: Path) -> None:
    dataset = pipeline.open_dataset(str(whole_dataset))
    files = {path.read_bytes(): path for path in small_photos.rglob("*.JPG")}
    assert dataset.num_samples == len(files) == 28
    assert dataset.classes == ("100%25", "cat", "hot dog", "ünï.d")
    assert len(dataset.manifest.shards) > 2
    found = set()
    for sample_id in range(dataset.num_samples):
        path = files[dataset.sample_bytes(sample_id)]
        shards, rows = dataset.locate([sample_id])
        label = dataset.index(int(shards[0])).label[rows[0]]
        assert dataset.classes[label] == path.parent.name
        found.add(path)
    assert found == set(files.values())


def test_step_sample_ids_are_pure_and_cover_the_dataset_once(whole_dataset: Path) -> None:
    dataset = open_dataset(str(whole_dataset))
    config = DataConfig(global_batch_size=4, num_lanes=2)
    steps = [dataset.step_sample_ids(config, step) for step in range(14)]
    assert sorted(np.concatenate(steps[:7]).tolist()) == list(range(28))
    assert sorted(np.concatenate(steps[7:]).tolist()) == list(range(28))
    np.testing.assert_array_equal(open_dataset(str(whole_dataset)).step_sample_ids(config, 9), steps[9])
    other = dataset.step_sample_ids(replace(config, seed=1), 9)
    assert other.tolist() != steps[9].tolist()
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(dataset)).step_sample_ids(config, 9), steps[9])


def test_a_flipped_bit_a_cut_and_a_missing_shard_are_shard_errors(dataset_folder: Path) -> None:
    dataset = open_dataset(str(dataset_folder))
    sample_bytes = lambda sample_id: open_dataset(str(dataset_folder)).sample_bytes(sample_id)  # noqa: E731
    tar = dataset_folder / "shard-000000.tar"
    data = bytearray(tar.read_bytes())
    last = dataset.manifest.shards[0].num_samples - 1
    data[dataset.index(0).offset[0] + 50] ^= 1
    tar.write_bytes(data)
    with pytest.raises(ShardError, match=r"shard-000000\.tar, sample '.*' \(id 0\): crc32c"):
        sample_bytes(0)
    assert sample_bytes(1)
    tar.write_bytes(data[: dataset.index(0).offset[last] + 10])
    with pytest.raises(ShardError, match=r"shard-000000\.tar should hold \d+ bytes and holds .* returned 10; .*verify"):
        sample_bytes(last)
    tar.unlink()
    with pytest.raises(ShardError, match=r"shard-000000\.tar is missing"):
        sample_bytes(1)


def test_a_shard_that_is_written_anew_while_it_is_read_is_an_error(
    dataset_folder: Path, store_url: str, store: Store
) -> None:
    for path in dataset_folder.rglob("*"):
        if path.is_file():
            store.write(str(path.relative_to(dataset_folder)), path.read_bytes())
    dataset = open_dataset(store_url)
    whole = dataset.sample_bytes(0)
    tar = bytearray(store.read("shard-000000.tar"))
    tar[int(dataset.index(0).offset[1])] ^= 1  # sample 0 stays what it was, and its checksum too
    time.sleep(1.1)  # some servers tell versions by the second
    store.write("shard-000000.tar", bytes(tar))
    with pytest.raises(ShardError, match=r"shard-000000\.tar is not the object that was read before: .*written anew"):
        dataset.sample_bytes(0)
    assert open_dataset(store_url).sample_bytes(0) == whole


class FlippingStore(Store):
    """The first of two reads of the same bytes comes damaged."""

    num_reads = 0

    def read_range(self, path: str, offset: int, num_bytes: int, pin: Pin | None = None) -> bytes:
        data = super().read_range(path, offset, num_bytes, pin)
        self.num_reads += 1
        return data if self.num_reads % 2 == 0 else bytes([data[0] ^ 1]) + data[1:]


def test_a_fault_on_the_way_is_read_once_more(whole_dataset: Path) -> None:
    dataset = open_dataset(str(whole_dataset))
    store = FlippingStore(str(whole_dataset))
    assert Dataset(store, dataset.manifest).sample_bytes(5) == dataset.sample_bytes(5)
    assert store.num_reads == 2


def test_opening_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no finished dataset"):
        open_dataset(str(tmp_path))


def test_indexes_of_different_shards_load_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    both_loading = threading.Barrier(2, timeout=10)

    def read_index(store: Store, info: ShardInfo) -> ShardIndex:
        both_loading.wait()  # breaks unless two threads are here at once
        return index_of(info.num_samples)

    monkeypatch.setattr("pipeline.dataset.read_index", read_index)
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(dataset_of([3, 4]).index, [0, 1])
    assert (len(first), len(second)) == (3, 4)


def test_one_index_is_loaded_once_and_a_failure_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []

    def read_index(store: Store, info: ShardInfo) -> ShardIndex:
        loads.append(info.name)
        time.sleep(0.05)
        if len(loads) == 1:
            raise ShardError("damaged")
        return index_of(info.num_samples)

    monkeypatch.setattr("pipeline.dataset.read_index", read_index)
    dataset = dataset_of([3, 4])
    with pytest.raises(ShardError, match="damaged"):
        dataset.index(0)
    with ThreadPoolExecutor(8) as threads:
        indexes = list(threads.map(dataset.index, [0] * 8))
    assert all(index is indexes[0] for index in indexes)
    assert loads == ["shard-000000"] * 2


def test_the_least_recently_used_index_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []

    def read_index(store: Store, info: ShardInfo) -> ShardIndex:
        loads.append(int(info.name[-6:]))
        return index_of(info.num_samples)

    monkeypatch.setattr("pipeline.dataset.read_index", read_index)
    size = index_of(1).memory_bytes
    dataset = dataset_of([1, 1, 1], index_cache_bytes=2 * size)
    for shard in (0, 1, 0, 2, 0, 1):
        dataset.index(shard)
    assert loads == [0, 1, 2, 1]
    loads.clear()
    dataset = dataset_of([1, 1, 2], index_cache_bytes=2 * size)
    for shard in (0, 1, 2, 2, 0):  # the third is longer, and drops both others
        dataset.index(shard)
    assert loads == [0, 1, 2, 0]
    loads.clear()
    dataset = dataset_of([1, 1], index_cache_bytes=0)
    assert [len(dataset.index(shard)) for shard in (0, 0, 1)] == [1, 1, 1]
    assert loads == [0, 1]


def test_memory_of_an_index_is_what_is_allocated() -> None:
    num = 50_000
    numbers = np.zeros(num, np.int64)
    tracemalloc.start()
    keys = np.array([f"a-class-name/an-image-name-{number:06d}" for number in range(num)], np.dtypes.StringDType())
    index = ShardIndex(keys, *[numbers.astype(np.int32) for _ in range(6)])
    allocated = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert 0.7 * allocated < index.memory_bytes < 1.4 * allocated
