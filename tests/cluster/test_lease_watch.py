"""Whether a run is driven, by the watch of the one who looks: its clock may be anything."""

import threading
import time

import pytest
from run_folders import write_lease

from cluster.lease_watch import find_holder
from pipeline.store import Store

TERM_S = 3.0


@pytest.fixture
def run(tmp_path):
    return Store(str(tmp_path))


def seconds_to_find(run):
    began = time.monotonic()
    found = find_holder(run)
    return time.monotonic() - began, found


@pytest.mark.parametrize("ahead_s", [-7200.0, 7200.0])
def test_clocks_that_disagree(run, ahead_s):
    """`ahead_s` is this machine's clock against the driver's."""
    write_lease(run, age_s=ahead_s, term_s=TERM_S)
    renewal = threading.Timer(0.8, write_lease, (run,), {"age_s": ahead_s, "term_s": TERM_S})
    renewal.start()
    took, found = seconds_to_find(run)
    renewal.join()
    assert (found.host, found.pid) == ("head", 42)
    assert took < TERM_S
    took, found = seconds_to_find(run)  # it is renewed no more
    assert found is None
    assert TERM_S <= took < TERM_S + 5


def test_what_needs_no_watching(run):
    assert find_holder(run) is None
    write_lease(run, age_s=0.5)
    took, found = seconds_to_find(run)
    assert found is not None
    write_lease(run, age_s=0.5, released=True)
    assert took + seconds_to_find(run)[0] < 1
    assert find_holder(run) is None
