"""What a run has written since one last looked: the same news that its own driver shows, from the bucket."""

from __future__ import annotations

import json
from typing import Any

from cluster.relay import News
from pipeline.store import Store
from trainer.metrics import ATTEMPTS, DRIVER_EVENTS, EVENTS, Event, with_nan


class RunNews:
    """Follows a run's records and events. Begins with the newest attempt that there is, and its newest record."""

    def __init__(self, run: Store) -> None:
        self._run = run
        self._attempt = 0
        self._parts_seen: set[str] = set()
        self._num_events: dict[str, int] = {}
        self._is_first = True

    def take(self) -> News:
        """All that was written since the last call. Raises StoreError."""
        news = News()
        numbers = sorted(int(name) for name in self._run.folders(ATTEMPTS) if name.isdecimal())
        for attempt in numbers[-1:] if self._is_first else [number for number in numbers if number >= self._attempt]:
            self._look_into(attempt, news)
            self._attempt = attempt
        if self._is_first:
            news.records = news.records[-1:]
        self._is_first = False
        return news

    def _look_into(self, attempt: int, news: News) -> None:
        directory = f"{ATTEMPTS}/{attempt:04d}"
        entries = self._run.list(directory)
        events: list[Event] = []
        for entry in entries:
            if entry.path in (f"{directory}/{EVENTS}", f"{directory}/{DRIVER_EVENTS}"):
                lines = self._lines(entry.path)
                events += lines[self._num_events.get(entry.path, 0) :]
                self._num_events[entry.path] = len(lines)
        news.events += [_told(event) for event in sorted(events, key=lambda item: item["time"])]
        parts = [entry.path for entry in entries if entry.path.startswith(f"{directory}/metrics-")]
        new = [part for part in parts if part not in self._parts_seen]
        for part in new[-1:] if self._is_first else new:
            news.records += [dict(with_nan(line)) for line in self._lines(part)]
        self._parts_seen.update(new)

    def _lines(self, path: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._run.read(path).splitlines()]


def _told(event: Event) -> Event:
    """The event as the console knows it: to a driver, a worker's `start` is an attempt."""
    return event | {"event": "attempt"} if event["event"] == "start" else event
