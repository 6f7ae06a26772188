"""The store keeps its promises on local paths, on an AWS-like server, and on one with gaps."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from noise import PART_BYTES, noise

from cluster.local_s3 import start_moto
from pipeline.errors import StoreNotFoundError
from pipeline.store import Entry, Store

NAMES = ("plain", "dir/a b.txt", "dir/sub/ünï+code", "dir/100%25", "dir.d/x=1&y")


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


def test_folders_are_those_right_below(store: Store) -> None:
    for name in NAMES:
        store.write(name, b"x")
    assert store.folders() == ["dir", "dir.d"]
    assert store.folders("dir") == ["sub"]
    assert store.child("dir").folders("sub") == []
    assert store.folders("nothing") == []
    assert store.folders("plain") == []


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


def fail_midway(store: Store, path: str, data: bytes, kind: type[BaseException]) -> None:
    with store.writer(path) as stream:
        stream.write(data)
        raise kind


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
from pipeline import store_s3
from pipeline.store import Store
store_s3.PART_BYTES = int(sys.argv[2])
with Store(sys.argv[1]).writer("half") as stream:
    stream.write(bytes(2 * store_s3.PART_BYTES + 1))
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
    for elsewhere in (store.child("other"), Store(store.url[:-1])):
        assert elsewhere.remove_leftovers() == 0
    assert [store.remove_leftovers(), store.remove_leftovers()] == [1, 0]
    if Path(store.url).is_absolute():
        assert list(Path(store.url).iterdir()) == []
    store.write("half", b"whole")
    assert store.remove_leftovers() == 0
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
