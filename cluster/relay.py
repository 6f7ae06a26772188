"""What the driver and the workers tell each other while a run is on: one small actor that dies with the driver."""

from __future__ import annotations

from collections import deque
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
        self._last_error = "the worker processes were killed"
        self._starts: deque[int] = deque(maxlen=max_attempts_without_progress + 1)

    def begin(self, step: int) -> str | None:
        """An attempt starts from `step`. Returns why it must not, or None.

        A crash loop is `max_attempts_without_progress` restarts in a row from one step.
        """
        self._starts.append(step)
        if self._fatal is None and len(self._starts) == self._starts.maxlen and len(set(self._starts)) == 1:
            self._fatal = (
                f"crash loop: {len(self._starts)} attempts in a row started from step {step} and committed nothing; "
                f"last error: {self._last_error}"
            )
        return self._fatal

    def push(self, record: dict[str, Any]) -> None:
        """Take a metrics record for the driver."""
        self._news.records.append(record)

    def announce(self, event: dict[str, Any]) -> None:
        """Take an event for the driver."""
        self._news.events.append(event)

    def note_error(self, error: str, fatal: bool) -> None:
        """A worker raised. A fatal error is one that a restart cannot mend."""
        self._last_error = error
        if fatal and self._fatal is None:
            self._fatal = error

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
