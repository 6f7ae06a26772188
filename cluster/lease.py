"""Who drives a run: the newest file below `lease/`, which its owner renews."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

from pipeline.errors import StoreNotFoundError
from pipeline.store import Store

LEASE = "lease"


@dataclass(frozen=True, kw_only=True)
class LeaseRecord:
    """What the newest driver last wrote."""

    holder: str
    host: str
    pid: int
    driver: str
    """Random id of the driver process."""
    started: float
    renewed: float
    """Seconds since 1970, by the driver's clock."""
    term_s: float
    """Not renewed for this long, it is stale."""


def read_lease(run: Store) -> LeaseRecord | None:
    """The newest lease of the run, stale or not; None if it never had a driver."""
    names = [entry.path for entry in run.list(LEASE)]
    if not names:
        return None
    try:
        body = json.loads(run.read(names[-1]))
    except StoreNotFoundError:
        return None
    return LeaseRecord(**{name: body[name] for name in LeaseRecord.__dataclass_fields__})


def is_stale(lease: LeaseRecord) -> bool:
    """Whether the lease ran out, by this machine's clock."""
    return time.time() - lease.renewed > lease.term_s
