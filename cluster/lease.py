"""One driver a run: a lease in the run's bucket, taken over when its holder no longer renews it.

`<run>/lease/000007.json` is the seventh lease of the run, made by `Store.create` and written again by its owner. The
newest one counts, and it is whose name is in it. Where creation is exclusive, nobody overwrites what another driver
wrote. On a store without conditional puts a slow creator can; so its holder reads a lease before it renews it, and at
most one of two goes on for longer than that takes. What is checked can change before the write that follows it: a
process that stands still just then can still write once.

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
from contextlib import suppress
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
        self.lost: str | None = None
        """Why the run is no longer this driver's; None while it is, as far as is known here."""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def __enter__(self) -> Lease:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop renewing, and let the next driver begin at once."""
        self._closed.set()
        self._thread.join(TERM_S)
        if self.lost is None and not self._thread.is_alive():
            try:
                self._write(released=True)
            except (StoreError, RunError) as reason:
                logger.warning("the lease was not released: %s", reason)

    def check(self) -> None:
        """Ask the store whether the run is still this driver's; from any thread.

        Raises:
            LeaseError: it is another's; from then on `lost` says so.
            RunError, StoreError: the store does not tell.
        """
        if self.lost is not None:
            raise LeaseError(self.lost)
        try:
            check_lease(self._run, self.record)
        except LeaseError as error:
            self.lost = str(error)  # before its holder is looked up, which may fail or take long
            with suppress(StoreError, RunError):
                self.lost = f"{error}: {read_lease(self._run)}"
            raise

    def _renew(self) -> None:
        while self.lost is None and not self._closed.wait(self.record.term_s / _RENEWALS):
            try:
                self._write()
            except LeaseError as error:
                logger.warning("%s", error)
            except Exception as error:  # of any kind: without this thread nobody would notice that the lease is lost
                # Harmless while nobody takes over, and whoever does finds the store down too.
                logger.warning("the lease could not be renewed, which is tried again: %s", error)

    def _write(self, released: bool = False) -> None:
        self.check()
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
    check_lease(run, record)  # others may have come and gone since `before`, and this generation with them
    for generation in _generations(run):
        if generation < record.generation:
            run.remove(_path(generation))
    return Lease(run, record)


def check_lease(run: Store, ours: LeaseRecord) -> None:
    """Look whether a driver still has the run: a list and a read.

    Args:
        run: the run's store.
        ours: the driver's lease, as it was taken.

    Raises:
        LeaseError: there is a newer lease, or another driver's name is in this one. That driver may be at work already.
        RunError: this lease cannot be read.
        StoreError: the store did not answer.
    """
    newest = max(_generations(run), default=0)
    if newest > ours.generation:
        raise LeaseError(f"{run} was taken over by another driver (lease {newest}; ours was {ours.generation})")
    if newest < ours.generation:  # somebody deleted it, and its holder will write it again
        return
    try:
        driver = _read(run, newest).driver
    except StoreNotFoundError:  # superseded in between
        check_lease(run, ours)
        return
    if driver != ours.driver:
        raise LeaseError(f"{run} was taken over by another driver, which wrote lease {newest} over ours")


def read_lease(run: Store) -> LeaseRecord | None:
    """The run's newest lease, or None if it never had one.

    Raises:
        RunError: it cannot be read.
    """
    newest = max(_generations(run), default=None)
    if newest is None:
        return None
    try:
        return _read(run, newest)
    except StoreNotFoundError:  # superseded in between
        return read_lease(run)


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


def _read(run: Store, generation: int) -> LeaseRecord:
    path = _path(generation)
    try:
        return LeaseRecord(**json.loads(run.read(path)))
    except (ValueError, TypeError) as error:
        raise RunError(f"{run}/{path} is no lease ({error}); delete it if no driver is at work") from error


def _generations(run: Store) -> list[int]:
    return [int(match[1]) for entry in run.list(LEASES) if (match := _NAME.fullmatch(entry.path))]


def _path(generation: int) -> str:
    return f"{LEASES}/{generation:06d}.json"


def is_over(lease: LeaseRecord) -> bool:
    """Whether its holder has ended, as far as that can be known without comparing clocks."""
    return lease.released or _process_is_gone(lease)
