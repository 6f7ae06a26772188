"""What the driver and the workers tell each other while a run is on: one small actor that dies with the driver."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ray


@dataclass
class News:
    """What has come in since the driver last asked."""

    records: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    fatal: str | None = None


class Relay:
    """Lives on the driver's node; made an actor by `start_relay`."""

    def __init__(self, max_attempts_without_progress: int) -> None:
        self._news = News()
        self._stop = False
        self._fatal: str | None = None
        self._max_idle = max_attempts_without_progress
        self._num_idle = 0
        self._furthest = -1
        self._last_error: str | None = None

    def admit(self, committed: int | None) -> bool:
        """Whether an attempt may begin: not after a fatal error, and not in a crash loop.

        A crash loop is `max_attempts_without_progress` attempts in a row that committed nothing newer, wherever they
        failed.

        Args:
            committed: step of the newest checkpoint, 0 without one; None if the store did not say.
        """
        if committed is not None and committed > self._furthest:
            self._furthest, self._num_idle = committed, 0
        self._num_idle += 1
        if self._fatal is None and self._num_idle > self._max_idle:
            step, error = max(self._furthest, 0), self._last_error or "the worker processes were killed"
            what = f"{self._max_idle} attempts in a row committed nothing after step {step}"
            self._fatal = f"crash loop: {what}; last error: {error}"
        self._last_error = None
        return self._fatal is None

    def push(self, record: dict[str, Any]) -> None:
        """Take a metrics record for the driver."""
        self._news.records.append(record)

    def announce(self, event: dict[str, Any]) -> None:
        """Take an event for the driver."""
        self._news.events.append(event)

    def note_error(self, error: str, fatal: bool) -> None:
        """A worker raised. A fatal error is one that a restart cannot mend. Of an attempt, the first one is told."""
        if fatal and self._fatal is None:
            self._fatal = error
        elif self._last_error is None:
            self._last_error = error
            self.announce({"event": "error", "error": error})

    def take(self) -> News:
        """All that came in since the last call."""
        news, self._news = self._news, News()
        news.fatal = self._fatal
        return news

    def request_stop(self) -> None:
        """Ask the workers to save a checkpoint and stop."""
        self._stop = True

    def stop_requested(self) -> bool:
        """Whether `request_stop` was called."""
        return self._stop


def start_relay(max_attempts_without_progress: int) -> Any:
    """A Relay actor on the driver's node, which takes no CPU from the workers."""
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    actor = ray.remote(Relay).options(num_cpus=0, label_selector=here)
    return actor.remote(max_attempts_without_progress)
