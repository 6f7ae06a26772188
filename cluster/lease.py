"""One driver a run: a lease in the run's bucket, taken over when its holder no longer renews it.

`<run>/lease/000007.json` is the seventh lease of the run, made by a put that only one driver can win, and written again
by its owner alone. The newest one counts. So a store needs no more than exclusive creation, which `Store.create` gives
with and without conditional puts, and nobody ever overwrites what another driver wrote.

A lease is stale when it has not changed for its term, by the watch of the one who looks: clocks need not agree.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import secrets
import socket
import threading
import time
from dataclasses import dataclass
from types import TracebackType

from cluster.processes import kernel, start_time
from pipeline.errors import StoreError, StoreNotFoundError
from pipeline.store import Store
from trainer.errors import RunError

logger = logging.getLogger(__name__)

LEASES = "lease"
TERM_S = 15.0
_RENEWALS = 4
"""A term."""
_LOOK_S = 0.5
_NAME = re.compile(rf"{LEASES}/(\d{{6,}})\.json")


class LeaseError(RunError):
    """The run is another driver's."""


@dataclass(frozen=True, kw_only=True)
class LeaseRecord:
    """Who drives a run."""

    generation: int
    """Leases of the run so far, this one included."""
    driver: str
    """Random name of the driver process."""
    host: str
    pid: int
    kernel: str | None
    """Where the process id means something: see `processes.kernel`."""
    pid_started: int | None
    """See `processes.start_time`."""
    started: float
    """When the lease was taken, in seconds since 1970, by its holder's clock."""
    renewed: float
    """When it was last renewed, likewise."""
    term_s: float
    """Without a renewal for this long, anybody may take over."""
    released: bool = False
    """Its holder has ended in order."""

    def to_json(self) -> bytes:
        """The bytes of its file."""
        return json.dumps(dataclasses.asdict(self), indent=1).encode()

    def __str__(self) -> str:
        """The holder, for a message."""
        return f"process {self.pid} on {self.host}"


class Lease:
    """A lease that this process holds and renews, by a thread of its own, until it is released or lost.

    A context manager; leaving it releases the lease.
    """

    def __init__(self, run: Store, record: LeaseRecord) -> None:
        self._run, self.record = run, record
        self._lost: LeaseRecord | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    @property
    def lost_to(self) -> LeaseRecord | None:
        """The driver that has taken over, if this one knows of any."""
        return self._lost

    def __enter__(self) -> Lease:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop renewing, and let the next driver begin at once."""
        self._closed.set()
        self._thread.join(TERM_S)
        if self._lost is None and not self._thread.is_alive():
            try:
                self._write(released=True)
            except StoreError as lost:
                logger.warning("the lease could not be released and will run out: %s", lost)

    def _renew(self) -> None:
        while not self._closed.wait(self.record.term_s / _RENEWALS):
            try:
                check_lease(self._run, self.record.generation)
                self._write()
            except LeaseError:
                self._lost = read_lease(self._run)
                return
            except StoreError as error:
                # Harmless while nobody takes over, and whoever does finds the store down too.
                logger.warning("the lease waits for the store: %s", error)

    def _write(self, released: bool = False) -> None:
        record = dataclasses.replace(self.record, renewed=time.time(), released=released)
        self._run.write(_path(self.record.generation), record.to_json())


def acquire(run: Store, term_s: float = TERM_S) -> Lease:
    """Take the run's lease; wait for a stale one to be known as such.

    Args:
        run: the run's store.
        term_s: of the new lease, in seconds.

    Raises:
        LeaseError: another driver holds it, or was faster.
        StoreError: the store did not answer.
    """
    before = _await_end(run, read_lease(run))
    now = time.time()
    record = LeaseRecord(
        generation=before.generation + 1 if before else 1,
        driver=secrets.token_hex(8),
        host=socket.gethostname(),
        pid=os.getpid(),
        kernel=kernel(),
        pid_started=start_time(os.getpid()),
        started=now,
        renewed=now,
        term_s=term_s,
    )
    if not run.create(_path(record.generation), record.to_json()):
        raise LeaseError(_held(run, read_lease(run) or record))
    lease = Lease(run, record)
    for generation in _generations(run):
        if generation < record.generation:
            run.remove(_path(generation))
    return lease


def check_lease(run: Store, generation: int) -> None:
    """Raise LeaseError if a newer lease than `generation` exists: its driver may be at work already."""
    newest = max(_generations(run), default=0)
    if newest > generation:
        raise LeaseError(f"{run} was taken over by another driver (lease {newest}; ours was {generation})")


def read_lease(run: Store) -> LeaseRecord | None:
    """The run's newest lease, or None if it never had one.

    Raises:
        RunError: it cannot be read.
    """
    newest = max(_generations(run), default=None)
    if newest is None:
        return None
    try:
        return LeaseRecord(**json.loads(run.read(_path(newest))))
    except StoreNotFoundError:  # superseded in between
        return read_lease(run)
    except (ValueError, TypeError) as error:
        raise RunError(f"{run}/{_path(newest)} is no lease ({error}); delete it if no driver is at work") from error


def is_stale(lease: LeaseRecord) -> bool:
    """Whether nobody drives the run any more, as far as this machine's clock can tell: for a look from outside."""
    return lease.released or _process_is_gone(lease) or time.time() - lease.renewed > lease.term_s


def _await_end(run: Store, seen: LeaseRecord | None) -> LeaseRecord | None:
    """Watch a lease until it is over; returns the one to follow. Raises LeaseError if it is renewed meanwhile."""
    if seen is None or seen.released or _process_is_gone(seen):
        return seen
    deadline = time.monotonic() + seen.term_s
    while time.monotonic() < deadline:
        time.sleep(_LOOK_S)
        newest = read_lease(run)
        assert newest is not None  # there is a newer one before an old one is removed
        if newest.released and newest.driver == seen.driver:
            return newest
        if newest != seen:
            raise LeaseError(_held(run, newest))
    return seen


def _held(run: Store, holder: LeaseRecord) -> str:
    return (
        f"{run} is driven by {holder} since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(holder.started))}; "
        f"a run has one driver at a time, and `tarmac stop` ends that one"
    )


def _process_is_gone(record: LeaseRecord) -> bool:
    """Whether the holder ran on this machine and does no more. On another one that cannot be known."""
    return record.kernel is not None and record.kernel == kernel() and record.pid_started != start_time(record.pid)


def _generations(run: Store) -> list[int]:
    return [int(match[1]) for entry in run.list(LEASES) if (match := _NAME.fullmatch(entry.path))]


def _path(generation: int) -> str:
    return f"{LEASES}/{generation:06d}.json"


def is_over(lease: LeaseRecord) -> bool:
    """Whether its holder has ended, as far as that can be known without comparing clocks."""
    return lease.released or _process_is_gone(lease)
