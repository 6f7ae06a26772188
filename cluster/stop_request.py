"""The wish that a run stops, in the run's bucket: it reaches the driver wherever that is, and outlives both.

Who asks needs no more than the bucket. A request stays when it was honoured, so that whoever submits lost runs again
leaves this one alone; `forget_stop` takes it back.
"""

from __future__ import annotations

import json
import time
from typing import Any

from pipeline.errors import StoreNotFoundError
from pipeline.store import Store

STOP = "stop.json"


def ask_to_stop(run: Store) -> None:
    """Ask the run's driver, if it has one, to save a checkpoint and stop; a driver that begins later stops too."""
    run.write(STOP, json.dumps({"asked": time.time(), "honoured": None}).encode())


def stop_asked(run: Store) -> bool:
    """Whether a driver should stop now."""
    request = _read(run)
    return request is not None and request["honoured"] is None


def clear_stop(run: Store) -> None:
    """For the driver, once it has stopped: the request is done with, and remembered."""
    request = _read(run)
    if request is not None:
        run.write(STOP, json.dumps(request | {"honoured": time.time()}).encode())


def stop_wanted(run: Store) -> bool:
    """Whether somebody asked, and nobody has taken it back: the run must not be begun again by itself."""
    return _read(run) is not None


def forget_stop(run: Store) -> None:
    """The run may go on."""
    run.remove(STOP)


def _read(run: Store) -> dict[str, Any] | None:
    try:
        body: dict[str, Any] = json.loads(run.read(STOP))
    except StoreNotFoundError:
        return None
    return body
