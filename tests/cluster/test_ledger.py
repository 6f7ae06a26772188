"""The goodput ledger: every second once, whatever died when; examples worked by hand."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_runs import MadeUpRun, columns

from cluster.lease import acquire
from cluster.ledger import KINDS, Ledger, make_ledger, read_ledger
from pipeline.store import Store
from trainer.errors import RunError
from trainer.metrics import DRIVER_EVENTS, EventLog

ZERO = dict.fromkeys(KINDS, 0.0)


def check_sums(ledger: Ledger, wall_s: float) -> None:
    """The properties that hold for any history."""
    assert ledger.wall_s == pytest.approx(wall_s, abs=1e-6)
    assert sum(ledger.seconds.values()) == pytest.approx(wall_s, abs=1e-6)
    assert min(ledger.seconds.values()) >= 0
    assert set(ledger.seconds) == set(KINDS)
    assert 0 <= ledger.goodput <= 1
    for row in ledger.rows:
        assert sum(row.seconds.values()) == pytest.approx(row.wall_s, abs=1e-6)
        assert len(row.edges) == len(row.kinds) + 1
        assert (np.diff(row.edges) >= 0).all()  # in order: no two pieces overlap
    for row, following in zip(ledger.rows, ledger.rows[1:], strict=False):
        assert row.edges[-1] == following.edges[0]  # and no gap between attempts


def event(attempt: int, kind: str, time: float, **fields: Any) -> dict[str, Any]:
    return {"event": kind, "time": time, "attempt": attempt, **fields}


def asked(attempt: int, time: float, reason: str, driver: str = "a") -> dict[str, Any]:
    return event(attempt, "asked", time, num_workers=2, reason=reason, driver=driver, host="h", pid=1)


def start(attempt: int, time: float, began: float, step: int) -> dict[str, Any]:
    return event(attempt, "start", time, began=began, step=step, world_size=2)


def test_a_night_with_a_kill_worked_by_hand() -> None:
    events = [
        asked(1, 100, "first"),
        event(1, "placed", 103, num_workers=2),  # 3 s for nodes
        start(1, 112, began=108, step=0),  # 5 s to start, 4 s to load
        # steps end at 114, 116, 118.5, 120.5, 122.5; 0.5 s of each is wait, and the save of step 2 stalls step 3 by 0.5
        event(1, "save", 117, step=2, stall_s=0.5, seconds=1.0, num_bytes=1),
        event(1, "lost", 125, error="a worker died", detected="error"),
        event(1, "ended", 125.5, outcome="lost"),
        asked(2, 126, "restart"),
        event(2, "placed", 126.25, num_workers=2),
        start(2, 133, began=130.25, step=2),
        # steps 3 and 4 end at 135 and 137; the last save takes 1.5 s, 0.25 s of which are the copy
        event(2, "save", 138.9, step=4, stall_s=0.25, seconds=1.5, num_bytes=1),
        event(2, "stop", 139, step=4, reason="finished"),
        event(2, "ended", 140, outcome="finished"),
    ]
    steps = {
        1: columns([1, 2, 3, 4, 5], [114, 116, 118.5, 120.5, 122.5], data_wait_s=0.5),
        2: columns([3, 4], [135, 137], data_wait_s=0.5),
    }
    ledger = make_ledger(events, steps)
    check_sums(ledger, 40)
    assert [row.attempt for row in ledger.rows] == [1, 2]
    assert [row.wall_s for row in ledger.rows] == [26, 14]
    # steps 1 and 2: 4 s, 1 s of them wait; from 116 to 125 all is done again; 125 to 126 is between the attempts
    assert ledger.rows[0].seconds == ZERO | {
        "idle": 3, "starting": 5, "loading": 4, "training": 3, "data_wait": 1, "lost_work": 9, "restarting": 1
    }  # fmt: skip
    # 0.25 s for nodes, 4 s to begin, 2.75 s to load, two steps and 0.5 s until the save, 1.5 s of save, 1 s of nothing
    assert ledger.rows[1].seconds == ZERO | {
        "idle": 1.25, "restarting": 4, "loading": 2.75, "training": 3.5, "data_wait": 1, "saving": 1.5
    }  # fmt: skip
    assert ledger.goodput == 6.5 / 40
    assert [row.facts.outcome for row in ledger.rows] == ["lost", "finished"]


def test_a_hang_is_no_work_and_a_save_within_training_is_saving() -> None:
    events = [
        asked(1, 0, "first"),
        event(1, "placed", 0),
        start(1, 10, began=5, step=0),
        event(1, "save", 21, step=1, stall_s=3, seconds=9, num_bytes=1),
        event(1, "lost", 90, error="no sign of life", detected="silence"),
        event(1, "ended", 91, outcome="lost"),
    ]
    ledger = make_ledger(events, {1: columns([1, 2], [20, 30], data_wait_s=1)})
    check_sums(ledger, 91)
    expected = {"starting": 5, "loading": 5, "training": 15, "data_wait": 2, "saving": 3, "restarting": 61}
    assert ledger.seconds == ZERO | expected


def test_a_new_driver_after_hours_of_none() -> None:
    events = [
        asked(1, 0, "first"),
        event(1, "placed", 1),
        start(1, 3, began=2, step=0),
        asked(2, 10_000, "resume", driver="b"),  # nobody told that the first one had died
        event(2, "waiting", 10_030, need={}, have={}),
        event(2, "waiting", 10_060, need={}, have={}),
        event(2, "placed", 10_070),
        start(2, 10_078, began=10_074, step=1),
    ]
    ledger = make_ledger(events, {1: columns([1, 2], [5, 7]), 2: columns([2], [10_080])})
    check_sums(ledger, 10_080)
    assert ledger.rows[0].seconds == ZERO | {
        "idle": 1 + 9_993, "starting": 1, "loading": 1, "training": 2, "lost_work": 2
    }  # fmt: skip
    assert ledger.rows[1].seconds == ZERO | {"idle": 70, "starting": 4, "loading": 4, "training": 2}


def test_an_older_run_without_a_drivers_events() -> None:
    events = [
        event(1, "start", 100, step=0, world_size=2),
        event(2, "damage", 130, path="p", reason="r"),
        event(2, "start", 140, step=1, world_size=2),
        event(2, "stop", 145, step=2, reason="stopped"),
        event(3, "start", 200, step=2, world_size=1),
    ]
    steps = {1: columns([1, 2], [105, 110]), 2: columns([2], [145]), 3: columns([3], [206])}
    ledger = make_ledger(events, steps)
    check_sums(ledger, 106)
    expected = [
        {"training": 5, "lost_work": 5, "restarting": 20},
        {"loading": 10, "training": 5, "idle": 55},
        {"training": 6},
    ]
    assert [row.seconds for row in ledger.rows] == [ZERO | one for one in expected]
    assert [row.facts.outcome for row in ledger.rows] == [None, "stopped", None]


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([asked(1, 0, "first"), event(1, "waiting", 30)], {"idle": 100}),
        ([asked(1, 0, "first"), event(1, "placed", 40)], {"idle": 40, "starting": 60}),
        ([asked(1, 0, "first"), event(1, "placed", 40), event(1, "damage", 70)],
         {"idle": 40, "starting": 30, "loading": 30}),
        ([asked(1, 0, "first"), event(1, "placed", 40), start(1, 90, 70, step=0)],
         {"idle": 40, "starting": 30, "loading": 20, "training": 10}),
        ([asked(1, 0, "first"), event(1, "placed", 40), event(1, "lost", 60, detected="error")],
         {"idle": 40, "starting": 20, "restarting": 40}),
        ([asked(1, 0, "first"), event(1, "lost", 60, detected="silence")], {"idle": 60, "restarting": 40}),
    ],
)  # fmt: skip
def test_a_run_that_is_on_is_at_what_it_was_last_known_to_be_at(
    events: list[dict[str, Any]], expected: dict[str, float]
) -> None:
    ledger = make_ledger(events, {}, alive_until=100)
    check_sums(ledger, 100)
    assert ledger.seconds == ZERO | expected


def test_damage_loses_what_two_attempts_did() -> None:
    events = [
        start(1, 0, began=0, step=0),
        start(2, 30, began=30, step=2),
        start(3, 60, began=60, step=1),  # the checkpoint of step 2 did not verify
    ]
    steps = {1: columns([1, 2], [10, 20]), 2: columns([3], [40]), 3: columns([2], [70])}
    ledger = make_ledger(events, steps)
    assert [row.seconds["training"] for row in ledger.rows] == [10, 0, 10]
    assert [row.seconds["lost_work"] for row in ledger.rows] == [10, 10, 0]


def test_nothing_and_next_to_nothing() -> None:
    assert make_ledger([], {}) == Ledger(())
    assert (Ledger(()).wall_s, Ledger(()).goodput, Ledger(()).seconds) == (0.0, 0.0, ZERO)
    check_sums(make_ledger([asked(1, 5, "first")], {}), 0)
    only_records = make_ledger([], {1: columns([1, 2], [10, 12], step_s=2)})
    assert only_records.seconds == ZERO | {"training": 4}


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_a_run_that_dies_at_any_moment_is_counted_as_it_was_lived(seed: int) -> None:
    """Against the account that the made-up run kept while it went on."""
    run = MadeUpRun(random.Random(seed))
    run.live()
    ledger = make_ledger(run.events, run.columns())
    check_sums(ledger, run.now - run.born)
    assert ledger.seconds == pytest.approx(run.account(), abs=1e-5)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_every_second_counts_once_whatever_is_missing_and_however_clocks_disagree(seed: int) -> None:
    chance = random.Random(seed)
    run = MadeUpRun(chance)
    run.live()
    events = [e | {"time": e["time"] + chance.gauss(0, 20)} for e in run.events if chance.random() < 0.6]
    steps = {n: c for n, c in run.columns().items() if chance.random() < 0.7}
    for one in steps.values():
        one.time[:] += np.array([chance.gauss(0, 5) for _ in range(len(one))])
    if not events and not steps:
        return
    attempts = sorted({e["attempt"] for e in events} | set(steps))
    ledger = make_ledger(sorted(events, key=lambda e: (e["attempt"], e["time"])), steps)
    check_sums(ledger, ledger.wall_s)
    assert [row.attempt for row in ledger.rows] == attempts
    of_last = [e["time"] for e in events if e["attempt"] == attempts[-1]]
    of_last += steps[attempts[-1]].time.tolist() if attempts[-1] in steps else []
    assert ledger.rows[-1].edges[-1] >= max(of_last)


def test_a_run_is_read_from_its_store(tmp_path: Path) -> None:
    made = MadeUpRun(random.Random(7))
    made.live()
    made.write(Store(str(tmp_path)))
    ledger = read_ledger(Store(str(tmp_path)))
    assert len(ledger.rows) > 1
    assert ledger.seconds == pytest.approx(made.account(), abs=1e-5)


@pytest.mark.parametrize(("driver", "released", "wall_s"), [("a", False, 100), ("a", True, 40), ("another", False, 40)])
def test_a_lease_that_is_held_says_until_when_its_driver_is_at_work(
    tmp_path: Path, driver: str, released: bool, wall_s: float
) -> None:
    run = Store(str(tmp_path))
    log = EventLog(run.child("attempts/0001"), DRIVER_EVENTS)
    log.add_all([asked(1, 1000, "first"), event(1, "placed", 1040)])
    with acquire(run) as held:
        lease = held.record
    lease = dataclasses.replace(lease, generation=2, driver=driver, renewed=1100.0, released=released)
    run.write("lease/000002.json", lease.to_json())
    ledger = read_ledger(run)
    check_sums(ledger, wall_s)
    assert ledger.seconds["starting"] == wall_s - 40


def test_a_part_that_is_no_json_is_named(tmp_path: Path) -> None:
    part = tmp_path / "attempts/0001/metrics-000000.jsonl"
    part.parent.mkdir(parents=True)
    part.write_text(json.dumps({"step": 1}) + "\n{broken\n")
    with pytest.raises(RunError, match=r"metrics-000000\.jsonl cannot be read"):
        read_ledger(Store(str(tmp_path)))
