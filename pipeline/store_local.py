"""Local files as object storage: a write is a temporary file in the same directory, synced, then renamed."""

from __future__ import annotations

import errno
import io
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from pipeline.errors import StoreError, StoreNotFoundError, StoreRefusedError
from pipeline.store_backend import TEMPORARY_PREFIX, Pin, is_temporary

SYNC_BYTES = 32 * 2**20


class LocalBackend:
    """Files by their whole paths. Errors are the operating system's."""

    def read(self, path: str, offset: int | None, num_bytes: int, pin: Pin | None = None) -> bytes:
        """All bytes, or `num_bytes` from `offset` on."""
        with open(path, "rb", buffering=0) as file:
            if pin is not None:
                status = os.fstat(file.fileno())
                pin.check(f"inode {status.st_ino} of {status.st_size} bytes, written at {status.st_mtime_ns} ns")
            if offset is None:
                return file.read()
            file.seek(offset)
            return _read_exactly(file, num_bytes)

    def write(self, path: str, data: bytes) -> None:
        """Replace a file, atomically."""
        sink = LocalSink(path)
        try:
            sink.append(memoryview(data))
            sink.commit()
        except BaseException:
            sink.abort()
            raise

    def create(self, path: str, data: bytes) -> bool:
        """Link a complete file into place, which fails where one is."""
        sink = LocalSink(path)
        try:
            sink.append(memoryview(data))
            sink.sync()
            os.link(sink.temporary, path)
        except FileExistsError:
            return False
        finally:
            sink.abort()
        _sync_directory(sink.temporary.parent)
        return True

    def sink(self, path: str) -> LocalSink:
        """A stream into `path`."""
        return LocalSink(path)

    def find(self, path: str) -> Iterator[tuple[str, int]]:
        """Path and length in bytes of each file below the directory `path`."""
        for directory, _, names in os.walk(path):
            for name in names:
                file = os.path.join(directory, name)
                with suppress(FileNotFoundError):  # renamed or removed by someone else while we walk
                    yield file, os.stat(file).st_size

    def folders(self, path: str) -> Iterator[str]:
        """Path of each directory right below the directory `path`."""
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(path) as entries:
            yield from (entry.path for entry in entries if entry.is_dir())

    def size(self, path: str) -> int:
        """Length in bytes."""
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        return os.stat(path).st_size

    def remove(self, path: str) -> None:
        """Delete a file."""
        Path(path).unlink(missing_ok=True)

    def remove_tree(self, path: str) -> None:
        """Delete a directory; a file of that name stays, as it would in an object store."""
        if os.path.isdir(path):
            shutil.rmtree(path)

    def check_writable(self, path: str) -> None:
        """Ask for the nearest directory that exists; make nothing."""
        nearest = Path(path)
        while not nearest.exists():
            nearest = nearest.parent
        if not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(nearest))
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(nearest))

    def check_readable(self, path: str) -> None:
        """Open the directory."""
        os.scandir(path).close()

    def remove_leftovers(self, path: str) -> int:
        """Delete temporary files."""
        leftovers = [name for name, _ in self.find(path) if is_temporary(name)]
        for name in leftovers:
            self.remove(name)
        return len(leftovers)

    def explain(self, error: Exception) -> tuple[type[StoreError], str, str]:
        """By the system's error number."""
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError)):
            return StoreNotFoundError, reason, "check the path"
        if isinstance(error, PermissionError):
            return StoreRefusedError, reason, "check the permissions of the path"
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return StoreError, reason, "free some space there"
        return StoreError, reason, "check the path and its file system"


class LocalSink:
    """A temporary file beside its target. Of a long one the disk gets part after part while it is written."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.temporary = Path(path).parent / f"{TEMPORARY_PREFIX}{uuid4().hex}"
        self.temporary.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.temporary, "xb")  # noqa: SIM115 (closed by sync and abort)
        self.num_unsynced = 0
        self.syncing: threading.Thread | None = None
        self.sync_error: OSError | None = None

    def append(self, data: memoryview) -> None:
        """Write on."""
        self.file.write(data)
        self.num_unsynced += len(data)
        if self.num_unsynced >= SYNC_BYTES and not (self.syncing and self.syncing.is_alive()):
            self.num_unsynced = 0
            self.file.flush()
            self.syncing = threading.Thread(target=self.sync_written, name="tarmac-sync", daemon=True)
            self.syncing.start()

    def sync_written(self) -> None:
        """Put what is written so far on the disk."""
        try:
            os.fdatasync(self.file.fileno())
        except OSError as error:  # the system tells of it once
            self.sync_error = error

    def join(self) -> None:
        """Wait for the sync that is under way."""
        if self.syncing is not None:
            self.syncing.join()

    def sync(self) -> None:
        """Put the bytes on the disk."""
        self.join()
        if self.sync_error is not None:
            raise self.sync_error
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def commit(self) -> None:
        """Rename onto the target."""
        self.sync()
        os.replace(self.temporary, self.path)
        _sync_directory(self.temporary.parent)

    def abort(self) -> None:
        """Delete the temporary file."""
        self.join()  # its file must not be another one by then
        self.file.close()
        self.temporary.unlink(missing_ok=True)


def _read_exactly(file: io.FileIO, num_bytes: int) -> bytes:
    """As many bytes, or fewer at the end of the file; one read, but for signals and odd file systems."""
    data = file.read(num_bytes)
    if len(data) == num_bytes or not data:
        return data
    pieces = [data]
    while (missing := num_bytes - sum(map(len, pieces))) and (more := file.read(missing)):
        pieces.append(more)
    return b"".join(pieces)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
