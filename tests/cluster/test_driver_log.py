"""What a driver writes about an attempt, and what it must not write once the run is another's."""

import pytest

from cluster.driver_log import DriverLog
from cluster.lease import LeaseError
from pipeline.errors import StoreError
from pipeline.store import Store
from trainer.metrics import read_events


@pytest.fixture
def run(tmp_path):
    return Store(str(tmp_path / "run"))


def write(run, attempt, kinds, answers=()):
    """Events of an attempt; an answer to the question before each, and None ever after."""
    left = iter(answers)

    def may_write():
        if (answer := next(left, None)) is not None:
            raise answer

    log = DriverLog(run, attempt, may_write)
    for time, kind in enumerate(kinds):
        log.add({"event": kind, "time": time})
    log.close()


def kinds_of(run):
    return [(event["attempt"], event["event"]) for event in read_events(run)]


def test_a_driver_that_was_superseded_between_two_attempts_leaves_its_successors_alone(run):
    write(run, 2, ["asked"])  # the successor's
    write(run, 2, ["asked", "ended"], [LeaseError("taken over")])
    assert kinds_of(run) == [(2, "asked")]


def test_a_driver_that_is_superseded_in_an_attempt_writes_no_more(run):
    write(run, 1, ["asked", "placed", "lost", "ended"], [None, None, LeaseError("taken over")])
    assert kinds_of(run) == [(1, "asked"), (1, "placed")]


def test_events_wait_for_a_store_that_does_not_tell_whose_the_run_is(run):
    write(run, 1, ["asked", "placed", "ended"], [StoreError("down"), StoreError("down")])
    assert kinds_of(run) == [(1, "asked"), (1, "placed"), (1, "ended")]
