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

    generation: int
    """Leases of the run so far, this one included."""
    driver: str
    """Random name of the driver process."""
    host: str
    pid: int
    started: float
    renewed: float
    """Seconds since 1970, by the driver's clock."""
    term_s: float
    """Not renewed for this long, it is stale."""
    released: bool = False
    """Its holder has ended in order."""


def read_lease(run: Store) -> LeaseRecord | None:
    """The newest lease of the run, stale or not; None if it never had a driver."""
    names = [entry.path for entry in run.list(LEASE)]
    if not names:
        return None
    try:
        body = json.loads(run.read(names[-1]))
    except StoreNotFoundError:
        return None
    return LeaseRecord(**{name: body[name] for name in LeaseRecord.__dataclass_fields__ if name in body})


def is_stale(lease: LeaseRecord) -> bool:
    """Whether the lease ran out, by this machine's clock."""
    return lease.released or time.time() - lease.renewed > lease.term_s
