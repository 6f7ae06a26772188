"""Runs that never were: workers and drivers that die at any moment, with an account kept while they live."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.store import Store
from trainer.metrics import DRIVER_EVENTS, EVENTS, EventLog, MetricsWriter, StepRecord
from trainer.step_columns import StepColumns

_OF_DRIVER = ("asked", "waiting", "placed", "notice", "lost", "ended")


class _DiedError(Exception):
    pass


def columns(
    steps: Sequence[int],
    times: Sequence[float],
    *,
    data_wait_s: float | Sequence[float] = 0.0,
    step_s: float | Sequence[float] = 1.0,
) -> StepColumns:
    """Step records of which only this matters."""
    count = len(steps)
    took, wait = (np.broadcast_to(np.array(seconds, dtype=float), count).copy() for seconds in (step_s, data_wait_s))
    ones = np.ones(count)
    return StepColumns(np.array(steps), np.array(times, dtype=float), took, wait, ones, ones, ones)


class MadeUpRun:
    """A run of a few attempts. Only what has an event or a record after it is known; `account` says what a reader of
    these should find, by how the time was spent, not by how the ledger looks for it."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.born = self.now = self._known_at = 1.7e9
        self.events: list[dict[str, Any]] = []
        self.records: dict[int, list[tuple[int, float, float, float]]] = {}
        self._settled: list[tuple[str, float, int | None]] = []  # kind, seconds, step
        self._open: list[tuple[str, float, int | None]] = []
        self._committed = 0
        self._driver, self._driver_number = "driver-1", 1
        self._life = math.inf

    def account(self) -> dict[str, float]:
        kinds = ("training", "data_wait", "saving", "lost_work", "loading", "starting", "restarting", "idle")
        sums: Counter[str] = Counter(dict.fromkeys(kinds, 0.0))  # type: ignore[arg-type]
        for kind, seconds, _ in self._settled:
            sums[kind] += seconds  # type: ignore[assignment]
        return dict(sums)

    def columns(self) -> dict[int, StepColumns]:
        return {
            attempt: columns(steps, times, data_wait_s=wait, step_s=step_s)
            for attempt, rows in self.records.items()
            for steps, times, wait, step_s in [zip(*rows, strict=True)]
        }

    def write(self, run: Store) -> None:
        """As the real writers write it."""
        for attempt in sorted({event["attempt"] for event in self.events}):
            store = run.child(f"attempts/{attempt:04d}")
            mine = [{k: v for k, v in e.items() if k != "attempt"} for e in self.events if e["attempt"] == attempt]
            EventLog(store, DRIVER_EVENTS).add_all(e for e in mine if e["event"] in _OF_DRIVER)
            of_rank_zero = [e for e in mine if e["event"] not in _OF_DRIVER]
            if of_rank_zero:
                EventLog(store, EVENTS).add_all(of_rank_zero)
            writer = MetricsWriter(store, 3600.0)
            for row in self.records.get(attempt, []):
                writer.add([_record(*row)])
                if self.chance.random() < 0.3:
                    writer.flush()
            writer.close()

    def live(self) -> None:
        reason = "first"
        for attempt in range(1, self.chance.randint(2, 7)):
            before = self._driver_number
            outcome = self._attempt(attempt, reason)
            if outcome == "finished":
                break
            driver_dies = outcome == "stopped" or self._driver_number != before or self.chance.random() < 0.1
            if driver_dies and self._driver_number == before:
                self._next_driver()
            # With the driver gone nobody is there; otherwise it is at work on the next attempt.
            self._spend("idle" if driver_dies else "restarting", self.chance.uniform(0, 50 if driver_dies else 2))
            reason = "resume" if driver_dies else {"moved": "move", "resized": "resize"}.get(outcome, "restart")
        self.now = self._known_at  # of what came later, nothing is known

    def _next_driver(self) -> None:
        self._driver_number += 1
        self._driver = f"driver-{self._driver_number}"

    def _attempt(self, attempt: int, reason: str) -> str:
        self._at, self._attempt_number = "idle", attempt
        self._life = math.inf
        self._tell("asked", reason=reason, num_workers=2, driver=self._driver)
        self._life = self.chance.choice([math.inf, self.chance.uniform(0, 40)])
        try:
            self._come_up("starting" if reason in ("first", "resume") else "restarting")
            return self._train()
        except _DiedError:
            return self._die()

    def _come_up(self, starting: str) -> None:
        uniform = self.chance.uniform
        for _ in range(self.chance.randint(0, 2)):
            self._spend("idle", uniform(0, 5))
            self._tell("waiting", need={"CPU": 2}, have={"CPU": 1})
        self._spend("idle", uniform(0, 5))
        self._tell("placed", num_workers=2)
        self._at = starting
        self._spend(starting, uniform(0, 8))
        began = self.now
        if self.chance.random() < 0.3:
            self._tell("damage", path="p", reason="r")
            self._at = "loading"
        self._spend("loading", uniform(0, 8))
        self._tell("start", began=began, step=self._committed, world_size=2)
        self._at = "lost_work"
        redone = self._committed
        self._settled = [
            ("lost_work" if step is not None and step > redone else kind, seconds, step)
            for kind, seconds, step in self._settled
        ]

    def _train(self) -> str:
        uniform, attempt = self.chance.uniform, self._attempt_number
        stall, saved = 0.0, None
        for step in range(self._committed + 1, self._committed + self.chance.randint(2, 14)):
            begin, wait = self.now, uniform(0, 1)
            for kind, seconds in (("saving", stall), ("data_wait", wait), ("training", uniform(0, 3))):
                self._spend(kind, seconds, step)
            self.records.setdefault(attempt, []).append((step, self.now, wait, self.now - begin))
            self._know()
            if saved is not None:
                self._tell("save", step=saved, stall_s=stall, seconds=stall + 1, num_bytes=1)
            stall, saved = 0.0, None
            if self.chance.random() < 0.3:
                stall, saved, self._committed = uniform(0, 1), step, step
        seconds = uniform(0, 3)
        self._spend("saving", seconds, step)
        self._committed = step
        outcome = self.chance.choice(["finished", "stopped", "moved", "resized"])
        self._tell("save", step=step, stall_s=seconds / 4, seconds=seconds, num_bytes=1)
        self._tell("stop", step=step, reason="finished" if outcome == "finished" else "stopped")
        self._life = math.inf
        self._spend("idle" if outcome in ("finished", "stopped") else "restarting", uniform(0, 1))
        self._tell("ended", outcome=outcome)
        return outcome

    def _die(self) -> str:
        """What was done since the last thing known is an attempt's last, and its record is lost with it."""
        how = self.chance.choice(["killed", "driver", "hung" if self._at == "lost_work" else "killed"])
        seconds = sum(one[1] for one in self._open)
        self._life, self._open = math.inf, []
        if how == "driver":
            self._next_driver()
            self._open = [("idle", seconds, None)]
            return "lost"
        self._open = [(self._at if how == "killed" else "restarting", seconds, None)]
        self._spend(self._at if how == "killed" else "restarting", self.chance.uniform(0, 2 if how == "killed" else 60))
        self._tell("lost", error="e", detected="error" if how == "killed" else self.chance.choice(["silence", "stall"]))
        if self.chance.random() < 0.8:
            self._spend("restarting", self.chance.uniform(0, 1))
            self._tell("ended", outcome="lost")
        return "lost"

    def _spend(self, kind: str, seconds: float, step: int | None = None) -> None:
        lived = min(seconds, self._life)
        self._open.append((kind, lived, step))
        self.now += lived
        self._life -= lived
        if self._life <= 0:
            raise _DiedError

    def _tell(self, kind: str, **fields: Any) -> None:
        self.events.append({"event": kind, "time": self.now, "attempt": self._attempt_number, **fields})
        self._know()

    def _know(self) -> None:
        self._settled += self._open
        self._open = []
        self._known_at = self.now


def _record(step: int, time: float, data_wait_s: float, step_s: float) -> StepRecord:
    return StepRecord(
        step=step,
        epoch=step / 7,
        samples_seen=step * 8,
        loss=1 / step,
        lr=1e-3,
        grad_norm=math.inf if step % 5 == 0 else 1.0,
        skipped=step % 5 == 0,
        images_per_s=8 / step_s,
        data_wait_s=data_wait_s,
        fetch_wait_s=data_wait_s / 2,
        decode_wait_s=data_wait_s / 2,
        copy_s=0.0,
        model_s=step_s - data_wait_s,
        step_s=step_s,
        time=time,
        sample_ids_digest="00ff00ff00ff00ff",
    )
