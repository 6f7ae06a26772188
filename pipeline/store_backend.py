"""What the store asks of a kind of storage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn, Protocol

from pipeline.errors import StoreChangedError, StoreError

TEMPORARY_PREFIX = ".tarmac-tmp-"
"""Unfinished files and probes: never listed."""


def is_temporary(path: str) -> bool:
    """Whether `path` is an unfinished file or a probe."""
    return path.rsplit("/", 1)[-1].startswith(TEMPORARY_PREFIX)


class Pin:
    """Remembers which version of an object was read first; a read of another one is an error."""

    def __init__(self) -> None:
        self.version = ""

    def check(self, version: str) -> None:
        """Take the first version; raise StoreChangedError if a later one differs."""
        if not self.version:
            self.version = version
        if version != self.version:
            self.changed(version)

    def changed(self, found: str) -> NoReturn:
        """Raise StoreChangedError."""
        raise StoreChangedError(f"is not the object that was read before: that was {self.version}, this is {found}")


class Sink(Protocol):
    """Where a Writer's bytes go: nothing is visible before commit."""

    def append(self, data: memoryview) -> None:
        """Take the next bytes."""

    def commit(self) -> None:
        """Make the object visible, whole."""

    def abort(self) -> None:
        """Leave nothing behind."""


class Backend(Protocol):
    """One kind of storage. Paths are whole (`bucket/key`, `/dir/file`); errors are the libraries' own."""

    def read(self, path: str, offset: int | None, num_bytes: int, pin: Pin | None = None) -> bytes:
        """The whole object, or at most `num_bytes` from `offset` on, of the version that `pin` says."""

    def write(self, path: str, data: bytes) -> None:
        """Write or replace an object, atomically."""

    def create(self, path: str, data: bytes) -> bool:
        """Write an object if there is none."""

    def sink(self, path: str) -> Sink:
        """Start an object whose bytes come piece by piece."""

    def find(self, path: str) -> Iterator[tuple[str, int]]:
        """Path and length in bytes of each object below the directory `path`."""

    def folders(self, path: str) -> Iterator[str]:
        """Path of each directory right below the directory `path`."""

    def size(self, path: str) -> int:
        """Length in bytes. FileNotFoundError or IsADirectoryError if it is no object."""

    def remove(self, path: str) -> None:
        """Delete an object; an absent one is fine."""

    def remove_tree(self, path: str) -> None:
        """Delete all objects below the directory `path`."""

    def check_writable(self, path: str) -> None:
        """Fail if objects below `path` could not be written."""

    def check_readable(self, path: str) -> None:
        """Fail if objects below `path` could not be listed."""

    def remove_leftovers(self, path: str) -> int:
        """Delete what killed writers left below the directory `path`; how much there was."""

    def explain(self, error: Exception) -> tuple[type[StoreError], str, str]:
        """What kind of error this is to the caller, its reason, and its remedy."""
