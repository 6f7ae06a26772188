"""The real loader on a real S3 server behind a proxy that misbehaves: the same images, or a clear error; no hang."""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from faulty_proxy import Action, Faults, start_faulty_proxy

from cluster.local_s3 import S3Server
from pipeline import AugmentConfig, Batch, DataConfig, Loader, StoreConfig, open_dataset
from pipeline.dataset import Dataset
from pipeline.errors import ShardError, StoreError, StoreRefusedError
from pipeline.reader import Reader
from pipeline.store import Store

CONFIG = DataConfig(
    global_batch_size=8,
    num_lanes=4,
    shuffle_window_samples=4,
    augment=AugmentConfig(image_size=(32, 32)),
    num_decode_threads=1,
    num_fetches=4,
    fetch_bytes=4096,  # many reads
    max_bad_samples=0,
)
IMPATIENT = StoreConfig(read_timeout_s=0.5, deadline_s=20)
NUM_STEPS = 8  # over two borders of epochs of 28 samples
HANG_S = 60
KEYS = ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY")


@pytest.fixture
def dataset_url(bucket: str, whole_dataset: Path) -> str:
    upload(bucket, whole_dataset)
    return bucket


def upload(url: str, folder: Path) -> None:
    store = Store(url)
    for path in folder.rglob("*"):
        if path.is_file():
            store.write(str(path.relative_to(folder)), path.read_bytes())


def load(url: str, num_steps: int = NUM_STEPS, config: DataConfig = CONFIG) -> list[Batch]:
    begin = time.monotonic()
    with Loader(open_dataset(url, IMPATIENT), config) as loader:
        batches = [next(loader) for _ in range(num_steps)]
    assert time.monotonic() - begin < HANG_S
    return batches


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.sample_ids, b.sample_ids)
        assert torch.equal(a.images, b.images)
        assert not a.quarantined


AT_ONCE: tuple[Action, ...] = ("503", "500", "429", "reset", "cut the body", "lose the answer")
AFTER_A_WHILE: tuple[Action, ...] = ("say nothing", "stall in the body", "trickle", "flip a bit")


@pytest.mark.parametrize("action", [*AT_ONCE, *AFTER_A_WHILE])
def test_what_passes_leaves_no_trace(dataset_url: str, whole_dataset: Path, faults: Faults, action: Action) -> None:
    expected = load(str(whole_dataset))
    every = 4 if action in AT_ONCE else 12
    faults.repeated.append(("GET", ".tar", action, every))
    assert_same(load(dataset_url), expected)
    assert faults.num_matches[0] >= 2 * every  # it did happen


def test_a_burst_of_slow_down(dataset_url: str, whole_dataset: Path, faults: Faults) -> None:
    faults.planned += [("GET", ".tar", "503")] * 12
    assert_same(load(dataset_url), load(str(whole_dataset)))
    assert not faults.planned


def failure(url: str, kind: type[Exception], begin_fault: Callable[[], None]) -> str:
    """After two steps `begin_fault` happens; then the loader has to end with that error, and soon. Its message."""
    # Opened with patience: on a busy machine a sound server may need these seconds too.
    dataset = Dataset(Store(url, replace(IMPATIENT, deadline_s=6)), open_dataset(url).manifest)
    with Loader(dataset, CONFIG) as loader:
        for _ in range(2):
            next(loader)
        begin_fault()
        begin = time.monotonic()
        with pytest.raises(kind) as raised:
            list(islice(loader, 40))
        assert time.monotonic() - begin < HANG_S
    return str(raised.value)


def test_a_shard_that_is_deleted(dataset_url: str, faults: Faults) -> None:
    store = Store(dataset_url)

    def delete() -> None:
        for entry in store.list():
            if entry.path.endswith(".tar"):
                store.remove(entry.path)

    assert re.search(r"shard-\d+\.tar is missing.*tarmac verify", failure(dataset_url, ShardError, delete))


def test_a_dataset_that_is_written_anew(dataset_url: str, faults: Faults) -> None:
    store = Store(dataset_url)

    def rewrite() -> None:
        time.sleep(1.1)  # some servers tell versions by the second
        for entry in store.list():
            if entry.path.endswith(".tar"):
                data = bytearray(store.read(entry.path))
                data[100:108] = b"0000600\0"  # the mode of the first file: no sample's bytes
                store.write(entry.path, bytes(data))

    assert re.search(r"is not the object that was read before.*written anew", failure(dataset_url, ShardError, rewrite))


def test_another_version_of_an_object(dataset_url: str, faults: Faults) -> None:
    def serve() -> None:
        faults.repeated.append(("GET", ".tar", "another version", 1))

    assert re.search(r"is not the object that was read before.*written anew", failure(dataset_url, ShardError, serve))


CREDENTIALS = """
import datetime, json, pathlib, sys
counter = pathlib.Path(sys.argv[1])
number = len(counter.read_bytes()) if counter.exists() else 0
counter.write_bytes(bytes(number + 1))
soon = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=2)
print(json.dumps({
    "Version": 1, "AccessKeyId": sys.argv[2], "SecretAccessKey": sys.argv[3], "SessionToken": f"token-{number}",
    "Expiration": soon.isoformat(),
}))
"""


def test_credentials_that_are_renewed(
    moto_server: S3Server, whole_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = moto_server.environment()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    upload(bucket := "s3://tests/renewed", whole_dataset)
    expected = load(str(whole_dataset))
    script, keys = tmp_path / "credentials.py", [environment[f"AWS_{key}"] for key in KEYS]
    script.write_text(CREDENTIALS)
    process = [sys.executable, str(script), str(tmp_path / "count"), *keys]
    (tmp_path / "config").write_text(f"[default]\ncredential_process = {shlex.join(process)}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    for key in KEYS:
        monkeypatch.delenv(f"AWS_{key}")
    with start_faulty_proxy(moto_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        with Loader(open_dataset(bucket), CONFIG) as loader:
            found = [next(loader)]
            time.sleep(2.5)  # those it began with are void by now
            found += [next(loader) for _ in range(NUM_STEPS - 1)]
    assert_same(found, expected)
    assert len(set(proxy.tokens)) >= 2
    assert all(token.startswith("token-") for token in proxy.tokens)


@pytest.mark.parametrize(("action", "match"), [("403", "AccessDenied"), ("expired", "token has expired")])
def test_credentials_that_expire(dataset_url: str, faults: Faults, action: Action, match: str) -> None:
    def expire() -> None:
        faults.repeated.append(("GET", ".tar", action, 1))

    assert re.search(
        rf"access refused.*{match}.*check the credentials", failure(dataset_url, StoreRefusedError, expire)
    )
    faults.repeated.clear()
    load(dataset_url, 2)  # with credentials that hold, the next process goes on


@pytest.mark.parametrize("action", ["503", "reset", "say nothing", "stall in the body", "trickle"])
def test_a_store_that_is_down_for_good_ends_the_run_at_the_deadline(
    dataset_url: str, faults: Faults, action: Action
) -> None:
    def down() -> None:
        faults.repeated.append(("GET", ".tar", action, 1))

    assert re.search(r"gave up after 8 tries or 6 s.*store\.deadline_s", failure(dataset_url, StoreError, down))


def test_an_object_that_is_always_damaged_is_quarantined_and_bounded(dataset_url: str, faults: Faults) -> None:
    faults.repeated.append(("GET", "shard-000001.tar", "flip a bit", 1))
    batches = load(dataset_url, config=replace(CONFIG, max_bad_samples=20))
    reports = [report for batch in batches for report in batch.quarantined]
    assert reports
    assert all("crc32c" in report.reason for report in reports)
    again = load(dataset_url, config=replace(CONFIG, max_bad_samples=20, fetch_bytes=8192, num_fetches=1))
    assert {report.sample_id for batch in again for report in batch.quarantined}
    with pytest.raises(ShardError, match=r"damaged samples .* more than data\.max_bad_samples \(0\)"):
        load(dataset_url)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_an_epoch_reads_each_byte_once_whatever_the_world_size(
    dataset_url: str, faults: Faults, world_size: int
) -> None:
    num_epochs = 24  # so that what is read ahead at the end, at most one more, is little
    config = replace(CONFIG, global_batch_size=7, num_lanes=7, fetch_bytes=2**20, read_ahead_steps=1)
    dataset = open_dataset(dataset_url)
    indexes = [dataset.index(shard) for shard in range(len(dataset.manifest.shards))]
    for rank in range(world_size):
        reader = Reader(dataset, config, rank=rank, world_size=world_size, start_step=0)
        for _ in range(num_epochs * dataset.num_samples // 7):
            reader.read_step()
        reader.close()
    sent = sum(num_bytes for path, num_bytes in faults.num_sent.items() if path.endswith(".tar"))
    images = num_epochs * sum(int(index.num_bytes.sum()) for index in indexes)
    spans = num_epochs * sum(int(index.offset[-1] + index.num_bytes[-1] - index.offset[0]) for index in indexes)
    assert images <= sent < 1.05 * spans  # between two images of a tar are headers and a label


def bytes_sent(faults: Faults) -> int:
    """Of images so far, once nothing more has come for a while."""
    begin, last = time.monotonic(), -1
    while (sent := sum(n for path, n in faults.num_sent.items() if path.endswith(".tar"))) != last:
        assert time.monotonic() - begin < HANG_S
        last = sent
        time.sleep(0.5)
    return sent


def test_the_next_epoch_is_read_before_this_one_ends_and_no_further_than_allowed(
    dataset_url: str, faults: Faults
) -> None:
    dataset = open_dataset(dataset_url)
    epoch_bytes = sum(int(dataset.index(shard).num_bytes.sum()) for shard in range(len(dataset.manifest.shards)))
    config = replace(CONFIG, global_batch_size=4, read_ahead_steps=3)
    with Loader(dataset, config) as loader:
        next(loader)
        waiting = bytes_sent(faults)  # the consumer has stopped, and so have the reads
        assert waiting < epoch_bytes
        for _ in range(5):
            next(loader)  # 24 of 28 images are out
        assert bytes_sent(faults) > 1.1 * epoch_bytes
        for _ in range(21):
            next(loader)
        assert bytes_sent(faults) > 4 * epoch_bytes
    assert waiting > 0
