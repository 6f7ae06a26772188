"""Requests to stop: SIGTERM and SIGINT to the driver, and `tarmac stop`, which reaches it through the run's bucket."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any

from cluster.stop_request import clear_stop, forget_honoured_stop, stop_asked
from pipeline.errors import StoreError
from pipeline.store import Store

logger = logging.getLogger(__name__)

_POLL_S = 2.0


class Stops:
    """Notes requests while the context lasts; the second signal raises KeyboardInterrupt.

    A request that an earlier driver honoured is forgotten at the beginning.

    Args:
        run: the run's store, where a request may lie. It is asked by a thread: a store that is down keeps nobody up.
    """

    def __init__(self, run: Store) -> None:
        self._run = run
        self._signal = ""
        self._request = False
        self._before: dict[signal.Signals, Any] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, name="stop-request", daemon=True)

    @property
    def asked_by(self) -> str:
        """Who asked: a signal's name, or the command's; "" if nobody did."""
        return self._signal or ("tarmac stop" if self._request else "")

    def done(self) -> None:
        """The run has ended in order: a request in the bucket is done with, seen or not.

        A store that is down is only logged: the run has ended all the same.
        """
        self._closed.set()
        self._thread.join()  # or it could take this for an old request
        try:
            clear_stop(self._run)
        except StoreError as error:
            logger.warning("a request to stop may be left for the next driver: %s", error)

    def __enter__(self) -> Stops:
        """Begin to look."""
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """As it was before."""
        self._closed.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number).name

    def _look(self) -> None:
        has_begun = False
        while not self._request and not self._closed.is_set():
            try:
                if not has_begun:
                    forget_honoured_stop(self._run)
                    has_begun = True
                self._request = stop_asked(self._run)
            except StoreError as error:
                logger.warning("no answer about a stop request: %s", error)
            self._closed.wait(_POLL_S)
