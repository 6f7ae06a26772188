"""Reads that are slow, or stop half-way; servers that ask for less; hedges, and how few of them there are."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from faulty_proxy import Action, Faults
from noise import noise

from pipeline.config import StoreConfig
from pipeline.errors import StoreError
from pipeline.store import Store
from pipeline.store_s3 import S3Backend
from pipeline.store_s3_reads import HedgedReads, Limiter

DATA = noise(40_000)


def reads_of(store: Store) -> HedgedReads:
    backend = store._backend
    assert isinstance(backend, S3Backend)
    return backend.reads


def warm(store: Store, num_reads: int = 40) -> None:
    """Let the store learn how long a read takes, and save up hedges."""
    for _ in range(num_reads):
        assert store.read_range("a", 0, 30_000) == DATA[:30_000]


@pytest.mark.parametrize("action", ["say nothing", "stall in the body", "trickle"])
def test_a_slow_read_is_asked_for_again_and_the_first_answer_wins(bucket: str, faults: Faults, action: Action) -> None:
    store = Store(bucket, StoreConfig(read_timeout_s=60))
    store.write("a", DATA)
    warm(store)
    num_hedges = reads_of(store).num_hedges
    faults.plan(("GET", "/a", action))
    begin = time.monotonic()
    assert store.read_range("a", 5, 30_000) == DATA[5:30_005]
    assert time.monotonic() - begin < 20  # and not the minute that the first one would take
    assert reads_of(store).num_hedges == num_hedges + 1
    assert len(faults.requests) == 2


def test_hedges_are_few(bucket: str, faults: Faults) -> None:
    store = Store(bucket)
    store.write("a", DATA)
    warm(store, 100)
    assert reads_of(store).num_hedges <= 5


@pytest.mark.parametrize("action", ["stall in the body", "trickle"])
def test_a_body_that_does_not_come_is_asked_for_again(bucket: str, faults: Faults, action: Action) -> None:
    store = Store(bucket, StoreConfig(read_timeout_s=0.5))
    store.write("a", DATA)
    faults.plan(*[("GET", "/a", action)] * 2)
    begin = time.monotonic()
    assert store.read_range("a", 0, 40_000) == DATA
    assert time.monotonic() - begin < 20  # a trickle of 20,000 bytes takes 1,000 s
    assert len(faults.requests) == 3


def test_a_body_that_never_comes_ends_at_the_deadline(bucket: str, faults: Faults) -> None:
    store = Store(bucket, StoreConfig(read_timeout_s=1, deadline_s=3))
    store.write("a", DATA)
    faults.plan(*[("GET", "/a", "trickle")] * 20)
    begin = time.monotonic()
    with pytest.raises(StoreError, match="gave up"):
        store.read_range("a", 0, 40_000)
    assert time.monotonic() - begin < 10


def test_slow_down_halves_the_requests_in_flight(bucket: str, faults: Faults) -> None:
    store = Store(bucket)
    store.write("a", DATA)
    limiter = reads_of(store).limiter
    faults.plan(*[("GET", "/a", "503")] * 3)
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda at: store.read_range("a", at, 1000), range(16)))
    assert found == [DATA[at : at + 1000] for at in range(16)]
    assert limiter.is_throttled
    throttled = limiter.limit
    assert throttled < 16
    warm(store)
    assert limiter.limit > throttled


def test_a_limiter_lets_no_more_through_than_its_limit() -> None:
    limiter, most, entered = Limiter(3), 0, threading.Lock()
    in_flight = 0

    def work(_: int) -> None:
        nonlocal most, in_flight
        with limiter.request(time.monotonic() + 60):
            with entered:
                in_flight += 1
                most = max(most, in_flight)
            time.sleep(0.01)
            with entered:
                in_flight -= 1

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(24)))
    assert most == 3
    with limiter.request(time.monotonic() + 60), limiter.request(time.monotonic() + 60):
        limiter.slow_down()
        assert limiter.limit == 1
        with pytest.raises(TimeoutError, match="slow down"), limiter.request(time.monotonic() + 0.05):
            pass
    for _ in range(3):
        limiter.succeeded()
    assert limiter.limit == 3
