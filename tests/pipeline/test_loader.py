"""The same pixels, masks, ids and labels at a position, however it is reached; damage; threads that end."""

import os
import threading
import time
import traceback
from dataclasses import replace

import google_crc32c
import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import AugmentConfig, Batch, DataConfig, Loader, open_dataset
from pipeline.augment import draw_crops, draw_masks
from pipeline.dataset import Dataset
from pipeline.errors import ShardError
from pipeline.manifest import read_index, write_index, write_manifest
from pipeline.order import Order
from pipeline.reader import Quarantined
from pipeline.sources import open_source
from pipeline.store import Store
from pipeline.write import write_dataset

NUM_SAMPLES = 40
CONFIG = DataConfig(
    global_batch_size=12,
    num_lanes=6,
    shuffle_window_samples=4,
    augment=AugmentConfig(image_size=(32, 48), patch_size=8),
    num_decode_threads=2,
    num_fetches=2,
    fetch_bytes=20_000,
)
FIELDS = ("images", "kept_ids", "masked_ids", "sample_ids", "labels")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("source"), np.random.default_rng(0)
    for number in range(NUM_SAMPLES):
        height, width = rng.integers(40, 120, 2)
        pixels = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        path = root / f"class{number % 3}" / f"{number:03d}.jpg"
        path.parent.mkdir(exist_ok=True)
        exif = Image.Exif()
        if number % 10 == 0:
            exif[0x0112] = 6  # turned by 90 degrees when shown
        Image.fromarray(pixels).resize((width, height)).save(path, quality=90, exif=exif)
    return root


@pytest.fixture
def url(source, tmp_path):
    write_dataset(open_source(str(source)), str(tmp_path / "dataset"), shard_bytes=30_000)
    return tmp_path / "dataset"


Arrays = dict[str, np.ndarray]


def load(url, config: DataConfig = CONFIG, *, start: int = 0, num_steps: int = 10, world_size: int = 1) -> Arrays:
    """All fields of the steps' positions, in position order, put together from the ranks' batches."""
    dataset = open_dataset(str(url))
    order = Order(dataset.samples_per_shard, config)
    rows: list[tuple[int, tuple[np.ndarray, ...]]] = []
    for rank in range(world_size):
        batches = load_rank(dataset, config, rank, world_size, start, num_steps)
        positions = [order.rank_positions(step, rank, world_size) for step in range(start, start + num_steps)]
        fields = [np.concatenate([getattr(batch, name).numpy() for batch in batches]) for name in FIELDS]
        rows += zip(np.concatenate(positions).tolist(), zip(*fields, strict=True), strict=True)
    rows.sort(key=lambda row: row[0])
    assert [position for position, _ in rows] == list(range(start * 12, (start + num_steps) * 12))
    return {name: np.stack([fields[at] for _, fields in rows]) for at, name in enumerate(FIELDS)}


def load_rank(dataset, config, rank: int, world_size: int, start: int, num_steps: int) -> list[Batch]:
    with Loader(dataset, config, dp_rank=rank, dp_world_size=world_size, start_step=start) as loader:
        batches = [next(loader) for _ in range(num_steps * loader.num_micro_steps)]
        expected = [
            (step, micro) for step in range(start, start + num_steps) for micro in range(loader.num_micro_steps)
        ]
        assert [(batch.step, batch.micro_step) for batch in batches] == expected
        assert {batch.num_micro_steps for batch in batches} == {loader.num_micro_steps}
    return batches


def assert_equal(actual: Arrays, expected: Arrays) -> None:
    for name in FIELDS:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)


def test_world_size_threads_micro_batches_and_start_change_nothing(url):
    expected = load(url)
    for world_size in (2, 3, 4):  # 4 ranks hold unequal shares of 6 lanes
        assert_equal(load(url, world_size=world_size), expected)
    for changes in (
        {"num_decode_threads": 1, "num_fetches": 1},
        {"num_decode_threads": 4, "num_fetches": 8, "read_ahead_steps": 5, "fetch_bytes": 1},
        {"micro_batch_size": 5, "prefetch_batches": 1},
        {"micro_batch_size": 1},
    ):
        assert_equal(load(url, replace(CONFIG, **changes)), expected)
    assert_equal(load(url, replace(CONFIG, micro_batch_size=3), world_size=4), expected)
    from_step_4 = load(url, start=4, num_steps=6)
    assert_equal(from_step_4, {name: values[4 * 12 :] for name, values in expected.items()})


def test_a_batch_is_the_orders_images_as_augment_says(url, source):
    dataset = open_dataset(str(url))
    arrays = load(url)
    ids, positions = arrays["sample_ids"], np.arange(120)
    expected_ids = np.concatenate([dataset.step_sample_ids(CONFIG, step) for step in range(10)])
    np.testing.assert_array_equal(ids, expected_ids)
    kept, masked = draw_masks(CONFIG.augment, CONFIG.seed, positions // NUM_SAMPLES, ids)
    np.testing.assert_array_equal(arrays["kept_ids"], kept)
    np.testing.assert_array_equal(arrays["masked_ids"], masked)
    assert sorted(np.concatenate([kept, masked], axis=1)[0]) == list(range(24))
    for position, sample_id in enumerate(ids):
        key = key_of(dataset, sample_id)
        image = Image.open(source / f"{key}.jpg").convert("RGB")
        assert arrays["labels"][position] == int(key[len("class")])
        epoch, size = np.array([position // NUM_SAMPLES]), (np.array([image.height]), np.array([image.width]))
        crop = draw_crops(CONFIG.augment, CONFIG.seed, epoch, np.array([sample_id]), *size)
        top, left, height, width = (int(x[0]) for x in (crop.top, crop.left, crop.height, crop.width))
        expected = image.crop((left, top, left + width, top + height))
        expected = expected.resize((48, height), Image.Resampling.BICUBIC).resize((48, 32), Image.Resampling.BICUBIC)
        pixels = np.asarray(expected)[:, :: -1 if crop.flip[0] else 1].transpose(2, 0, 1)
        assert np.abs(arrays["images"][position].astype(int) - pixels).max() <= 1


def key_of(dataset, sample_id: int) -> str:
    (shard,), (row,) = dataset.locate([sample_id])
    return str(dataset.index(shard).keys[row])


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_every_sample_exactly_once_an_epoch(url, world_size):
    ids = load(url, world_size=world_size)["sample_ids"]
    for epoch in range(3):
        assert sorted(ids[epoch * NUM_SAMPLES : (epoch + 1) * NUM_SAMPLES]) == list(range(NUM_SAMPLES))


def test_a_step_may_span_epochs(url):
    config = replace(CONFIG, global_batch_size=102)
    with Loader(open_dataset(str(url)), config, start_step=1) as loader:
        batch = next(loader)
    ids = batch.sample_ids.numpy()  # positions 102 to 203: epoch 2 from 18 on, 3, 4, and 4 samples of epoch 5
    assert sorted(ids[18:58]) == sorted(ids[58:98]) == list(range(NUM_SAMPLES))
    twice = [np.flatnonzero(ids == sample_id) for sample_id in range(NUM_SAMPLES)]
    assert any(not torch.equal(batch.kept_ids[at[0]], batch.kept_ids[at[1]]) for at in twice)


def test_micro_batches_are_as_even_as_possible(url):
    dataset = open_dataset(str(url))
    config = replace(CONFIG, micro_batch_size=5)
    sizes = [len(batch.images) for batch in load_rank(dataset, config, 0, 1, 0, 2)]
    assert sizes == [4, 4, 4] * 2
    # Of 6 lanes, 2 samples each, ranks 0 and 1 have 2 lanes and ranks 2 and 3 have one.
    config = replace(CONFIG, micro_batch_size=3)
    sizes = {rank: [len(b.images) for b in load_rank(dataset, config, rank, 4, 0, 1)] for rank in range(4)}
    assert sizes == {0: [2, 2], 1: [2, 2], 2: [1, 1], 3: [1, 1]}
    # A rank of one sample a step, and two micro-steps on others: one would be empty.
    config = replace(CONFIG, global_batch_size=6, micro_batch_size=1)
    with pytest.raises(ValueError, match=r"micro_batch_size \(1\) needs 2 micro-batches on a rank that has 1 samples"):
        Loader(dataset, config, dp_rank=0, dp_world_size=4)


def test_batches_have_the_stated_types_and_layout(url):
    with Loader(open_dataset(str(url)), CONFIG) as loader:
        assert iter(loader) is loader
        batch = next(loader)
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (12, 3, 32, 48)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.kept_ids.shape == (12, 6)
    assert batch.masked_ids.shape == (12, 18)
    assert {getattr(batch, name).dtype for name in FIELDS[1:]} == {torch.int64}
    assert batch.quarantined == ()


def overwrite(url, sample_id: int, data: bytes, at: int, *, fix_crc: bool) -> None:
    """Change a sample's bytes in its shard, and its crc in the index so that only decoding can tell."""
    dataset = open_dataset(str(url))
    (shard,), (row,) = dataset.locate([sample_id])
    info, index = dataset.manifest.shards[shard], dataset.index(shard)
    with (url / f"{info.name}.tar").open("r+b") as tar:
        tar.seek(int(index.offset[row]) + at)
        tar.write(data)
        tar.seek(int(index.offset[row]))
        changed = tar.read(int(index.num_bytes[row]))
    if fix_crc:
        index = read_index(dataset.store, info)
        crc32c = index.crc32c.copy()
        crc32c[row] = google_crc32c.value(changed)
        shards = list(dataset.manifest.shards)
        shards[shard] = replace(info, index_sha256=write_index(dataset.store, info.name, replace(index, crc32c=crc32c)))
        write_manifest(dataset.store, replace(dataset.manifest, shards=tuple(shards)))


@pytest.mark.parametrize(("fix_crc", "reason"), [(False, "crc32c"), (True, "not an image")])
def test_damage_is_replaced_alike_everywhere_and_reported(url, fix_crc, reason):
    clean = load(url)
    overwrite(url, 17, b"<html>no such bucket</html>", 0, fix_crc=fix_crc)
    dataset = open_dataset(str(url))
    batches = load_rank(dataset, CONFIG, 0, 1, 0, 10)
    reports = [report for batch in batches for report in batch.quarantined]
    damaged = load(url)
    expected = [
        Quarantined(int(at) // 12, 17, int(damaged["sample_ids"][at]), reports[number].reason)
        for number, at in enumerate(np.flatnonzero(clean["sample_ids"] == 17))
    ]
    assert len(reports) == 3
    assert reports == expected
    assert all(reason in report.reason for report in reports)
    assert 17 not in damaged["sample_ids"]
    for other in (load(url), load(url, world_size=3), load(url, replace(CONFIG, micro_batch_size=2))):
        assert_equal(other, damaged)
    from_step_3 = load(url, start=3, num_steps=7)
    assert_equal(from_step_3, {name: values[3 * 12 :] for name, values in damaged.items()})
    for at in range(120):
        # A replacement is augmented as it is at its own place in that epoch; everything else is as it was.
        epoch = slice(at // NUM_SAMPLES * NUM_SAMPLES, (at // NUM_SAMPLES + 1) * NUM_SAMPLES)
        (source,) = np.flatnonzero(clean["sample_ids"][epoch] == damaged["sample_ids"][at])
        for name in FIELDS:
            np.testing.assert_array_equal(damaged[name][at], clean[name][epoch][source])


def test_damage_found_by_crc_and_by_decoding_share_one_bound(url):
    overwrite(url, 5, b"junk", 100, fix_crc=False)
    overwrite(url, 6, b"<html>", 0, fix_crc=True)
    dataset = open_dataset(str(url))
    load_rank(dataset, replace(CONFIG, max_bad_samples=2), 0, 1, 0, 8)
    with pytest.raises(ShardError, match=r"2 damaged samples .* data\.max_bad_samples \(1\)"):
        load_rank(dataset, replace(CONFIG, max_bad_samples=1), 0, 1, 0, 8)


def test_too_many_bad_images_end_iteration_for_good(url):
    for sample_id in (5, 6):
        overwrite(url, sample_id, b"<html>", 0, fix_crc=True)
    with Loader(open_dataset(str(url)), replace(CONFIG, max_bad_samples=1)) as loader:
        with pytest.raises(ShardError, match="2 damaged samples"):
            list(loader)
        with pytest.raises(ShardError, match="2 damaged samples"):  # not the batch after it
            next(loader)


def test_a_truncated_shard_ends_iteration_with_its_name_and_the_original_traceback(url):
    dataset = open_dataset(str(url))
    info = dataset.manifest.shards[1]
    with (url / f"{info.name}.tar").open("r+b") as tar:
        tar.truncate(2000)
    with Loader(dataset, CONFIG) as loader:
        with pytest.raises(ShardError, match=f"{info.name}.*{info.num_bytes} bytes and holds 2000") as caught:
            for _ in loader:
                pass
        assert "read_rows" in "".join(traceback.format_tb(caught.tb))
        with pytest.raises(ShardError):  # and again, instead of waiting for a batch that never comes
            next(loader)


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("tarmac-")]


def test_closing_ends_all_threads_at_once(url):
    loader = Loader(open_dataset(str(url)), replace(CONFIG, prefetch_batches=1))
    next(loader)
    time.sleep(0.2)  # now the queue is full and the decoding thread waits for room
    assert loader_threads()
    started = time.perf_counter()
    loader.close()
    assert time.perf_counter() - started < 1
    assert loader_threads() == []
    with pytest.raises(StopIteration):
        next(loader)
    loader.close()


def test_closing_does_not_wait_for_a_read_that_hangs(url):
    dataset = open_dataset(str(url))
    path = url / f"{dataset.manifest.shards[0].name}.tar"
    data = path.read_bytes()
    path.unlink()
    os.mkfifo(path)  # whoever opens it waits for a writer
    loader = Loader(dataset, CONFIG)
    consumer = threading.Thread(target=lambda: list(loader))
    consumer.start()
    time.sleep(0.2)
    started = time.perf_counter()
    loader.close()
    assert time.perf_counter() - started < 1
    consumer.join(1)
    assert not consumer.is_alive()
    while loader_threads():  # let the readers go
        pipe = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        os.write(pipe, data[:1000])
        os.close(pipe)
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dp_world_size": 7}, r"dp_world_size \(7\) must be at most data.num_lanes \(6\)"),
        ({"dp_world_size": 0}, r"dp_world_size \(0\) must be at least 1"),
        ({"dp_rank": 2, "dp_world_size": 2}, r"dp_rank \(2\) must be in"),
        ({"start_step": -1}, r"start_step \(-1\)"),
    ],
)
def test_arguments_out_of_range(url, arguments, message):
    with pytest.raises(ValueError, match=message):
        Loader(open_dataset(str(url)), CONFIG, **arguments)
    with pytest.raises(ValueError, match="decode_device"):
        Loader(open_dataset(str(url)), replace(CONFIG, decode_device="mixed"))


def test_stats_say_where_the_time_went(url):
    with Loader(open_dataset(str(url)), replace(CONFIG, prefetch_batches=1)) as loader:
        for _ in range(3):
            next(loader)
        time.sleep(0.5)  # a slow model
        next(loader)
        next(loader)
        stats = loader.stats()
    assert stats.num_batches == 5
    assert stats.full_s > 0.3
    assert stats.decode_s > 0
    assert stats.fetched_bytes > 0


class SlowStore(Store):
    """Its first range takes a while."""

    num_reads = 0

    def read_range(self, path, offset, num_bytes, pin=None):
        self.num_reads += 1
        time.sleep(0.5 if self.num_reads == 1 else 0)
        return super().read_range(path, offset, num_bytes, pin)


class HangingStore(Store):
    """Answers `num_reads` reads; the others wait until `release` is set."""

    num_reads = 0
    release = threading.Event()

    def read_range(self, path, offset, num_bytes, pin=None):
        self.num_reads -= 1
        if self.num_reads < 0:
            self.release.wait()
        return super().read_range(path, offset, num_bytes, pin)


def test_a_batch_is_handed_out_before_the_bytes_of_the_next_one_are_there(url):
    config = replace(CONFIG, shuffle_window_samples=2, fetch_bytes=1)  # a read a sample
    with Loader(open_dataset(str(url)), config) as loader:
        expected = [next(loader).images for _ in range(2)]
    store = HangingStore(str(url))
    store.num_reads = 2 * 12 + 6  # two steps, and some of the third
    with Loader(Dataset(store, open_dataset(str(url)).manifest), config) as loader:
        found = [next(loader).images for _ in range(2)]
        store.release.set()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_stats_tell_a_slow_store(url):
    dataset = Dataset(SlowStore(str(url)), open_dataset(str(url)).manifest)
    started = time.perf_counter()
    with Loader(dataset, CONFIG) as loader:
        batch = next(loader)
        ended = time.perf_counter()
        stats = loader.stats()
    assert stats.wait_s > 0.4
    assert stats.fetch_wait_s > 0.4
    assert started + 0.4 < batch.fetched_at < ended
    assert 0 < batch.copy_s < ended - batch.fetched_at
