"""What the driver tells comes to the bucket, whenever the store was down, and nothing once the run is another's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster import driver_log
from cluster.driver_log import DriverLog
from cluster.lease import LeaseError
from pipeline.errors import StoreError
from pipeline.store import Store
from trainer.metrics import read_events


@pytest.fixture
def run(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


@pytest.fixture(autouse=True)
def retries_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_log, "_RETRY_S", 0.01)


def refuse(monkeypatch: pytest.MonkeyPatch, method: str, num_times: int) -> list[str]:
    """Have the store refuse the first calls; returns the paths of those that it refused."""
    refused: list[str] = []
    real = getattr(Store, method)

    def flaky(self: Store, path: str, *more: Any) -> Any:
        if len(refused) < num_times:
            refused.append(path)
            raise StoreError("the network is away")
        return real(self, path, *more)

    monkeypatch.setattr(Store, method, flaky)
    return refused


def write(run: Store, *kinds: str, answers: Sequence[Exception | None] = ()) -> None:
    """Events of an attempt; `answers` to the question before each write, which are None ever after."""
    left = iter(answers)

    def may_write() -> None:
        if (answer := next(left, None)) is not None:
            raise answer

    log = DriverLog(run, 3, may_write)
    for number, kind in enumerate(kinds):
        log.add({"event": kind, "time": 1000.0 + number})
    log.close()


def kinds_in(run: Store) -> list[str]:
    return [event["event"] for event in read_events(run)]


def test_the_last_event_is_kept_when_the_store_refuses_it(run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write(run, "asked", "placed")
    refused = refuse(monkeypatch, "write", 3)
    write(run, "ended")  # a log of its own, which goes on after the first one's
    assert len(refused) == 3
    assert sorted(kinds_in(run)) == ["asked", "ended", "placed"]


@pytest.mark.parametrize("method", ["size", "write"])
@pytest.mark.parametrize("num_times", [1, 2, 3, 7])
def test_no_event_is_lost_to_a_store_that_is_down_for_a_while(
    run: Store, monkeypatch: pytest.MonkeyPatch, method: str, num_times: int
) -> None:
    """`size` is what the log asks for first, to go on after what is there."""
    refused = refuse(monkeypatch, method, num_times)
    write(run, "asked", "placed", "ended")
    assert len(refused) == num_times
    assert kinds_in(run) == ["asked", "placed", "ended"]
    assert [event["time"] for event in read_events(run)] == [1000, 1001, 1002]


def test_a_store_that_stays_down_does_not_keep_the_driver_up(
    run: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(driver_log, "_GIVE_UP_S", 0.05)
    refuse(monkeypatch, "write", 10**9)
    write(run, "asked", "ended")
    assert "events of the driver are lost: the network is away" in caplog.text


def test_a_driver_that_was_superseded_between_two_attempts_leaves_its_successors_alone(run: Store) -> None:
    write(run, "asked")  # the successor's
    write(run, "asked", "ended", answers=[LeaseError("taken over")])
    assert kinds_in(run) == ["asked"]


def test_a_driver_that_is_superseded_in_an_attempt_writes_no_more(run: Store) -> None:
    write(run, "asked", "placed", "lost", "ended", answers=[None, None, LeaseError("taken over")])
    assert kinds_in(run) == ["asked", "placed"]


def test_events_wait_for_a_store_that_does_not_tell_whose_the_run_is(run: Store) -> None:
    write(run, "asked", "placed", "ended", answers=[StoreError("down"), StoreError("down")])
    assert kinds_in(run) == ["asked", "placed", "ended"]
