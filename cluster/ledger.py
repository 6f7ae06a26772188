"""The goodput ledger: every second of a run in exactly one of eight accounts, from its events and step records.

The accounts, as `KINDS` names them:

- `training`, `data_wait`, `saving`: the time from the end of one step's record to the end of the next, split into the
  stall of a save that began there, the model's wait for images, and the rest. The tail after the last step belongs to
  the save that is waited for.
- `lost_work`: the same time, whole, of steps that a later attempt did not start from, and so does again; and the time
  from the last record of a killed attempt to its end, of which no record is left.
- `loading`: from the beginning of rank 0's function to the model built and its checkpoint loaded.
- `starting`: from `placed`, when the resources are there, to that beginning, in the first attempt of every driver.
- `restarting`: the same in a driver's later attempts; and the time from the end of an attempt, or from the last sign of
  life of one that hung, to the next one's `asked`.
- `idle`: from `asked` to `placed` (waiting for nodes), from one driver's last word to the next one's first (no driver),
  and what comes after an attempt that finished the run or was told to stop.

An attempt's row ends where the next attempt's begins. Attempts of before there were driver's events begin with their
first event, and count as made by one driver unless they were told to stop. Clocks of several hosts may disagree: what
would go back in time is given no time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.attempt_facts import AttemptFacts, gather_facts
from cluster.lease import read_lease
from pipeline.store import Store
from trainer.metrics import Event, read_events
from trainer.step_columns import Floats, StepColumns, read_columns

KINDS = ("training", "data_wait", "saving", "lost_work", "loading", "starting", "restarting", "idle")
TRAINING, DATA_WAIT, SAVING, LOST_WORK, LOADING, STARTING, RESTARTING, IDLE = range(len(KINDS))

Kinds = npt.NDArray[np.int8]


@dataclass(frozen=True)
class AttemptRow:
    """Where one attempt's time went."""

    facts: AttemptFacts
    edges: Floats
    """Seconds since 1970 at which its time is cut, in order: one more than `kinds`."""
    kinds: Kinds
    """Of each piece, its place in KINDS."""

    @property
    def attempt(self) -> int:
        """Its number."""
        return self.facts.attempt

    @property
    def wall_s(self) -> float:
        """From its beginning to the next attempt's, or to the last thing known."""
        return float(self.edges[-1] - self.edges[0])

    @property
    def seconds(self) -> dict[str, float]:
        """Of each of KINDS."""
        sums = np.bincount(self.kinds, weights=np.diff(self.edges), minlength=len(KINDS))
        return dict(zip(KINDS, sums.tolist(), strict=True))


@dataclass(frozen=True)
class Ledger:
    """Where a run's time went."""

    rows: tuple[AttemptRow, ...]
    """One an attempt, each beginning where the one before ends."""

    @property
    def seconds(self) -> dict[str, float]:
        """Of each of KINDS; they add up to `wall_s`."""
        rows = [row.seconds for row in self.rows]
        return {kind: sum(row[kind] for row in rows) for kind in KINDS}

    @property
    def wall_s(self) -> float:
        """From the first attempt's beginning to the last thing known."""
        return float(self.rows[-1].edges[-1] - self.rows[0].edges[0]) if self.rows else 0.0

    @property
    def goodput(self) -> float:
        """Share of the wall time that was training and is still of use; 0 of no time."""
        return self.seconds["training"] / self.wall_s if self.wall_s else 0.0


def read_ledger(run: Store) -> Ledger:
    """The ledger of a run, from what its attempts wrote, up to now if its driver is at work."""
    events = read_events(run)
    return make_ledger(events, read_columns(run), read_alive_until(run, events))


def read_alive_until(run: Store, events: Sequence[Event]) -> float | None:
    """When the driver of the last attempt renewed its lease last; None if it has none, or gave it up in order."""
    lease = read_lease(run)
    driver = next((event["driver"] for event in reversed(events) if event["event"] == "asked"), None)
    return None if lease is None or lease.released or lease.driver != driver else lease.renewed


def make_ledger(events: Sequence[Event], steps: Mapping[int, StepColumns], alive_until: float | None = None) -> Ledger:
    """The ledger of events and step records.

    Args:
        events: of all attempts, each with its `attempt`.
        steps: step records by attempt.
        alive_until: when the last attempt's driver was last known to be at work, in seconds since 1970; until then the
            attempt is taken to go on with what it was at: records come late. None ends the ledger with the last event
            or record.
    """
    attempts = gather_facts(events, steps)
    if not attempts:
        return Ledger(())
    begins = np.maximum.accumulate([facts.first for facts in attempts]).tolist()
    ends = [*begins[1:], max(begins[-1], attempts[-1].last, alive_until or 0.0)]
    rows = []
    for i, (facts, begin, end) in enumerate(zip(attempts, begins, ends, strict=True)):
        later = attempts[i + 1 :]
        first_of_driver = i == 0 or facts.driver != attempts[i - 1].driver
        pieces = _Pieces()
        at = _add_prologue(pieces, facts, STARTING if first_of_driver else RESTARTING)
        _add_steps(pieces, facts, min((other.resumed_at for other in later), default=np.inf))
        if not later and alive_until is not None and facts.stopped is None and facts.outcome is None:
            pieces.to(at, end)
        _add_end(pieces, facts, at)
        goes_on = later[0].driver == facts.driver if later else True
        pieces.to(_after(facts) if goes_on else IDLE, end)
        rows.append(pieces.row(facts, begin, end))
    return Ledger(tuple(rows))


class _Pieces:
    """An attempt's time, piece by piece: each goes on from where the one before ends."""

    def __init__(self) -> None:
        self._ends: list[Floats] = []
        self._kinds: list[Kinds] = []

    def to(self, kind: int, end: float | None) -> None:
        """A piece of `kind` until `end`; none if that is not known, or is past already."""
        if end is not None:
            self.add(np.array([end]), np.array([kind]))

    def add(self, ends: Floats, kinds: npt.NDArray[np.integer[Any]]) -> None:
        """Many pieces."""
        self._ends.append(ends)
        self._kinds.append(kinds.astype(np.int8))

    def row(self, facts: AttemptFacts, begin: float, end: float) -> AttemptRow:
        """All pieces between two times; the last one must reach to `end`."""
        edges = np.concatenate([[begin], *self._ends]).clip(begin, end)
        return AttemptRow(facts, np.maximum.accumulate(edges), np.concatenate(self._kinds))


def _add_prologue(pieces: _Pieces, facts: AttemptFacts, starting: int) -> int:
    """The time before the first step; returns what the attempt was at then, as far as is known."""
    at = IDLE
    pieces.to(IDLE, facts.asked if facts.placed is None else facts.placed)
    if facts.placed is not None or facts.began is not None:
        at = starting
        pieces.to(starting, facts.began)
    if facts.began is not None:
        at = LOADING
        pieces.to(LOADING, facts.started)
    return at if facts.started is None else TRAINING


def _add_steps(pieces: _Pieces, facts: AttemptFacts, redone_after: float) -> None:
    """Each step's time from the end of the step before; lost after the step that a later attempt started from."""
    if facts.steps is None or facts.started is None:
        return
    steps = facts.steps
    ends = np.maximum.accumulate(np.maximum(steps.time, facts.started))
    begins = np.concatenate([[facts.started], ends[:-1]])
    saves = np.array(sorted(facts.saves), dtype=np.int64)
    saved_before = np.isin(steps.step, saves + 1)
    stalls = np.zeros(len(steps))
    stalls[saved_before] = [facts.saves[step - 1]["stall_s"] for step in steps.step[saved_before].tolist()]
    saved = begins + np.minimum(stalls, ends - begins)
    waited = saved + np.minimum(np.nan_to_num(steps.data_wait_s), ends - saved)
    kinds = np.tile([SAVING, DATA_WAIT, TRAINING], (len(steps), 1))
    kinds[steps.step > redone_after] = LOST_WORK
    pieces.add(np.stack([saved, waited, ends], axis=1).ravel(), kinds.ravel())


def _add_end(pieces: _Pieces, facts: AttemptFacts, at: int) -> None:
    """From the last step to the end of the attempt's own doing, and on to its driver's last word."""
    if facts.stopped is not None:
        save = facts.saves.get(facts.last_step) if facts.last_step is not None else None
        pieces.to(at, facts.stopped - (max(save["stall_s"], save["seconds"]) if save else 0.0))
        pieces.to(SAVING, facts.stopped)
    else:
        pieces.to(LOST_WORK if at == TRAINING else at, facts.died)
    pieces.to(_after(facts), facts.last)


def _after(facts: AttemptFacts) -> int:
    """What its driver does once the attempt has ended."""
    in_order = facts.outcome in ("finished", "stopped") or (facts.driver is None and facts.stopped is not None)
    return IDLE if in_order else RESTARTING
