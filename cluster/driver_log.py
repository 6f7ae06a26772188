"""What the driver writes about an attempt."""

from __future__ import annotations

import logging
import queue
import threading
from typing import Any

from pipeline.errors import StoreError
from pipeline.store import Store
from trainer.metrics import DRIVER_EVENTS, EventLog, attempt_directory

logger = logging.getLogger(__name__)

_CLOSE_S = 10.0


class DriverLog:
    """An attempt's `driver.jsonl`, written by a thread: a store that is down must not stop the driver from looking."""

    def __init__(self, run: Store, attempt: int) -> None:
        self._attempt = run.child(attempt_directory(attempt))
        self._queue: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="driver-log", daemon=True)
        self._thread.start()

    def add(self, event: dict[str, Any]) -> None:
        """Queue an event; it has its `event` and its `time`."""
        self._queue.put(event)

    def close(self) -> None:
        """Write the rest, or give up after a while."""
        self._queue.put(None)
        self._thread.join(_CLOSE_S)

    def _write(self) -> None:
        log = None
        while (event := self._queue.get()) is not None:
            try:
                log = log or EventLog(self._attempt, DRIVER_EVENTS)
                log.add_all([event])
            except StoreError as error:
                logger.warning("an event of the driver is lost: %s", error)
