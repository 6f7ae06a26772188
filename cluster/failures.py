"""When a run that fails again and again is given up."""

from __future__ import annotations


class Failures:
    """Counts attempts in a row that committed nothing.

    Args:
        most: how many there may be.
        committed: step of the newest checkpoint, 0 without one.
    """

    def __init__(self, most: int, committed: int) -> None:
        self._most, self._furthest = most, committed
        self._num = 0

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
        return f"crash loop: {what}; last error: {error}"

    @property
    def pause_s(self) -> float:
        """How long to wait before the next attempt: not at all at first, then longer and longer."""
        return min(30.0, 2.0**self._num - 2.0) if self._num > 1 else 0.0
