"""Servers that fail now and then, stall, or lose answers."""

from __future__ import annotations

import time

import pytest
from faulty_proxy import Action, Faults, start_faulty_proxy
from noise import PART_BYTES, noise

from cluster.local_s3 import S3Server
from pipeline import store_s3
from pipeline.config import StoreConfig
from pipeline.errors import StoreError, StoreNotFoundError, StoreRefusedError
from pipeline.store import Entry, Store


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
    monkeypatch.setattr(store_s3, "PART_BYTES", PART_BYTES)
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
    monkeypatch.setattr(store_s3, "PART_BYTES", PART_BYTES)
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
    monkeypatch.setattr(store_s3, "PART_BYTES", PART_BYTES)
    store = Store(bucket, StoreConfig(num_attempts=1))
    faults.plan(("PUT", "partNumber=1", "503"))

    def swallow() -> None:
        with store.writer("gap") as stream, pytest.raises(StoreError, match="gave up"):
            stream.write(noise(3 * PART_BYTES + 1))  # a part goes out while the next one is filled

    with pytest.raises(StoreError, match="an earlier write"):
        swallow()
    assert store.list() == []


@pytest.mark.parametrize("refused", ["uploads", "list-type=2"])
def test_leftovers_that_we_may_not_abort_stay(bucket: str, faults: Faults, refused: str) -> None:
    store = Store(bucket)
    store.write("a", b"x")
    faults.plan(("GET", refused, "403"))
    if refused == "uploads":
        assert store.remove_leftovers() == 0
    else:  # no right to list at all is an error
        with pytest.raises(StoreRefusedError, match="AccessDenied"):
            store.remove_leftovers()
    assert store.list() == [Entry("a", 1)]
