"""Object storage behind fsspec: S3 by single requests, anything else by the methods that all filesystems have.

Every request is retried by one policy: transient faults only, with jittered waits, inside one deadline.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from tempfile import NamedTemporaryFile
from typing import Any
from uuid import uuid4

import aiohttp
import botocore.exceptions as boto
from botocore.parsers import ResponseParserError
from tenacity import Retrying, retry_if_exception, stop_after_attempt, stop_before_delay, wait_random_exponential

from pipeline.config import StoreConfig
from pipeline.errors import StoreError, StoreNotFoundError, StoreRefusedError, StoreSilentError
from pipeline.store_backend import TEMPORARY_PREFIX, Pin, Sink, is_temporary

SETTLE_S = 1.0
"""Creators on a store without conditional puts agree on one winner if their requests overlap by less."""
REFUSED_REMEDY = (
    "check the credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, profile or role) and their rights there"
)

ARCHIVED_REMEDY = "restore the object, or copy it to a storage class that can be read at once"


def http_error(error: BaseException | None) -> tuple[int, str]:
    """HTTP status and S3 error code behind an exception; (0, "") without."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return int(status), str(response.get("Error", {}).get("Code", ""))
        error = error.__cause__
    return 0, ""


def http_status(error: BaseException) -> int:
    """HTTP status behind an exception; 0 without."""
    return http_error(error)[0]


def is_transient(error: BaseException) -> bool:
    """Whether the same request may well succeed a moment later."""
    status, code = http_error(error)
    if status:
        # RequestTimeout is a 400; ConditionalRequestConflict means that two conditional puts met.
        return status in (429, 500, 502, 503, 504) or code in ("RequestTimeout", "ConditionalRequestConflict")
    broken = (TimeoutError, ConnectionError, aiohttp.ClientError, ResponseParserError)
    boto_broken = (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError)
    return isinstance(error, broken + boto_broken) and not isinstance(error, boto.SSLError)


class RemoteBackend:
    """Any fsspec filesystem, by the methods that all of them have."""

    def __init__(self, filesystem: Any, config: StoreConfig) -> None:
        self.filesystem, self.config = filesystem, config
        self.is_exclusive = False

    def request(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `function` until it answers, fails for good, or the deadline is over."""
        end = time.monotonic() + self.config.deadline_s

        def attempt() -> Any:
            if getattr(self.filesystem, "async_impl", False):
                kwargs["timeout"] = max(end - time.monotonic(), 0.01)  # fsspec's own, in seconds
            return function(*args, **kwargs)

        retrying = Retrying(
            stop=stop_after_attempt(self.config.num_attempts) | stop_before_delay(self.config.deadline_s),
            wait=wait_random_exponential(multiplier=0.2, max=10),
            retry=retry_if_exception(is_transient),
            reraise=True,
        )
        return retrying(attempt)

    def read(self, path: str, offset: int | None, num_bytes: int, pin: Pin | None = None) -> bytes:
        """All bytes, or `num_bytes` from `offset` on. What is read here has no version that could be pinned."""
        limits = {} if offset is None else {"start": offset, "end": offset + num_bytes}
        try:
            return bytes(self.request(self.filesystem.cat_file, path, **limits))
        except OSError as error:
            if offset is not None and http_status(error) == 416:  # the object ends before
                return b""
            raise

    def write(self, path: str, data: bytes) -> None:
        """Put the whole object."""
        self.request(self.put, path, data)

    def create(self, path: str, data: bytes) -> bool:
        """Put if absent; where that condition is ignored, see whose bytes are there in the end."""
        if self.is_there(path) or not self.put_if_absent(path, data):
            return False
        if not self.is_exclusive:
            # Nothing in an answer tells whether the condition was understood. This one must be refused.
            self.put_if_absent(path, data)
        if self.is_exclusive:
            return True
        time.sleep(SETTLE_S)
        return self.read(path, None, 0) == data

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """False if the store refused because there is such an object."""
        try:
            self.request(self.put, path, data, absent=True)
        except FileExistsError:
            self.is_exclusive = True
            return False
        return True

    def put(self, path: str, data: bytes, absent: bool = False, **kwargs: Any) -> None:
        """One try to put an object. FileExistsError if it must be `absent`, is not, and the store cares."""
        self.filesystem.pipe_file(path, data, mode="create" if absent else "overwrite", **kwargs)

    def sink(self, path: str) -> Sink:
        """A temporary file here, uploaded at the end: few of fsspec's own writers can be abandoned."""
        return RemoteSink(self, path)

    def find(self, path: str) -> Iterator[tuple[str, int]]:
        """Path and length in bytes of each object below the directory `path`."""
        found: dict[str, dict[str, Any]] = self.request(self.filesystem.find, path, detail=True)
        return ((name, info["size"]) for name, info in found.items() if name.startswith(f"{path}/"))

    def folders(self, path: str) -> Iterator[str]:
        """Path of each directory right below the directory `path`."""
        with suppress(FileNotFoundError):
            found: list[dict[str, Any]] = self.request(self.filesystem.ls, path, detail=True)
            yield from (info["name"].rstrip("/") for info in found if info["type"] == "directory")

    def size(self, path: str) -> int:
        """Length in bytes."""
        info = self.request(self.filesystem.info, path)
        if info["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return int(info["size"])

    def is_there(self, path: str) -> bool:
        """Whether `path` is an object."""
        try:
            return self.size(path) >= 0
        except FileNotFoundError:
            return False

    def remove(self, path: str) -> None:
        """Delete one object."""
        with suppress(FileNotFoundError):
            self.request(self.filesystem.rm_file, path)

    def remove_tree(self, path: str) -> None:
        """Delete all objects below the directory `path`."""
        for name, _ in self.find(path):
            self.remove(name)

    def check_writable(self, path: str) -> None:
        """Write and delete a probe."""
        probe = f"{path}/{TEMPORARY_PREFIX}{uuid4().hex}"
        self.write(probe, b"")
        self.remove(probe)

    def check_readable(self, path: str) -> None:
        """List the directory."""
        self.request(self.filesystem.ls, path)

    def remove_leftovers(self, path: str) -> int:
        """Delete probes."""
        leftovers = [name for name, _ in self.find(path) if is_temporary(name)]
        for name in leftovers:
            self.remove(name)
        return len(leftovers)

    def explain(self, error: Exception) -> tuple[type[StoreError], str, str]:
        """By HTTP status, S3 error code, and exception class."""
        status, code = http_error(error)
        detail = str(error) or type(error).__name__
        if code == "NoSuchBucket":
            return StoreNotFoundError, "there is no such bucket", "create it, or check its name and AWS_ENDPOINT_URL"
        if isinstance(error, (FileNotFoundError, IsADirectoryError)):
            return StoreNotFoundError, "there is no such object", "check the URL"
        if status in (401, 403) or isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
            reason = f"access refused ({code}: {detail})" if code else f"access refused ({detail})"
            archived = code == "InvalidObjectState"
            return StoreRefusedError, reason, ARCHIVED_REMEDY if archived else REFUSED_REMEDY
        if is_transient(error):
            reason = f"gave up after {self.config.num_attempts} tries or {self.config.deadline_s:g} s ({detail})"
            return (
                StoreSilentError,
                reason,
                "check the network, the server and AWS_ENDPOINT_URL, or raise store.deadline_s",
            )
        if code in ("NotImplemented", "XAmzContentSHA256Mismatch"):
            return StoreError, detail, "try AWS_REQUEST_CHECKSUM_CALCULATION=when_required"
        return StoreError, f"{detail} ({code or type(error).__name__})", "check the URL and AWS_ENDPOINT_URL"


class RemoteSink:
    """A local temporary file that is uploaded when it is whole."""

    def __init__(self, backend: RemoteBackend, path: str) -> None:
        self.backend, self.path = backend, path
        self.file = NamedTemporaryFile(prefix=TEMPORARY_PREFIX)  # noqa: SIM115 (closed by commit and abort)

    def append(self, data: memoryview) -> None:
        """Write on."""
        self.file.write(data)

    def commit(self) -> None:
        """Upload the file."""
        self.file.flush()
        self.backend.request(self.backend.filesystem.put_file, self.file.name, self.path)
        self.file.close()

    def abort(self) -> None:
        """Delete the file."""
        self.file.close()
