"""The store keeps its promises on local paths, on an AWS-like server, and on one with gaps."""

from __future__ import annotations

import importlib.util
import multiprocessing
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faulty_proxy import Action, Faults, start_faulty_proxy

from cluster.local_s3 import S3Server, start_moto
from pipeline import store_remote
from pipeline.config import StoreConfig
from pipeline.errors import StoreError, StoreNotFoundError
from pipeline.store import Entry, Store

PART_BYTES = 5 * 2**20  # the shortest part that S3 takes
NAMES = ("plain", "dir/a b.txt", "dir/sub/ünï+code", "dir/100%25", "dir.d/x=1&y")


@pytest.fixture
def store(store_url: str, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(store_remote, "PART_BYTES", PART_BYTES)
    return Store(store_url)


@pytest.fixture
def faults(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """A proxy that every store opened from now on goes through."""
    with start_faulty_proxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        yield proxy


def fail_midway(store: Store, path: str, data: bytes, kind: type[BaseException]) -> None:
    with store.writer(path) as stream:
        stream.write(data)
        raise kind


def noise(num_bytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(num_bytes)


# Round trips ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_bytes", [0, 1, PART_BYTES, 2 * PART_BYTES + 1])
def test_what_was_written_is_read(store: Store, num_bytes: int) -> None:
    store.write("a/b.bin", noise(num_bytes))
    assert store.read("a/b.bin") == noise(num_bytes)
    assert store.size("a/b.bin") == num_bytes
    assert store.exists("a/b.bin")
    assert store.list() == [Entry("a/b.bin", num_bytes)]


def test_names_overwriting_and_children(store: Store) -> None:
    for name in NAMES:
        store.write(name, b"old")
        store.write(name, name.encode())
    assert [entry.path for entry in store.list()] == sorted(NAMES)
    assert [entry.path for entry in store.list("dir")] == sorted(name for name in NAMES if name.startswith("dir/"))
    assert [entry.path for entry in store.child("dir").list()] == ["100%25", "a b.txt", "sub/ünï+code"]
    for name in NAMES:
        assert store.read(name) == name.encode()
    assert store.child("dir/sub").read("ünï+code") == "dir/sub/ünï+code".encode()
    assert store.child("dir").url == f"{store.url}/dir"


def test_ranges_are_short_only_at_the_end(store: Store) -> None:
    store.write("ten", b"0123456789")
    expected = {
        (0, 10): b"0123456789",
        (3, 4): b"3456",
        (7, 9): b"789",
        (9, 1): b"9",
        (10, 5): b"",
        (99, 5): b"",
        (4, 0): b"",
    }
    assert {key: store.read_range("ten", *key) for key in expected} == expected
    store.write("empty", b"")
    assert store.read_range("empty", 0, 5) == b""


def test_absent_objects_and_directories(store: Store) -> None:
    store.write("dir/file", b"x")
    for path in ("nothing", "dir", "dir/file2", "dir/fil"):
        assert not store.exists(path)
        for ask in (store.read, store.size, lambda path: store.read_range(path, 0, 1)):
            with pytest.raises(StoreNotFoundError) as caught:
                ask(path)
            assert f"{store.url}/{path}" in str(caught.value)
        store.remove("nothing")
    assert store.list("nothing") == []
    assert store.list("fil") == []


def test_remove_and_remove_tree(store: Store) -> None:
    for name in ("a/1", "a/b/2", "ab/3", "c"):
        store.write(name, b"x")
    store.remove("c")
    store.remove("c")
    store.remove_tree("a")
    store.remove_tree("a")
    store.remove_tree("nothing")
    assert store.list() == [Entry("ab/3", 1)]


@pytest.mark.servers
def test_a_listing_of_several_pages_written_by_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "10")  # a page
    with start_moto() as server:
        server.make_bucket("pages")
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        store = Store("s3://pages/dir")
        names = [f"{number:04}" for number in range(35)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda name: store.write(name, name.encode()), names))
            assert list(pool.map(store.read, names)) == [name.encode() for name in names]
        assert [entry.path for entry in store.list()] == names
        store.remove_tree("0001")
        Store("s3://pages").remove_tree("dir")
        assert store.list() == []


# Atomicity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_bytes", [0, 100, 2 * PART_BYTES + 1])
def test_writer_shows_the_object_when_it_ends(store: Store, num_bytes: int) -> None:
    data = noise(num_bytes)
    with store.writer("x/stream") as stream:
        for start in range(0, num_bytes, 1_000_003):
            piece = data[start : start + 1_000_003]
            assert stream.write(memoryview(piece)) == len(piece)
            assert stream.tell() == start + len(piece)
        assert not store.exists("x/stream")
        assert store.list() == []
    assert store.read("x/stream") == data


@pytest.mark.parametrize(("num_bytes", "kind"), [(100, KeyboardInterrupt), (2 * PART_BYTES + 1, RuntimeError)])
def test_a_failed_writer_leaves_what_was_there(store: Store, num_bytes: int, kind: type[BaseException]) -> None:
    store.write("x/old", b"old")
    for name in ("x/old", "x/new"):
        with pytest.raises(kind):
            fail_midway(store, name, noise(num_bytes), kind)
    assert store.list() == [Entry("x/old", 3)]
    assert store.read("x/old") == b"old"
    if Path(store.url).is_absolute():
        assert [path.name for path in Path(store.url).rglob("*") if path.is_file()] == ["old"]


WRITE_HALF = """
import sys, time
from pipeline import store_remote
from pipeline.store import Store
store_remote.PART_BYTES = int(sys.argv[2])
with Store(sys.argv[1]).writer("half") as stream:
    stream.write(bytes(2 * store_remote.PART_BYTES + 1))
    print("written", flush=True)
    time.sleep(60)
"""


def test_a_killed_writer_leaves_nothing_visible(store: Store) -> None:
    command = [sys.executable, "-c", WRITE_HALF, store.url, str(PART_BYTES)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert store.list() == []
    assert not store.exists("half")
    store.write("half", b"whole")
    assert store.list() == [Entry("half", 5)]


def test_readers_never_see_a_mixture(store: Store) -> None:
    versions = [bytes([number]) * 2**20 for number in range(12)]
    store.write("x", versions[0])
    done = threading.Event()

    def read() -> set[bytes]:
        seen = set()
        while not done.is_set():
            seen.add(store.read("x"))
        return seen

    with ThreadPoolExecutor(1) as pool:
        seen = pool.submit(read)
        for version in versions:
            store.write("x", version)
        done.set()
        assert seen.result() <= set(versions)


def test_create_keeps_what_is_there(store: Store) -> None:
    assert store.create("lease/a", b"first")
    assert not store.create("lease/a", b"second")
    assert not store.create("lease/a", b"first")
    assert store.read("lease/a") == b"first"
    store.remove("lease/a")
    assert store.create("lease/a", b"third")
    assert [entry.path for entry in store.list()] == ["lease/a"]


@pytest.mark.parametrize("store_url", ["local", "moto"], indirect=True)
def test_of_racing_creators_one_wins(store: Store) -> None:
    num = 6
    start = threading.Barrier(num)

    def race(number: int) -> bool:
        own = pickle.loads(pickle.dumps(store))
        own.exists("warm-up")
        start.wait()
        return bool(own.create("race", b"%d" % number))

    with ThreadPoolExecutor(num) as pool:
        won = list(pool.map(race, range(num)))
    assert won.count(True) == 1
    assert store.read("race") == b"%d" % won.index(True)


# Errors --------------------------------------------------------------------------------------------------------


def actions(store: Store) -> list[Callable[[], object]]:
    def stream() -> None:
        with store.writer("stream") as writer:
            writer.write(b"x")

    return [
        lambda: store.read("a"),
        lambda: store.read_range("a", 0, 1),
        lambda: store.write("a", b"x"),
        lambda: store.create("a", b"x"),
        stream,
        store.list,
        store.check_writable,
    ]


def test_a_missing_bucket_is_said_at_once(s3_server: S3Server) -> None:
    for act in actions(Store("s3://no-such-bucket-here/dir")):
        begin = time.monotonic()
        with pytest.raises(StoreNotFoundError, match=r"no-such-bucket-here/dir.*no such bucket.*AWS_ENDPOINT_URL"):
            act()
        assert time.monotonic() - begin < 10


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_said_at_once(
    juicefs_server: S3Server, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    for name, value in juicefs_server.environment().items():  # moto takes any
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(variable, "not-the-right-one")
    for act in actions(Store("s3://tests/dir")):
        begin = time.monotonic()
        with pytest.raises(StoreError, match=r"s3://tests/dir.*refused.*check the credentials") as caught:
            act()
        assert not isinstance(caught.value, StoreNotFoundError)
        assert time.monotonic() - begin < 10


def test_no_credentials_at_all(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StoreError, match=r"Unable to locate credentials.*check the credentials"):
        Store("s3://tests/dir").check_writable()


def test_an_endpoint_that_is_no_url(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in S3Server("localhost:9000", "key", "secret").environment().items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StoreError, match=r"localhost:9000.*AWS_ENDPOINT_URL"):
        Store("s3://tests/dir").check_writable()


def test_check_writable_leaves_nothing(store: Store) -> None:
    store.check_writable()
    assert store.list() == []
    if Path(store.url).is_absolute():
        assert not Path(store.url).exists()


def test_a_local_path_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    store = Store(str(tmp_path / "file" / "dir"))
    for act in (store.check_writable, lambda: store.write("a", b"x"), lambda: store.create("a", b"x")):
        with pytest.raises(StoreError, match="file/dir"):
            act()
    assert not store.exists("a")
    assert store.list() == []


@pytest.mark.parametrize("path", ["", "/a", "a//b", "../a", "a/../b", "./a"])
def test_paths_stay_below_the_url(tmp_path: Path, path: str) -> None:
    store = Store(str(tmp_path))
    for act in (store.read, store.remove, store.remove_tree, store.child):
        with pytest.raises(ValueError, match="must be relative"):
            act(path)


def test_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Store("a/b/").url == Store(f"file://{tmp_path}/a/b").url == f"{tmp_path}/a/b"
    assert Store("s3://bucket/a/").url == "s3://bucket/a"
    assert Store("s3a://bucket").url == "s3a://bucket"
    with pytest.raises(ValueError, match="must name a bucket"):
        Store("s3://")
    with pytest.raises(ValueError, match="nonsense"):
        Store("nonsense://bucket")


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_a_url_whose_package_is_not_installed() -> None:
    with pytest.raises(StoreError, match=r"gs://bucket.*gcsfs"):
        Store("gs://bucket/dir")


def test_secrets_in_urls_are_not_shown() -> None:
    store = Store("memory://user:hidden@host/dir?token=hidden")
    assert "hidden" not in repr(store) + str(store)
    with pytest.raises(StoreNotFoundError) as caught:
        store.read("nothing")
    assert "hidden" not in str(caught.value)


def test_any_other_fsspec_filesystem() -> None:
    store = Store("memory://test-store/dir")
    store.write("a/b", b"0123456789")
    assert store.read("a/b") == b"0123456789"
    assert store.read_range("a/b", 8, 5) == b"89"
    assert not store.create("a/b", b"x")
    assert store.create("c", b"x")
    with pytest.raises(RuntimeError):
        fail_midway(store, "failed", b"x", RuntimeError)
    with store.writer("d") as stream:
        stream.write(b"xy")
    assert store.list() == [Entry("a/b", 10), Entry("c", 1), Entry("d", 2)]
    store.check_writable()
    store.remove("d")
    store.remove("d")
    store.remove_tree("a")
    assert store.list() == [Entry("c", 1)]
    assert not store.exists("a/b")


# Processes -----------------------------------------------------------------------------------------------------


def read_there(store: Store, path: str) -> bytes:
    return store.read(path)


def test_a_store_goes_to_a_spawned_process(store: Store) -> None:
    store.write("a", b"hello")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(read_there, (store, "a")) == b"hello"


FORK = """
import os, sys
from pipeline.store import Store
store = Store(sys.argv[1])
assert store.read("a") == b"hello"  # connections and threads exist now
child = os.fork()
if child == 0:
    os._exit(0 if store.child("x").exists("y") is False and store.read("a") == b"hello" else 1)
assert os.waitpid(child, 0)[1] == 0
assert store.read("a") == b"hello"
"""


def test_a_store_survives_a_fork(store: Store) -> None:
    store.write("a", b"hello")
    subprocess.run([sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK, store.url], check=True, timeout=60)


# Faults --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["503", "cut the body", "reset", "lose the answer"])
def test_reads_survive_faults(bucket: str, faults: Faults, action: Action) -> None:
    store = Store(bucket)
    store.write("a", noise(100_000))
    faults.plan(*[("GET", "/a", action)] * 2)
    assert store.read("a") == noise(100_000)
    assert len(faults.requests) == 3
    faults.plan(*[("GET", "/a", action)] * 2)
    assert store.read_range("a", 10, 50_000) == noise(100_000)[10:50_010]


def test_a_stalled_read_is_tried_again(bucket: str, faults: Faults) -> None:
    store = Store(bucket, StoreConfig(read_timeout_s=0.5))
    store.write("a", b"hello")
    faults.plan(("GET", "/a", "say nothing"))
    begin = time.monotonic()
    assert store.read("a") == b"hello"
    assert 0.4 < time.monotonic() - begin < 10


@pytest.mark.parametrize("read_timeout_s", [0.3, 60])
def test_a_server_that_never_answers_is_given_up_at_the_deadline(
    bucket: str, faults: Faults, read_timeout_s: float
) -> None:
    Store(bucket).write("a", b"hello")
    store = Store(bucket, StoreConfig(deadline_s=3, read_timeout_s=read_timeout_s))
    stall: tuple[str, str, Action] = ("GET", "/a", "say nothing")
    faults.plan(*[stall] * 20)
    begin = time.monotonic()
    with pytest.raises(StoreError, match=r"/a: gave up.*3 s.*store\.deadline_s"):
        store.read("a")
    assert time.monotonic() - begin < 10
    faults.planned.clear()
    assert store.read("a") == b"hello"  # it is not broken for good


def test_a_stopped_server_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch, s3_server: S3Server) -> None:
    with start_faulty_proxy(s3_server.endpoint) as proxy:
        pass
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
    with pytest.raises(StoreError, match=rf"{proxy.endpoint}.*AWS_ENDPOINT_URL"):
        Store("s3://tests/x", StoreConfig(num_attempts=2)).check_writable()


def test_refusals_are_not_repeated(bucket: str, faults: Faults) -> None:
    store = Store(bucket)
    with pytest.raises(StoreNotFoundError):
        store.read("nothing")
    assert not store.exists("nothing")
    assert len(faults.requests) == 2


@pytest.mark.parametrize("action", ["503", "reset", "lose the answer"])
def test_writes_survive_faults(bucket: str, faults: Faults, action: Action, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_remote, "PART_BYTES", PART_BYTES)
    store = Store(bucket)
    data = noise(PART_BYTES + 1)
    faults.plan(("PUT", "/small", action), ("DELETE", "/small", action))
    store.write("small", b"x")
    faults.plan(
        ("POST", "uploads", action),
        ("PUT", "partNumber=1", action),
        ("PUT", "partNumber=2", action),
        ("POST", "uploadId=", action),
    )
    with store.writer("large") as stream:
        stream.write(data)
    assert store.read("large") == data
    store.remove("small")
    assert faults.planned == []
    assert store.list() == [Entry("large", len(data))]


def test_create_whose_answer_was_lost_is_still_ours(bucket: str, faults: Faults) -> None:
    store = Store(bucket)
    faults.plan(("PUT", "/lease", "lose the answer"))
    assert store.create("lease", b"owner 1")
    assert not Store(bucket).create("lease", b"owner 2")
    assert store.read("lease") == b"owner 1"


def test_a_part_that_fails_for_good_leaves_nothing(
    bucket: str, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_remote, "PART_BYTES", PART_BYTES)
    store = Store(bucket, StoreConfig(num_attempts=2))
    busy: tuple[str, str, Action] = ("PUT", "partNumber=2", "503")
    faults.plan(busy, busy)
    with pytest.raises(StoreError, match="large: gave up"), store.writer("large") as stream:
        stream.write(noise(2 * PART_BYTES + 1))
    assert store.list() == []
    assert faults.requests[-2].startswith("DELETE")  # the upload was aborted


def test_an_error_that_the_caller_swallows_is_no_commit(
    bucket: str, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_remote, "PART_BYTES", PART_BYTES)
    store = Store(bucket, StoreConfig(num_attempts=1))
    faults.plan(("PUT", "partNumber=1", "503"))

    def swallow() -> None:
        with store.writer("gap") as stream, pytest.raises(StoreError, match="gave up"):
            stream.write(noise(2 * PART_BYTES))

    with pytest.raises(StoreError, match="an earlier write"):
        swallow()
    assert store.list() == []
