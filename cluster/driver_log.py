"""What the driver writes about an attempt."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

from cluster.lease import LeaseError
from pipeline.errors import StoreError
from pipeline.store import Store
from trainer.errors import RunError
from trainer.metrics import DRIVER_EVENTS, EventLog, attempt_directory

logger = logging.getLogger(__name__)

_CLOSE_S = 10.0


class DriverLog:
    """An attempt's `driver.jsonl`, written by a thread: a store that is down must not stop the driver from looking.

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
        log, waiting = None, []
        while (event := self._queue.get()) is not None:
            waiting.append(event)
            try:
                self._may_write()
                log = log or EventLog(self._attempt, DRIVER_EVENTS)
                log.add_all(waiting)
                waiting = []
            except LeaseError as error:
                logger.warning("the driver's events of this attempt end here: %s", error)
                return
            except (StoreError, RunError) as error:
                logger.warning("events of the driver wait for the store: %s", error)
