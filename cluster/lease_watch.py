"""Who drives a run, where something is decided from outside: by the watch of the one who looks.

A look at the lease's times, `is_stale`, takes this machine's clock for the driver's. That is good enough to show a run,
but a laptop whose clock is ahead would take every healthy run for lost, and submit it again.
"""

from __future__ import annotations

import time

from cluster.lease import LeaseRecord, is_over, read_lease
from pipeline.store import Store

_LOOK_S = 0.5


class LeaseWatch:
    """Looks at a run's lease again and again."""

    def __init__(self, run: Store) -> None:
        self._run = run
        self._seen: LeaseRecord | None = None
        self._since = 0.0

    def holder(self) -> LeaseRecord | None:
        """Who drives the run now; a lease that was not renewed for its term since one first looked is nobody's.

        Raises:
            RunError: the lease cannot be read.
            StoreError: the bucket does not answer.
        """
        lease = read_lease(self._run)
        if lease is None or is_over(lease):
            return None
        if lease != self._seen:
            self._seen, self._since = lease, time.monotonic()
        return lease if time.monotonic() - self._since < lease.term_s else None


def find_holder(run: Store) -> LeaseRecord | None:
    """Who drives the run, if anybody. Takes up to the lease's term, unless the clocks agree that it was just renewed.

    Raises: as `LeaseWatch.holder`.
    """
    watch = LeaseWatch(run)
    first = lease = watch.holder()
    while lease is not None and lease == first and abs(time.time() - lease.renewed) > lease.term_s:
        time.sleep(_LOOK_S)
        lease = watch.holder()
    return lease
