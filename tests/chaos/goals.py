"""The goals of `make chaos`, and whether what was measured meets them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.peers.goals import Goal
from tests.chaos.faults import Row

BACK_WITHIN_S = 20.0
SAVED_WITHIN_S = 6.0
MAX_LOSS_DIFFERENCE = 1e-4
MIN_GOODPUT = 0.85
NIGHT_MINUTES = 20.0
GOODPUTS = ("goodput_undisturbed", "goodput_own", "goodput_ledger")
"""The ways in which our night's goodput is measured, see tests/chaos/night.py; the lowest has to do."""


def goals_of(
    rows: Sequence[Row], results: Sequence[dict[str, Any]], nights: Sequence[dict[str, Any]], cadence: int
) -> list[Goal]:
    """The goals that the chosen rows are about. One whose row failed is not measured, and so missed."""
    by_name = {result["name"]: result for result in results if "error" not in result}

    def worst(name: str, belongs: Callable[[Row], bool], measured: str, goal: float) -> Iterable[Goal]:
        """The largest of a measurement over the rows that it belongs to; None if one of them lacks it."""
        values = [by_name.get(row.name, {}).get(measured) for row in rows if belongs(row)]
        if values:
            missing = any(value is None for value in values)
            yield Goal(name, goal, None if missing else float(max(values)), at_most=True)

    unnoticed = [row for row in rows if not row.notice]
    return [
        *worst("steps lost with notice", lambda row: row.notice, "steps_lost", 0),
        *(
            goal
            for times in sorted({row.max_cadences_lost for row in unnoticed})
            for goal in worst(
                f"steps lost without notice, {times} x the cadence",
                lambda row, times=times: row in unnoticed and row.max_cadences_lost == times,
                "steps_lost_but_beside_save",
                times * cadence,
            )
        ),
        *worst(
            "training again after a kill, with a spare, s",
            lambda row: row.timed and not row.resized,
            "again_s",
            BACK_WITHIN_S,
        ),
        *worst("training again, fewer workers, s", lambda row: row.timed and row.resized, "again_s", BACK_WITHIN_S),
        *worst(
            "notice to committed checkpoint, the demo's model, s",
            lambda row: row.notice and row.demo_model,
            "saved_s",
            SAVED_WITHIN_S,
        ),
        *worst(
            "notice to committed checkpoint, a smaller model, s",
            lambda row: row.notice and not row.demo_model and not row.resized,
            "saved_s",
            SAVED_WITHIN_S,
        ),
        *worst("samples lost or repeated", lambda row: True, "samples_wrong", 0),
        *worst(
            "largest difference of a loss, resized", lambda row: row.resized, "loss_difference", MAX_LOSS_DIFFERENCE
        ),
        *_same_weights(rows, by_name),
        *(goal for night in nights[:1] for goal in night_goals(night)),
    ]


def night_goals(night: dict[str, Any]) -> list[Goal]:
    """The goals of our night. One that failed is not measured, whatever it had until then."""
    short = f", {night['minutes']:g} min only" if night["minutes"] < NIGHT_MINUTES else ""
    measured = {} if "error" in night else night
    goodputs = [measured.get(name) for name in GOODPUTS]
    return [
        Goal(f"goodput of the bad night{short}", MIN_GOODPUT, None if None in goodputs else min(goodputs)),
        Goal(f"samples lost or repeated in the bad night{short}", 0, measured.get("samples_wrong"), at_most=True),
    ]


def exempt(rows: Sequence[Row], results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without a goal for the time until training goes on, with the reason and that time."""
    times = {result["name"]: result.get("again_s") for result in results}
    return [{"name": row.name, "why": row.exempt, "again_s": times.get(row.name)} for row in rows if row.exempt]


def _same_weights(rows: Sequence[Row], by_name: dict[str, dict[str, Any]]) -> Iterable[Goal]:
    same = [by_name.get(row.name, {}).get("same_weights") for row in rows if not row.resized and not row.demo_model]
    if same:
        differ = None if None in same else same.count(False)
        yield Goal("rows whose weights differ from the undisturbed run's", 0, differ, at_most=True)
