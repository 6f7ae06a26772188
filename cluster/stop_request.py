"""The wish that a run stops, in the run's bucket: it reaches the driver wherever that is, and outlives both.

Who asks needs no more than the bucket. A request stays when it was honoured, so that whoever submits lost runs again
leaves this one alone. It is taken back by submitting the run, or by a driver that begins after it was honoured.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from pipeline.errors import StoreError, StoreNotFoundError
from pipeline.store import Store

logger = logging.getLogger(__name__)

STOP = "stop.json"

StopState = Literal["none", "asked", "honoured"]
"""`honoured`: a driver has stopped for it, and nobody has taken it back."""


def ask_to_stop(run: Store) -> None:
    """Ask the run's driver, if it has one, to save a checkpoint and stop; a driver that begins later stops too."""
    run.write(STOP, json.dumps({"asked": time.time(), "honoured": None}).encode())


def stop_state(run: Store) -> StopState:
    """What has become of a request, if there is one."""
    request = _read(run)
    if request is None:
        return "none"
    return "asked" if request["honoured"] is None else "honoured"


def stop_asked(run: Store) -> bool:
    """Whether a driver should stop now."""
    return stop_state(run) == "asked"


def stop_wanted(run: Store) -> bool:
    """Whether somebody asked, and nobody has taken it back: the run must not be begun again by itself."""
    return stop_state(run) != "none"


def clear_stop(run: Store) -> None:
    """For the driver, once it has stopped: a request that is there is done with, and remembered."""
    request = _read(run)
    if request is not None:
        run.write(STOP, json.dumps(request | {"honoured": time.time()}).encode())


def forget_honoured_stop(run: Store) -> None:
    """For a driver that begins: whoever began it wants the run to go on. A request that nobody has honoured stays."""
    if stop_state(run) == "honoured":
        run.remove(STOP)


@contextmanager
def stop_taken_back(run: Store) -> Iterator[None]:
    """Take a request back, unless the block fails: then it is there as before. Raises StoreError."""
    try:
        request = run.read(STOP)
    except StoreNotFoundError:
        yield
        return
    run.remove(STOP)
    try:
        yield
    except BaseException:
        try:
            run.write(STOP, request)
        except StoreError as error:
            logger.warning("the request to stop is lost (%s); give it again with `tarmac stop`", error)
        raise


def _read(run: Store) -> dict[str, Any] | None:
    try:
        body: dict[str, Any] = json.loads(run.read(STOP))
    except StoreNotFoundError:
        return None
    return body
