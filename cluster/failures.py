"""When a run that fails again and again is given up."""

from __future__ import annotations

import json

from pipeline.errors import StoreNotFoundError
from pipeline.store import Store
from trainer.metrics import DRIVER_EVENTS, EVENTS, Event, attempt_directory, next_attempt


class Failures:
    """Counts attempts in a row that committed nothing.

    Args:
        most: how many there may be.
        committed: step of the newest checkpoint, 0 without one.
        before: how many there were under earlier drivers. However many, a new driver makes one attempt.
    """

    def __init__(self, most: int, committed: int, before: int = 0) -> None:
        self._most, self._furthest = most, committed
        self._num = min(before, most - 1)

    def add(self, committed: int | None, error: str) -> str | None:
        """An attempt was lost; returns why the run is to be given up, or None.

        Args:
            committed: step of the newest checkpoint, 0 without one; None if the store did not say.
            error: of the attempt.
        """
        if committed is not None and committed > self._furthest:
            self._furthest, self._num = committed, 0
            return None
        self._num += 1
        if self._num < self._most:
            return None
        what = f"{self._num} attempts in a row committed nothing after step {self._furthest}"
        return f"crash loop: {what}; mend the last error, or allow more (--max-attempts-without-progress): {error}"

    @property
    def pause_s(self) -> float:
        """How long to wait before the next attempt: not at all at first, then longer and longer."""
        return min(30.0, 2.0**self._num - 2.0) if self._num > 1 else 0.0


def count_without_progress(run: Store, most: int) -> int:
    """How many of the run's newest attempts were begun in a row and committed nothing; looks at `most` of them.

    An attempt that never had room for its workers is none of them. Raises StoreError.
    """
    count = 0
    newest = next_attempt(run) - 1
    for attempt in range(newest, max(newest - most, 0), -1):
        events = _events(run, attempt)
        kinds = {event["event"] for event in events}
        outcomes = {event["outcome"] for event in events if event["event"] == "ended"}
        if "save" in kinds or outcomes - {"lost"}:
            break
        count += bool(kinds & {"placed", "start"})
    return count


def _events(run: Store, attempt: int) -> list[Event]:
    events = []
    for name in (EVENTS, DRIVER_EVENTS):
        try:
            lines = run.read(f"{attempt_directory(attempt)}/{name}").splitlines()
        except StoreNotFoundError:
            continue
        events += [json.loads(line) for line in lines]
    return events
