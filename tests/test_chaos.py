"""What `make chaos` measures, on made-up histories with known answers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from cluster import ledger
from cluster.demo_run import StepError
from pipeline.config import DataConfig
from tests.chaos import chaos, faults, goals, measure
from tests.chaos.scene import Job, Scene
from trainer.metrics import StepRecord
from trainer.step_numbers import sample_ids_digest


def history(steps: list[tuple[int, int, float]], *events: dict[str, Any]) -> measure.History:
    """Attempt, step and end of every step."""
    records = [(attempt, cast(StepRecord, {"step": step, "time": time, "loss": 1.0})) for attempt, step, time in steps]
    return measure.History(records, list(events), DataConfig(global_batch_size=4, num_lanes=2))


KILLED = history(
    [(1, 1, 10.0), (1, 2, 11.0), (1, 3, 12.0), (2, 3, 20.0), (2, 4, 21.0), (2, 5, 22.0)],
    {"event": "asked", "time": 5.0},
    {"event": "lost", "time": 13.5, "detected": "error"},
    {"event": "start", "time": 18.0, "step": 2, "world_size": 2},
)


def test_a_killed_run() -> None:
    assert measure.steps_lost(KILLED) == 1
    assert measure.detected_s(KILLED, [12.5]) == 1.0
    assert measure.again_s(KILLED, [12.5]) == 7.5
    assert measure.paused_s(KILLED, [12.5]) == 8.0
    assert [KILLED.by_step[step]["time"] for step in (2, 3)] == [11.0, 20.0]


def test_steps_beside_a_save_are_those_after_it_began() -> None:
    assert measure.steps_beside_save(KILLED, 12.5, cadence=2) == 1  # the save of step 2
    assert measure.steps_beside_save(KILLED, 12.5, cadence=3) == 0


def test_a_run_that_goes_on_through_the_fault() -> None:
    steady = history([(1, 1, 10.0), (1, 2, 11.0), (1, 3, 14.0), (1, 4, 15.0)])
    assert measure.steps_lost(steady) == 0
    assert measure.detected_s(steady, [11.5]) is None
    assert measure.again_s(steady, [11.5]) is None
    assert measure.paused_s(steady, [11.5]) == 3.0


def test_the_slowest_of_several_faults_counts() -> None:
    steps = [(1, 1, 10.0), (2, 2, 14.0), (2, 3, 15.0), (3, 4, 25.0)]
    saves = [
        {"event": "start", "time": 13.0, "step": 1},
        {"event": "save", "time": 12.0, "step": 1},
        {"event": "save", "time": 14.5, "step": 2},  # by the cadence
        {"event": "save", "time": 19.0, "step": 3},
        {"event": "start", "time": 24.0, "step": 3},
    ]
    twice = history(steps, *saves)
    assert measure.again_s(twice, [11.0, 16.0]) == 9.0
    assert measure.saved_s(twice, [11.0, 16.0]) == 3.0


def test_an_answer_that_is_missing_is_not_made_up_for_by_the_others() -> None:
    twice = history([(1, 1, 10.0), (3, 2, 25.0)], {"event": "lost", "time": 13.0, "detected": "error"})
    assert measure.again_s(twice, [11.0, 16.0]) is None
    assert measure.again_s(twice, [16.0]) == 9.0
    assert measure.detected_s(twice, [11.0, 16.0]) is None
    assert measure.detected_s(twice, [11.0]) == 2.0


NIGHT = [(1, 0.0), (2, 1.0), (3, 2.0), (3, 10.0), (4, 11.0), (5, 12.0), (99, 30.0)]


def test_goodput_counts_a_step_once_at_what_it_takes_undisturbed() -> None:
    assert measure.goodput(NIGHT, 0.0, 20.0, 1.0) == pytest.approx(5 / 20)
    slowed = [(step, 2 * time) for step, time in NIGHT]  # whatever it is that slows every step
    assert measure.goodput(slowed, 0.0, 40.0, 1.0) == pytest.approx(5 / 40)


def test_what_a_step_takes() -> None:
    assert measure.median_step_s(NIGHT) == 1.0
    with pytest.raises(StepError, match="1 steps"):
        measure.median_step_s(NIGHT[:1])


def test_the_ledgers_goodput_is_that_between_two_times() -> None:
    training, loading, lost = (ledger.KINDS.index(kind) for kind in ("training", "loading", "lost_work"))
    rows = [
        ledger.AttemptRow(cast(Any, None), np.array(edges), np.array(kinds, dtype=np.int8))
        for edges, kinds in (
            ([0.0, 10.0, 30.0, 40.0], [loading, training, lost]),
            ([40.0, 50.0, 100.0], [loading, training]),
        )
    ]
    # From 20 to 60: 10 s of the first attempt, 10 s of the second.
    assert measure.ledger_goodput(ledger.Ledger(tuple(rows)), 20.0, 60.0) == pytest.approx(20 / 40)


OUR_NIGHT = {"name": "ours", "minutes": 20.0, "samples_wrong": 0} | dict.fromkeys(goals.GOODPUTS, 0.9)


def test_our_night_has_goals_and_decides() -> None:
    peer = {"name": "ray_pattern", "minutes": 20.0, "goodput": 0.4}
    found = {goal.name: goal.met for goal in goals.goals_of([], [], [OUR_NIGHT, peer], 50)}
    assert found == {"goodput of the bad night": True, "samples lost or repeated in the bad night": True}
    assert chaos.night_holds(OUR_NIGHT)


@pytest.mark.parametrize("bad", [{"samples_wrong": 16}, {"error": "it ended with 1"}])
def test_a_night_that_went_wrong(bad: dict[str, Any]) -> None:
    assert not all(goal.met for goal in goals.night_goals(OUR_NIGHT | bad))
    assert not chaos.night_holds(OUR_NIGHT | bad)


def test_a_night_without_an_answer_misses_its_goals() -> None:
    assert not any(goal.met for goal in goals.night_goals({"name": "ours", "minutes": 20.0}))
    assert not all(goal.met for goal in goals.night_goals(OUR_NIGHT | {"goodput_ledger": None}))


@pytest.mark.parametrize("name", goals.GOODPUTS)
def test_the_lowest_goodput_counts(name: str) -> None:
    goodput, _ = goals.night_goals(OUR_NIGHT | {name: 0.7})
    assert goodput.measured == 0.7


def test_a_short_night_says_so() -> None:
    assert all("4 min only" in goal.name for goal in goals.night_goals(OUR_NIGHT | {"minutes": 4.0}))


def test_the_digest_is_the_trainers() -> None:
    ids = [0, 1, 17, 2**40, 2**62]
    assert measure.mix_digest(ids) == f"{int(sample_ids_digest(torch.tensor(ids))) % 2**64:016x}"
    assert measure.mix_digest(ids) == measure.mix_digest(reversed(ids))


def test_goals_are_missed_where_a_row_failed() -> None:
    rows = [row for row in faults.ROWS if row.name in ("worker-killed", "node-drained")]
    fine = {
        "steps_lost": 20,
        "steps_lost_but_beside_save": 20,
        "again_s": 12.0,
        "samples_wrong": 0,
        "same_weights": True,
    }
    found = goals.goals_of(rows, [{"name": "worker-killed", **fine}, {"name": "node-drained", "error": "no"}], [], 50)
    verdicts = {goal.name: goal.met for goal in found}
    assert verdicts == {
        "steps lost with notice": False,
        "steps lost without notice, 1 x the cadence": True,
        "training again after a kill, with a spare, s": True,
        "notice to committed checkpoint, a smaller model, s": False,
        "samples lost or repeated": False,
        "rows whose weights differ from the undisturbed run's": False,
    }


def goal(name: str, *results: dict[str, Any]) -> goals.Goal:
    """That goal, of the rows that have results."""
    played = [row for row in faults.ROWS if row.name in {result["name"] for result in results}]
    return next(goal for goal in goals.goals_of(played, results, [], 50) if goal.name == name)


AGAIN = "training again after a kill, with a spare, s"


def test_every_row_that_kills_has_a_goal_for_its_time_or_a_reason() -> None:
    killing = {row.name: row for row in faults.ROWS if "SIGKILL" in row.what or "SIGSTOP" in row.what}
    assert all(row.timed != bool(row.exempt) for row in killing.values())
    assert {row.name for row in faults.ROWS if row.timed} == {
        *("worker-killed", "raylet-killed", "save-killed", "commit-killed", "load-killed"),
        *("newest-damaged", "node-lost"),
    }


def test_the_slowest_row_decides_and_one_without_an_answer_misses_the_goal() -> None:
    fast, slow = {"name": "worker-killed", "again_s": 7.0}, {"name": "commit-killed", "again_s": 21.0}
    assert goal(AGAIN, fast).met
    assert goal(AGAIN, fast, slow).measured == 21.0
    assert goal(AGAIN, fast, {"name": "commit-killed", "again_s": None}).measured is None
    assert (
        goal(AGAIN, fast, {"name": "commit-killed", "again_s": 5.0, "error": "it was not as it should be"}).measured
        is None
    )


def test_rows_without_a_goal_for_their_time_are_told_with_it() -> None:
    rows = [row for row in faults.ROWS if row.name in ("worker-killed", "driver-killed")]
    (found,) = goals.exempt(rows, [{"name": "driver-killed", "again_s": 34.4}])
    assert (found["name"], found["again_s"]) == ("driver-killed", 34.4)
    assert "somebody else" in found["why"]


def test_the_time_to_a_commit_is_judged_on_the_demos_model() -> None:
    (demo,) = (row for row in faults.ROWS if row.demo_model)
    result = {"name": demo.name, "saved_s": 6.5, "steps_lost": 0, "samples_wrong": 0, "same_weights": None}
    assert goal("notice to committed checkpoint, the demo's model, s", result).measured == 6.5
    found = goals.goals_of([demo], [result], [], 50)
    assert not any("weights" in goal.name or "smaller" in goal.name for goal in found)
    assert chaos.holds(result)
    assert chaos.result_of(result) == "not compared"


def test_the_demos_model_is_the_recipe_as_it_is() -> None:
    small, demo = Job("data", 60, 12), Job("data", 60, 12, model=())
    assert "--model.embed-dim" in small.words("run", "2")
    assert not [word for word in demo.words("run", "2") if word.startswith(("--model", "--data.", "--optim.base-lr"))]


def two_drivers(folder: Path, code: int | None, words: str) -> Scene:
    """The one that was refused is process 7, the run's is process 8; the fault was at 12.5."""
    (folder / "log").write_text(words)
    other = SimpleNamespace(
        code=code, process=SimpleNamespace(pid=7), log=folder / "log", words=(folder / "log").read_text
    )
    holder = SimpleNamespace(process=SimpleNamespace(pid=8))
    return cast(Scene, SimpleNamespace(drivers=[other, holder], driver=holder, faults=[12.5]))


HELD = "error: s3://run is driven by process 8 on host since 2026-01-01 00:00:00"


@pytest.mark.parametrize("code", [1, 75])
def test_a_driver_that_was_refused(tmp_path: Path, code: int) -> None:
    before = history([], {"event": "asked", "time": 5.0, "pid": 7}, {"event": "asked", "time": 14.0, "pid": 8})
    faults.other_refused(two_drivers(tmp_path, code, HELD), before)


@pytest.mark.parametrize(
    ("code", "words", "asked_by", "why"),
    [
        (0, HELD, 8, "ended with 0"),
        (-9, HELD, 8, "ended with -9"),
        (None, HELD, 8, "ended with None"),
        (1, "error: something else", 8, "does not name process 8"),
        (1, HELD.replace(" 8 ", " 88 "), 8, "does not name process 8"),
        (1, HELD, 7, "began an attempt"),
    ],
)
def test_a_driver_that_was_not_refused(tmp_path: Path, code: int | None, words: str, asked_by: int, why: str) -> None:
    with pytest.raises(StepError, match=why):
        faults.other_refused(
            two_drivers(tmp_path, code, words), history([], {"event": "asked", "time": 14.0, "pid": asked_by})
        )


@pytest.mark.parametrize("lost_by", [[], ["error"], ["silence", "error"]])
def test_a_frozen_worker_that_the_watchdog_did_not_find(lost_by: list[str]) -> None:
    events = [{"event": "lost", "time": 1.0, "detected": how} for how in lost_by]
    with pytest.raises(StepError, match="by its silence"):
        faults.found_by_silence(cast(Scene, None), history([], *events))
