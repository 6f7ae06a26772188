"""How far sharding, indexing and verifying are: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cluster.options import say

PLAIN_EVERY_S = 10.0
"""Where the console is a file or a pipe, a plain line this often."""


class DatasetProgress:
    """Counts what is done, and shows count, speed and time left. A context manager."""

    def __init__(self, console: Console, what: str, unit: str, plain_every_s: float = PLAIN_EVERY_S) -> None:
        """Args: console: where to; what: is being done; unit: what is counted; plain_every_s: between plain lines."""
        self._console, self._what, self._unit, self._plain_every_s = console, what, unit, plain_every_s
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
        speed = (TextColumn("{task.fields[megabytes_per_s]:.0f} MB/s"), TimeRemainingColumn())
        self._bar = Progress(*columns, *speed, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task(what, total=None, megabytes_per_s=0.0)
        self._done = self._found = self._num_bytes = 0
        self._begin = self._printed = time.monotonic()

    def __enter__(self) -> Self:
        """Begin to show."""
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave the bar as it is."""
        self._bar.stop()

    def advance(self, count: int, num_bytes: int, *, total: int | None = None, found: bool = False) -> None:
        """Take note of finished work.

        Args:
            count: units finished.
            num_bytes: of them.
            total: units in all, if known.
            found: an earlier run had done it: it says nothing about speed.
        """
        self._done += count
        self._found += count if found else 0
        self._num_bytes += 0 if found else num_bytes
        now = time.monotonic()
        speed = self._num_bytes / 1e6 / max(now - self._begin, 0.1)
        self._bar.update(self._task, advance=count, total=total, megabytes_per_s=speed)
        if not self._console.is_terminal and now - self._printed >= self._plain_every_s:
            self._printed = now
            say(self._console, self._line(now - self._begin, speed, total))

    def _line(self, elapsed_s: float, megabytes_per_s: float, total: int | None) -> str:
        line = f"{self._what}: {self._done:,}{'' if total is None else f' of {total:,}'} {self._unit}, "
        line += f"{megabytes_per_s:.0f} MB/s"
        if total is None or self._done == self._found:
            return line
        left_s = (total - self._done) * elapsed_s / (self._done - self._found)
        return f"{line}, {timedelta(seconds=round(left_s))} left"
