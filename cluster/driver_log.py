"""What the driver writes about an attempt."""

from __future__ import annotations

import logging
import queue
import threading
import time
from typing import Any

from pipeline.errors import StoreError
from pipeline.store import Store
from trainer.metrics import DRIVER_EVENTS, EventLog, attempt_directory

logger = logging.getLogger(__name__)

_CLOSE_S = 10.0
_RETRY_S = 1.0
_GIVE_UP_S = 60.0


class DriverLog:
    """An attempt's `driver.jsonl`, written by a thread: a store that is down must not stop the driver from looking.

    What the store refuses is kept, and written with the next event or after `close`.
    """

    def __init__(self, run: Store, attempt: int) -> None:
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
        while (event := self._queue.get()) is not None:
            self._waiting.append(event)
            try:
                self._hand_over()
            except StoreError as error:
                logger.warning("events of the driver wait for the store: %s", error)
        give_up_at = time.monotonic() + _GIVE_UP_S
        while True:
            try:
                self._hand_over()
                if self._log is not None:
                    self._log.close()
                return
            except StoreError as error:
                if time.monotonic() > give_up_at:
                    logger.warning("events of the driver are lost: %s", error)
                    return
            time.sleep(_RETRY_S)

    def _hand_over(self) -> None:
        """Give the log what waits. Raises StoreError if the log, which first reads what is there, cannot be opened."""
        if self._waiting:
            self._log = self._log or EventLog(self._attempt, DRIVER_EVENTS)
            self._log.add_all(self._waiting)  # keeps, and tells of, what the store refuses
            self._waiting = []
