"""The only door to storage: ranged reads, atomic writes, listing; every request with retries inside a deadline.

Works with AWS-like servers, with S3-compatible ones that have gaps (no conditional put, empty ETags, no bulk
delete), with local paths, and with whatever else fsspec has a filesystem for.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipeline.config import StoreConfig
from pipeline.errors import StoreChangedError, StoreError, StoreNotFoundError
from pipeline.store_backend import Backend, Pin, Sink, is_temporary
from pipeline.store_local import LocalBackend
from pipeline.urls import check_url


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored object: its path relative to the store's URL, and its length in bytes."""

    path: str
    num_bytes: int


class Writer(io.RawIOBase):
    """A sequential binary stream, as `Store.writer` gives it."""

    def __init__(self, sink: Sink, explained: Callable[[], AbstractContextManager[str]]) -> None:
        super().__init__()
        self._sink, self._explained = sink, explained
        self._num_bytes = 0
        self._broken = False

    def writable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Bytes written so far."""
        return self._num_bytes

    def write(self, data: Any, /) -> int:
        """Append all of `data`, any buffer of bytes. Raises StoreError."""
        view = memoryview(data).cast("B")
        self._broken = True  # until the bytes are taken: a caller that swallows the error must not commit a gap
        with self._explained():
            self._sink.append(view)
        self._broken = False
        self._num_bytes += len(view)
        return len(view)

    def commit(self) -> None:
        """Make the object visible. Raises StoreError."""
        with self._explained():
            if self._broken:
                raise OSError(errno.EIO, "an earlier write to this object failed")
            self._sink.commit()

    def abort(self) -> None:
        """Drop what was written."""
        self._sink.abort()


class Store:
    """Objects under one URL. Picklable; usable from threads, forked and spawned processes.

    Args:
        url: any fsspec URL or a bare local path, without user, password and query. Credentials and endpoints come
            from the standard chains only.
        config: timeouts and retries.

    Raises:
        ValueError: the URL names no bucket, or may hold a secret.
        StoreError: the URL's protocol is unknown, or its package is not installed.
    """

    def __init__(self, url: str, config: StoreConfig = StoreConfig()) -> None:  # noqa: B008 (frozen)
        self.config = config
        backend, self.url, self._root = _open(str(url), config)
        # One a process: neither threads nor connections survive a fork. The parent's is kept, so that a child
        # never closes it.
        self._backends: dict[int, Backend] = {os.getpid(): backend}

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def __str__(self) -> str:
        return self.url

    def __reduce__(self) -> tuple[type[Store], tuple[str, StoreConfig]]:
        return Store, (self.url, self.config)

    def child(self, path: str) -> Store:
        """A Store at `url/path`, on the same connections."""
        child = Store.__new__(Store)
        child.config, child._backends = self.config, self._backends
        child.url, child._root = f"{self.url}/{_checked(path)}", f"{self._root}/{_checked(path)}"
        return child

    def read(self, path: str) -> bytes:
        """The whole object in one request: take `read_range` for long ones. Raises StoreNotFoundError if absent."""
        with self._explained(path) as at:
            return self._backend.read(at, None, 0)

    def read_range(self, path: str, offset: int, num_bytes: int, pin: Pin | None = None) -> bytes:
        """`num_bytes` bytes from byte `offset` on, or fewer if the object ends there.

        Args:
            path: of the object.
            offset: first byte.
            num_bytes: how many.
            pin: remembers which version of the object its first read was of, by ETag, or by what else S3 or a local
                file system says of it. Other filesystems have no versions.

        Raises:
            StoreNotFoundError: there is no such object.
            StoreChangedError: it is another one than that of `pin`.
            ValueError: a negative argument.
        """
        if offset < 0 or num_bytes < 0:
            raise ValueError(f"read_range offset ({offset}) and num_bytes ({num_bytes}) must not be negative")
        if num_bytes == 0:
            return b""
        with self._explained(path) as at:
            return self._backend.read(at, offset, num_bytes, pin)

    def write(self, path: str, data: bytes) -> None:
        """Write or replace an object: readers see all of `data`, or what was there before."""
        with self._explained(path) as at:
            self._backend.write(at, bytes(data))

    def create(self, path: str, data: bytes) -> bool:
        """Write an object only if there is none; True if this call created it.

        Exclusive on local paths and where the store has conditional puts. Elsewhere the object is written, and read
        again after SETTLE_S: one of several creators wins, unless a request of theirs takes longer than that. There,
        `data` must be unique to its creator (hold a random number, for example): who finds its own bytes has won,
        so two that write the same bytes both do.
        """
        with self._explained(path) as at:
            return self._backend.create(at, bytes(data))

    @contextmanager
    def writer(self, path: str) -> Iterator[Writer]:
        """A stream whose bytes become the object when the block ends. An exception leaves nothing behind."""
        with self._explained(path) as at:
            writer = Writer(self._backend.sink(at), lambda: self._explained(path))
        try:
            yield writer
            writer.commit()
        except BaseException:
            # The first error is the one to report. What a server did not abort stays invisible.
            with suppress(Exception):
                writer.abort()
            raise
        finally:
            writer.close()

    def list(self, prefix: str = "") -> builtins.list[Entry]:
        """All objects under the directory `url/prefix`, recursively, in the order of their paths; [] if none."""
        with self._explained(prefix, or_root=True) as at:
            found = builtins.list(self._backend.find(at))
        skip = len(self._root) + 1
        entries = (Entry(path[skip:], num_bytes) for path, num_bytes in found if not is_temporary(path))
        return sorted(entries, key=lambda entry: entry.path)

    def folders(self, prefix: str = "") -> builtins.list[str]:
        """Names of the directories right below `url/prefix`, in order; what they hold is not listed. [] if none."""
        with self._explained(prefix, or_root=True) as at:
            return sorted(path.rsplit("/", 1)[-1] for path in self._backend.folders(at))

    def size(self, path: str) -> int:
        """Length in bytes. Raises StoreNotFoundError if absent."""
        with self._explained(path) as at:
            return self._backend.size(at)

    def exists(self, path: str) -> bool:
        """Whether there is such an object; a directory is none."""
        try:
            self.size(path)
        except StoreNotFoundError:
            return False
        return True

    def remove(self, path: str) -> None:
        """Delete one object; an absent one is fine."""
        with self._explained(path) as at:
            self._backend.remove(at)

    def remove_tree(self, prefix: str) -> None:
        """Delete all objects under the directory `url/prefix`, one by one: not every server has a bulk delete."""
        with self._explained(prefix) as at:
            self._backend.remove_tree(at)

    def remove_leftovers(self, prefix: str = "") -> int:
        """Delete what killed writers left under the directory `url/prefix`, where nobody must be writing any more.

        These are temporary files, and unfinished multipart uploads if the server lists them and we may abort them.

        Returns:
            How many there were.
        """
        with self._explained(prefix, or_root=True) as at:
            return self._backend.remove_leftovers(at)

    def check_readable(self) -> None:
        """Raise StoreError if the bucket or the directory is missing, or refuses us altogether: asks for a listing."""
        with self._explained("", or_root=True) as at:
            self._backend.check_readable(at)

    def check_writable(self) -> None:
        """Raise StoreError now, not hours later, where the bucket is missing or refuses us."""
        with self._explained("", or_root=True) as at:
            self._backend.check_writable(at)

    @property
    def _backend(self) -> Backend:
        if os.getpid() not in self._backends:
            self._backends[os.getpid()] = _open(self.url, self.config)[0]
        return self._backends[os.getpid()]

    @contextmanager
    def _explained(self, path: str, or_root: bool = False) -> Iterator[str]:
        """Give `path` as the backend wants it; turn its errors into a StoreError with what failed and what to do."""
        at = self._root if or_root and not path else f"{self._root}/{_checked(path)}"
        try:
            yield at
        except StoreChangedError as error:
            raise StoreChangedError(f"{self}/{path} {error}") from error
        except StoreError:
            raise
        except Exception as error:
            kind, reason, remedy = self._backend.explain(error)
            raise kind(f"{self}/{path}".rstrip("/") + f": {reason}; {remedy}") from error


def _checked(path: str) -> str:
    """`path` if it is a relative one that stays below its root."""
    path = path.rstrip("/")
    if not path or any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError(f"store path {path!r} must be relative, without empty, '.' or '..' parts")
    return path


def _open(url: str, config: StoreConfig) -> tuple[Backend, str, str]:
    """The backend, the normalised URL, and the root that the backend's paths start with."""
    check_url(url)
    protocol = fsspec.utils.get_protocol(url)
    is_s3 = protocol in ("s3", "s3a")
    # No shared instances: they would outlive a change of credentials or endpoint in the environment.
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if is_s3:
        timeouts = {"connect_timeout": min(5.0, config.read_timeout_s), "read_timeout": config.read_timeout_s}
        # The only retries are ours, and a read is one GET.
        once = {"retries": {"total_max_attempts": 1, "mode": "standard"}, "max_pool_connections": 64}
        options |= {"config_kwargs": timeouts | once, "max_concurrency": 1}
    try:
        filesystem, root = fsspec.url_to_fs(url, **options)
    except ImportError as error:
        raise StoreError(f"{url}: {error}; install the package that reads {protocol}://") from error
    root = root.rstrip("/")
    if isinstance(filesystem, LocalFileSystem):
        return LocalBackend(), root, root
    if not root:
        raise ValueError(f"store url {url!r} must name a bucket, as in {protocol}://bucket/path")
    # With a local store, nobody waits for these imports.
    from pipeline.store_remote import RemoteBackend

    if is_s3:
        from pipeline.store_s3 import S3Backend

        filesystem.retries = 1
        return S3Backend(filesystem, config), f"{protocol}://{root}", root
    return RemoteBackend(filesystem, config), url.rstrip("/"), root
