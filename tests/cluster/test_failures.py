"""When a run is given up, and how long it waits before."""

import json

import pytest

from cluster.failures import Failures, count_without_progress
from pipeline.store import Store


def test_attempts_without_progress_are_a_crash_loop():
    failures = Failures(3, committed=0)
    assert failures.add(0, "a") is None
    assert failures.add(40, "b") is None  # progress starts the count anew
    assert failures.add(40, "c") is None
    assert failures.add(None, "d") is None  # the store did not answer
    reason = failures.add(40, "OSError: no space")
    assert reason is not None
    assert "3 attempts in a row committed nothing after step 40" in reason
    assert "OSError: no space" in reason


def test_only_failures_in_a_row_make_the_driver_wait_and_longer_each_time():
    failures = Failures(9, committed=7)
    pauses = []
    for _ in range(7):
        pauses.append(failures.pause_s)
        assert failures.add(7, "x") is None
    assert pauses == [0, 0, 2, 6, 14, 30, 30]
    failures.add(8, "x")
    assert failures.pause_s == 0


def test_a_new_driver_counts_what_its_predecessors_lost_and_makes_one_attempt_at_least():
    failures = Failures(3, committed=40, before=7)
    reason = failures.add(40, "OSError: no space")
    assert reason is not None
    assert "3 attempts in a row" in reason
    failures = Failures(3, committed=40, before=1)
    assert failures.add(40, "a") is None
    assert failures.add(40, "b") is not None


LOST = [{"event": "placed"}, {"event": "lost"}, {"event": "ended", "outcome": "lost"}]
DIED = [{"event": "placed"}, {"event": "start"}]  # its driver went with it, without a word


@pytest.mark.parametrize(
    ("attempts", "expected"),
    [
        ([], 0),
        ([LOST], 1),
        ([LOST, DIED, LOST], 3),
        ([LOST, [*DIED, {"event": "save", "step": 5}], DIED], 1),
        ([LOST, [*DIED, {"event": "save", "step": 5}]], 0),
        ([LOST, [{"event": "placed"}, {"event": "ended", "outcome": "moved"}], LOST], 1),
        ([LOST, [{"event": "asked"}, {"event": "waiting"}], LOST], 2),
        ([LOST] * 7, 5),
    ],
)
def test_lost_attempts_are_counted_back_to_the_last_that_committed(tmp_path, attempts, expected):
    for number, events in enumerate(attempts, 1):
        folder = tmp_path / f"attempts/{number:04d}"
        folder.mkdir(parents=True)
        workers = [event for event in events if event["event"] in ("start", "save")]
        drivers = [event for event in events if event not in workers]
        (folder / "driver.jsonl").write_text("".join(json.dumps(event) + "\n" for event in drivers))
        if workers:
            (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in workers))
    assert count_without_progress(Store(tmp_path.as_uri()), most=5) == expected
