"""What is known of each attempt of a run, however it ended: its times, its steps, its saves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.metrics import Event
from trainer.step_columns import StepColumns

_OF_RANK_ZERO = frozenset({"damage", "start", "save", "quarantined", "skipped", "stop"})
_ENDS = frozenset({"lost", "ended"})


@dataclass(frozen=True, kw_only=True)
class AttemptFacts:
    """Times are in seconds since 1970; None is not known, or has not come to pass."""

    attempt: int
    first: float
    """The first thing known."""
    last: float
    """The last thing known."""
    driver: str | None
    """Random name of the driver process; None before there were driver's events."""
    num_workers: int | None
    asked: float | None
    """When its driver began to wait for resources, or last said that it waits."""
    placed: float | None
    """When the resources were there."""
    began: float | None
    """When rank 0's function began, or the first that is known of it."""
    started: float | None
    """When the model was built and the checkpoint loaded."""
    stopped: float | None
    """When rank 0 ended in order, its last save committed."""
    died: float | None
    """Of an attempt that did not: when it had certainly ended. Of one that hung, its last sign of life."""
    outcome: str | None
    """`finished`, `stopped`, `moved`, `resized`, `lost`; of an attempt with no driver's events what its `stop` says."""
    resumed_at: float
    """The step of the checkpoint that it started from; infinite if that is not known."""
    saves: Mapping[int, Event]
    """Its `save` events, by step."""
    steps: StepColumns | None

    @property
    def last_step(self) -> int | None:
        """The last step on record."""
        return int(self.steps.step[-1]) if self.steps else None


def gather_facts(events: Sequence[Event], steps: Mapping[int, StepColumns]) -> list[AttemptFacts]:
    """The facts of every attempt that left anything, in order.

    Args:
        events: of all attempts, each with its `attempt`, in the order of their times within one.
        steps: step records by attempt.
    """
    by_attempt: dict[int, list[Event]] = {attempt: [] for attempt in steps}
    for event in events:
        by_attempt.setdefault(event["attempt"], []).append(event)
    return [_facts(attempt, by_attempt[attempt], steps.get(attempt)) for attempt in sorted(by_attempt)]


def _facts(attempt: int, events: list[Event], steps: StepColumns | None) -> AttemptFacts:
    last_of = {event["event"]: event for event in events}
    asked, start, stop = (last_of.get(kind) for kind in ("asked", "start", "stop"))
    ended, lost = last_of.get("ended"), last_of.get("lost")
    of_steps = [] if steps is None else [float(steps.time[0] - np.nan_to_num(steps.step_s[0])), float(steps.time.max())]
    of_rank_zero = [event["time"] for event in events if event["event"] in _OF_RANK_ZERO]
    of_rank_zero += of_steps if start is None else [start.get("began", start["time"]), *of_steps[1:]]
    times = of_rank_zero + [event["time"] for event in events]
    alive = of_rank_zero + [event["time"] for event in events if event["event"] not in _ENDS]
    waited = [last_of[kind]["time"] for kind in ("asked", "waiting") if kind in last_of]
    placed = _time(last_of.get("placed"))
    hung = lost is not None and lost["detected"] != "error" and bool(of_rank_zero)
    return AttemptFacts(
        attempt=attempt,
        first=min(times),
        last=max(times),
        driver=None if asked is None else asked["driver"],
        num_workers=(start or {}).get("world_size", (asked or {}).get("num_workers")),
        asked=max(waited, default=None),
        placed=placed,
        began=min(of_rank_zero, default=None),
        started=_time(start) if start is not None or not of_steps else of_steps[0],
        stopped=_time(stop),
        died=max(of_rank_zero) if hung else _time(lost or ended) or max(alive, default=None),
        outcome=_outcome(stop, lost, ended),
        resumed_at=float(start["step"]) if start else float(steps.step[0] - 1) if steps else math.inf,
        saves={event["step"]: event for event in events if event["event"] == "save"},
        steps=steps,
    )


def _time(event: Event | None) -> float | None:
    return None if event is None else float(event["time"])


def _outcome(stop: Event | None, lost: Event | None, ended: Event | None) -> str | None:
    if ended is not None:
        return str(ended["outcome"])
    if lost is not None:
        return "lost"
    return None if stop is None else str(stop["reason"])
