"""What the store says when something is missing, refused or wrong; URLs of all kinds."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.local_s3 import S3Server
from pipeline.errors import StoreError, StoreNotFoundError, StoreRefusedError
from pipeline.store import Entry, Store


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
        store.check_readable,
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
        assert isinstance(caught.value, StoreRefusedError)
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


def test_any_other_fsspec_filesystem() -> None:
    store = Store("memory://test-store/dir")
    store.write("a/b", b"0123456789")
    assert store.read("a/b") == b"0123456789"
    assert store.read_range("a/b", 8, 5) == b"89"
    assert not store.create("a/b", b"x")
    assert store.create("c", b"x")
    with pytest.raises(TypeError), store.writer("failed") as stream:
        stream.write("no bytes")
    with store.writer("d") as stream:
        stream.write(b"xy")
    assert store.list() == [Entry("a/b", 10), Entry("c", 1), Entry("d", 2)]
    store.check_writable()
    store.check_readable()
    store.write(".tarmac-tmp-probe", b"")  # of a process that was killed between writing and deleting it
    assert [store.remove_leftovers(), store.remove_leftovers()] == [1, 0]
    store.remove("d")
    store.remove("d")
    store.remove_tree("a")
    assert store.list() == [Entry("c", 1)]
    assert not store.exists("a/b")
