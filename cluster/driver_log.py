"""What the driver writes about an attempt."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from cluster.lease import LeaseError
from pipeline.errors import StoreError
from pipeline.store import Store
from trainer.errors import RunError
from trainer.metrics import DRIVER_EVENTS, EventLog, attempt_directory

logger = logging.getLogger(__name__)

_CLOSE_S = 10.0
_RETRY_S = 1.0
_GIVE_UP_S = 60.0


class DriverLog:
    """An attempt's `driver.jsonl`, written by a thread: a store that is down must not stop the driver from looking.

    What the store refuses is kept, and written with the next event or after `close`.

    Args:
        run: the run's store.
        attempt: its number.
        may_write: asked before each write. After a LeaseError nothing more is written: if this attempt had not written
            anything yet, its number may be an attempt's of the driver that has taken over.
    """

    def __init__(self, run: Store, attempt: int, may_write: Callable[[], None]) -> None:
        self._may_write = may_write
        self._attempt = run.child(attempt_directory(attempt))
        self._queue: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._log: EventLog | None = None
        self._waiting: list[dict[str, Any]] = []
        self._thread = threading.Thread(target=self._write, name="driver-log", daemon=True)
        self._thread.start()

    def add(self, event: dict[str, Any]) -> None:
        """Queue an event; it has its `event` and its `time`."""
        self._queue.put(event)

    def close(self) -> None:
        """Write the rest; returns after a while in any case, and the thread tries on for a minute beside the driver."""
        self._queue.put(None)
        self._thread.join(_CLOSE_S)

    def _write(self) -> None:
        try:
            self._write_all()
        except LeaseError as error:
            logger.warning("the driver's events of this attempt end here: %s", error)

    def _write_all(self) -> None:
        """Raises LeaseError if the run is another driver's."""
        while (event := self._queue.get()) is not None:
            self._waiting.append(event)
            if (error := self._refusal(self._hand_over)) is not None:
                logger.warning("events of the driver wait for the store: %s", error)
        give_up_at = time.monotonic() + _GIVE_UP_S
        while (error := self._refusal(self._hand_over_and_close)) is not None:
            if time.monotonic() > give_up_at:
                logger.warning("events of the driver are lost: %s", error)
                return
            time.sleep(_RETRY_S)

    def _refusal(self, write: Callable[[], None]) -> Exception | None:
        """Why nothing can be written just now. Raises LeaseError."""
        try:
            self._may_write()
            write()
        except LeaseError:
            raise
        except (StoreError, RunError) as error:
            return error
        return None

    def _hand_over(self) -> None:
        """Give the log what waits. Raises StoreError if the log, which first reads what is there, cannot be opened."""
        if self._waiting:
            self._log = self._log or EventLog(self._attempt, DRIVER_EVENTS)
            self._log.add_all(self._waiting)  # keeps, and tells of, what the store refuses
            self._waiting = []

    def _hand_over_and_close(self) -> None:
        self._hand_over()
        if self._log is not None:
            self._log.close()
