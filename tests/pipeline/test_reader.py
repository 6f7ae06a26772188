"""Which bytes are read, how often, in which order, and what becomes of damage. On local files; no decoding."""

import io
import threading
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from pipeline.config import DataConfig
from pipeline.dataset import Dataset, open_dataset
from pipeline.errors import ShardError
from pipeline.order import Order, Run
from pipeline.reader import EncodedSample, Quarantined, Reader, ReaderClosedError
from pipeline.sources import open_source
from pipeline.store import Store
from pipeline.store_backend import Pin
from pipeline.write import write_dataset

NUM_SAMPLES = 90
CONFIG = DataConfig(
    global_batch_size=12, num_lanes=6, shuffle_window_samples=8, fetch_bytes=8000, num_fetches=3, read_ahead_steps=2
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Images of many sizes in three class folders, and one that is longer than `fetch_bytes`."""
    root, rng = tmp_path_factory.mktemp("source"), np.random.default_rng(0)
    for number in range(NUM_SAMPLES):
        height, width = (150, 200) if number == 7 else rng.integers(16, 60, 2)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        path = root / f"class{number % 3}" / f"{number:03d}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path, quality=60)
    return root


@pytest.fixture
def url(source, tmp_path):
    write_dataset(open_source(str(source)), str(tmp_path / "dataset"), shard_bytes=40_000)
    return tmp_path / "dataset"


class SpyStore(Store):
    """Notes ranged reads of shards; `damage` may change what one returns."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.reads: list[tuple[str, int, int]] = []
        self.in_flight = self.most_in_flight = 0
        self.damage = lambda data, place: data

    def read_range(self, path: str, offset: int, num_bytes: int, pin: Pin | None = None) -> bytes:
        self.reads.append((path, offset, num_bytes))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        threading.Event().wait(0.001)
        data = super().read_range(path, offset, num_bytes, pin)
        self.in_flight -= 1
        return self.damage(data, (path, offset))


def spied(url) -> Dataset:
    dataset = open_dataset(str(url))
    return Dataset(SpyStore(str(url)), dataset.manifest)


def ids_of(dataset: Dataset, run: Run) -> range:
    first = int(dataset.samples_per_shard[: run.shard].sum()) + run.first_row
    return range(first, first + run.num_rows)


def ids_within(dataset: Dataset, read: tuple[str, int, int]) -> list[int]:
    """Samples that a ranged read covers whole."""
    path, offset, num_bytes = read
    shard = [f"{info.name}.tar" for info in dataset.manifest.shards].index(path)
    index = dataset.index(shard)
    inside = (index.offset >= offset) & (index.offset + index.num_bytes <= offset + num_bytes)
    return [ids_of(dataset, Run(shard, int(row), 1))[0] for row in np.flatnonzero(inside)]


def read(dataset, config=CONFIG, *, rank=0, world_size=1, start=0, num_steps=1) -> list[list[EncodedSample]]:
    reader = Reader(dataset, config, rank=rank, world_size=world_size, start_step=start)
    try:
        return [reader.read_step() for _ in range(num_steps)]
    finally:
        reader.close()


@pytest.mark.parametrize("global_batch_size", [6, 12, 204])  # the last: a step spans three epochs
@pytest.mark.parametrize("world_size", [1, 4])
def test_every_position_gets_its_own_bytes(url, source, global_batch_size, world_size):
    config = DataConfig(global_batch_size=global_batch_size, num_lanes=6, shuffle_window_samples=8)
    dataset = open_dataset(str(url))
    order = Order(dataset.samples_per_shard, config)
    for rank in range(world_size):
        steps = read(dataset, config, rank=rank, world_size=world_size, start=3, num_steps=4)
        for step, samples in enumerate(steps, start=3):
            positions = order.rank_positions(step, rank, world_size)
            assert [s.sample_id for s in samples] == order.sample_ids(positions).tolist()
            assert [s.epoch for s in samples] == (positions // NUM_SAMPLES).tolist()
            for sample in samples:
                (shard,), (row,) = dataset.locate([sample.sample_id])
                key = str(dataset.index(shard).keys[row])
                original = (source / f"{key}.jpg").read_bytes()
                assert sample.data == original
                assert (sample.width, sample.height) == Image.open(io.BytesIO(original)).size
                assert sample.label == int(key[len("class")])
                assert sample.step == step
                assert sample.reason is None


def test_an_epoch_is_read_once_in_large_ranges(url):
    config = DataConfig(global_batch_size=6, num_lanes=6, shuffle_window_samples=8, read_ahead_steps=2)
    dataset = spied(url)
    order = Order(dataset.samples_per_shard, config)
    read(dataset, config, num_steps=15)  # epoch 0, and the read-ahead begins epoch 1
    windows = order.windows(np.arange(17 * 6))
    assert {window.epoch for window in windows} == {0, 1}
    # These windows are shorter than fetch_bytes: one read a run of consecutive rows, and none twice.
    assert len(dataset.store.reads) <= sum(len(window.runs) for window in windows)
    times_read = Counter(id_ for read in dataset.store.reads for id_ in ids_within(dataset, read))
    times_needed = Counter(id_ for window in windows for run in window.runs for id_ in ids_of(dataset, run))
    assert Counter(range(NUM_SAMPLES)) <= times_read <= times_needed


def test_reads_are_cut_at_sample_borders_and_bounded(url):
    dataset = spied(url)
    read(dataset, num_steps=8)
    reads = [(num_bytes, ids_within(dataset, (path, at, num_bytes))) for path, at, num_bytes in dataset.store.reads]
    assert all(ids for _, ids in reads)
    assert any(len(ids) > 1 for _, ids in reads)
    # Longer than fetch_bytes only for one sample by itself.
    assert {len(ids) for num_bytes, ids in reads if num_bytes > CONFIG.fetch_bytes} == {1}
    assert 1 < dataset.store.most_in_flight <= CONFIG.num_fetches


def test_reading_ahead_is_bounded(url):
    dataset = spied(url)
    reader = Reader(dataset, CONFIG, rank=0, world_size=2, start_step=0)
    handed_out = 0
    for _ in range(40):
        handed_out += len(reader.read_step())
        fetched = sum(len(ids_within(dataset, read)) for read in list(dataset.store.reads))
        assert fetched - handed_out <= 3 * (3 * 2 + 2 * 8)  # the docstring's bound, for 3 lanes
    reader.close()


def test_a_start_in_the_middle_reads_what_its_first_step_needs_first(url):
    config = DataConfig(global_batch_size=6, num_lanes=6, shuffle_window_samples=8, fetch_bytes=2000, num_fetches=1)
    dataset = spied(url)
    (samples,) = read(dataset, config, start=5)
    needed = {sample.sample_id for sample in samples}
    first_reads = dataset.store.reads[: len(needed)]  # at most one read a sample
    assert needed <= {id_ for read in first_reads for id_ in ids_within(dataset, read)}


def flip_byte(url, dataset: Dataset, sample_id: int) -> None:
    (shard,), (row,) = dataset.locate([sample_id])
    index = dataset.index(shard)
    with (url / f"{dataset.manifest.shards[shard].name}.tar").open("r+b") as tar:
        tar.seek(int(index.offset[row] + index.num_bytes[row] // 2))
        byte = tar.read(1)
        tar.seek(-1, io.SEEK_CUR)
        tar.write(bytes([byte[0] ^ 1]))


def test_a_damaged_sample_is_replaced_the_same_way_everywhere(url, caplog):
    dataset = open_dataset(str(url))
    clean = [s for samples in read(dataset, num_steps=10) for s in samples]
    flip_byte(url, dataset, 33)
    dataset = open_dataset(str(url))
    runs = [
        [s for samples in read(dataset, rank=rank, world_size=world_size, start=start, num_steps=10) for s in samples]
        for rank, world_size, start in [(0, 1, 0), (0, 1, 0), (0, 1, 4), (0, 2, 0), (1, 2, 0)]
    ]
    replaced = [s for samples in runs for s in samples if s.wanted_id != s.sample_id]
    by_epoch = {(s.epoch, s.step, s.sample_id, s.data) for s in replaced}
    assert {s.wanted_id for s in replaced} == {33}
    assert len({epoch for epoch, *_ in by_epoch}) == len(by_epoch)  # one replacement an epoch, whoever reads it
    assert all("crc32c" in s.reason and s.num_replacements == 1 for s in replaced)
    originals = {s.sample_id: s.data for s in clean}
    assert all(s.data == originals[s.sample_id] for samples in runs for s in samples)
    assert len([s for s in runs[0] if s.sample_id == s.wanted_id]) == len(clean) - len(
        [s for s in clean if s.wanted_id == 33]
    )
    assert "sample 33 is damaged (crc32c" in caplog.text


def test_a_fault_on_the_way_is_not_a_damaged_sample(url):
    dataset = spied(url)
    seen = set()

    def damage_first_read(data: bytes, place: tuple[str, int]) -> bytes:
        damaged, _ = place not in seen, seen.add(place)
        return bytes([data[0] ^ 1]) + data[1:] if damaged else data

    dataset.store.damage = damage_first_read
    samples = [s for step in read(dataset, num_steps=4) for s in step]
    assert [s.sample_id for s in samples] == [s.wanted_id for s in samples]
    assert samples == [s for step in read(open_dataset(str(url)), num_steps=4) for s in step]


def test_too_many_damaged_samples_end_the_run(url):
    dataset = open_dataset(str(url))
    bad = {2, 3, 14, 15, 65}
    for sample_id in bad:
        flip_byte(url, dataset, sample_id)
    enough = DataConfig(global_batch_size=15, num_lanes=15, shuffle_window_samples=8, max_bad_samples=5)
    samples = [s for step in read(dataset, enough, num_steps=18) for s in step]
    # Three epochs: the same five samples each time, which count once.
    assert sorted(s.wanted_id for s in samples if s.reason) == sorted([*bad] * 3)
    assert not bad & {s.sample_id for s in samples}
    fewer = DataConfig(global_batch_size=15, num_lanes=15, shuffle_window_samples=8, max_bad_samples=4)
    with pytest.raises(ShardError, match=r"5 damaged samples .* data\.max_bad_samples \(4\).*tarmac verify"):
        read(dataset, fewer, num_steps=18)


def test_a_truncated_shard_is_named_with_its_sizes(url):
    dataset = open_dataset(str(url))
    info = dataset.manifest.shards[1]
    with (url / f"{info.name}.tar").open("r+b") as tar:
        tar.truncate(10_000)
    with pytest.raises(ShardError, match=rf"{info.name}\.tar should hold {info.num_bytes} bytes and holds 10000"):
        read(dataset, num_steps=10)


def test_a_missing_shard_is_named(url):
    dataset = open_dataset(str(url))
    info = dataset.manifest.shards[2]
    (url / f"{info.name}.tar").unlink()
    with pytest.raises(ShardError, match=rf"{info.name}\.tar is missing; it should hold {info.num_bytes} bytes"):
        read(dataset, num_steps=10)


def test_a_damaged_index_ends_the_run_when_its_step_comes(url):
    dataset = open_dataset(str(url))
    order = Order(dataset.samples_per_shard, CONFIG)
    first_use: dict[int, int] = {}
    for step in range(20):
        for window in order.windows(order.rank_positions(step, 0, 6)):
            for run in window.runs:
                first_use.setdefault(run.shard, step)
    shard = max(first_use, key=first_use.__getitem__)
    assert first_use[shard] > 1
    (url / "index" / f"{dataset.manifest.shards[shard].name}.parquet").write_bytes(b"PAR1")
    reader = Reader(dataset, CONFIG, rank=0, world_size=6, start_step=0)
    for _ in range(first_use[shard]):
        reader.read_step()
    with pytest.raises(ShardError, match=dataset.manifest.shards[shard].name):
        reader.read_step()
    reader.close()


def test_closing_wakes_whoever_waits(url):
    dataset = spied(url)
    release, outcome = threading.Event(), []
    dataset.store.damage = lambda data, place: data if release.wait(30) else b""
    reader = Reader(dataset, CONFIG, rank=0, world_size=1, start_step=0)

    def wait() -> None:
        for _ in range(2):
            try:
                outcome.append(reader.read_step())
            except ReaderClosedError as error:
                outcome.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    while not dataset.store.reads:
        release.wait(0.01)
    reader.close()
    thread.join(1)
    release.set()
    assert [type(item) for item in outcome] == [ReaderClosedError, ReaderClosedError]


def test_quarantined_is_a_plain_record():
    assert Quarantined(3, 4, 5, "why") == Quarantined(step=3, sample_id=4, replacement_id=5, reason="why")
