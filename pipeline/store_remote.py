"""Object storage behind fsspec: S3 by single requests, anything else by the methods that all filesystems have.

Every request is retried by one policy: transient faults only, with jittered waits, inside one deadline.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from tempfile import NamedTemporaryFile
from typing import Any, NamedTuple
from uuid import uuid4

import aiohttp
import botocore.exceptions as boto
from botocore.parsers import ResponseParserError
from tenacity import Retrying, retry_if_exception, stop_after_attempt, stop_before_delay, wait_random_exponential

from pipeline.config import StoreConfig
from pipeline.errors import StoreError, StoreNotFoundError, StoreRefusedError
from pipeline.store_backend import TEMPORARY_PREFIX, Sink, is_temporary

PART_BYTES = 64 * 2**20
MAX_PARTS = 10_000
"""Of an S3 multipart upload, so an object may have 625 GiB. Some servers want all parts equally long."""
SETTLE_S = 1.0
"""Creators on a store without conditional puts agree on one winner if their requests overlap by less."""
CREATOR_KEY = "tarmac-creator"
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

    def read(self, path: str, offset: int | None, num_bytes: int) -> bytes:
        """All bytes, or `num_bytes` from `offset` on."""
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
            return StoreError, reason, "check the network, the server and AWS_ENDPOINT_URL, or raise store.deadline_s"
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


class Upload(NamedTuple):
    """An unfinished multipart upload."""

    path: str
    id: str


class S3Backend(RemoteBackend):
    """S3, by single requests: each is retried by itself, a missing object costs one, a page of a listing too."""

    def call(self, method: str, path: str, **kwargs: Any) -> Any:
        """One S3 request about the object at `path`, retried."""
        return self.request(self.call_once, method, path, **kwargs)

    def call_once(self, method: str, path: str, **kwargs: Any) -> Any:
        """One S3 request."""
        bucket, key, _ = self.filesystem.split_path(path)
        return self.filesystem.call_s3(method, Bucket=bucket, Key=key, **kwargs)

    def put(self, path: str, data: bytes, absent: bool = False, **kwargs: Any) -> None:
        """PutObject, with `If-None-Match: *` if it must be absent."""
        condition = {"IfNoneMatch": "*"} if absent else {}
        try:
            self.call_once("put_object", path, Body=data, **condition, **kwargs)
        except OSError as error:
            if absent and http_status(error) == 412:
                raise FileExistsError(path) from error
            raise

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """PutObject, on condition.

        A refusal may answer the second copy of a request whose first was served: we repeat a request whose answer
        was lost, and so does aiohttp, silently. The object's metadata tells.
        """
        creator = uuid4().hex
        try:
            self.request(self.put, path, data, absent=True, Metadata={CREATOR_KEY: creator})
        except FileExistsError:
            self.is_exclusive = True
            with suppress(FileNotFoundError):
                return bool(self.call("head_object", path).get("Metadata", {}).get(CREATOR_KEY) == creator)
            return False
        return True

    def write(self, path: str, data: bytes) -> None:
        """One PutObject, or a multipart upload of a long one."""
        if len(data) <= PART_BYTES:
            super().write(path, data)
            return
        sink = S3Sink(self, path)
        try:
            sink.append(memoryview(data))
            sink.commit()
        except BaseException:
            with suppress(Exception):
                sink.abort()
            raise

    def sink(self, path: str) -> Sink:
        """A multipart upload."""
        return S3Sink(self, path)

    def find(self, path: str) -> Iterator[tuple[str, int]]:
        """Path and length in bytes of each object below the directory `path`."""
        bucket, key, _ = self.filesystem.split_path(path)
        ask = {"Bucket": bucket, "Prefix": f"{key}/" if key else ""}
        while True:
            page = self.request(self.filesystem.call_s3, "list_objects_v2", **ask)
            for item in page.get("Contents", []):
                if not item["Key"].endswith("/"):  # a directory's placeholder
                    yield f"{bucket}/{item['Key']}", item["Size"]
            if not page.get("IsTruncated"):
                return
            ask["ContinuationToken"] = page["NextContinuationToken"]

    def check_readable(self, path: str) -> None:
        """List one object."""
        bucket, key, _ = self.filesystem.split_path(path)
        self.request(self.filesystem.call_s3, "list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=1)

    def remove_leftovers(self, path: str) -> int:
        """Delete probes, and abort multipart uploads, as far as the server has these requests and grants them."""
        num_removed = super().remove_leftovers(path)
        with suppress(OSError):
            for upload in self.uploads(path):
                self.call("abort_multipart_upload", upload.path, UploadId=upload.id)
                num_removed += 1
        return num_removed

    def uploads(self, path: str) -> list[Upload]:
        """Unfinished multipart uploads below the directory `path`."""
        bucket, key, _ = self.filesystem.split_path(path)
        found: list[Upload] = []
        ask = {"Bucket": bucket, "Prefix": f"{key}/" if key else ""}
        while True:
            page = self.request(self.filesystem.call_s3, "list_multipart_uploads", **ask)
            found += [Upload(f"{bucket}/{item['Key']}", item["UploadId"]) for item in page.get("Uploads", [])]
            if not page.get("IsTruncated"):
                return found
            ask |= {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def size(self, path: str) -> int:
        """Length in bytes."""
        return int(self.call("head_object", path)["ContentLength"])

    def remove(self, path: str) -> None:
        """DeleteObject."""
        with suppress(FileNotFoundError):
            self.call("delete_object", path)


class S3Sink:
    """A multipart upload, whose parts go out while the next one is filled; one PutObject if it all fits into a part."""

    def __init__(self, backend: S3Backend, path: str) -> None:
        self.backend, self.path = backend, path
        self.buffer = bytearray()
        self.parts: list[dict[str, Any]] = []
        self.upload: dict[str, str] = {}
        self.threads = ThreadPoolExecutor(1, "tarmac-upload")
        self.sending: Future[dict[str, Any]] | None = None

    def append(self, data: memoryview) -> None:
        """Upload a part whenever one is full."""
        while data:
            if len(self.buffer) == PART_BYTES:
                self.send_part()
            room = PART_BYTES - len(self.buffer)
            self.buffer += data[:room]
            data = data[room:]

    def send_part(self) -> None:
        """Upload the buffer as the next part."""
        if len(self.parts) + 1 == MAX_PARTS:
            raise OSError(errno.EFBIG, f"object is longer than {MAX_PARTS} parts of {PART_BYTES} bytes")
        if not self.upload:
            answer = self.backend.call("create_multipart_upload", self.path)
            self.upload = {"UploadId": answer["UploadId"]}
        self.finish_part()
        self.sending = self.threads.submit(self.upload_part, len(self.parts) + 1, bytes(self.buffer))
        self.buffer.clear()

    def upload_part(self, number: int, body: bytes) -> dict[str, Any]:
        """Upload one part; returns what completing the upload wants to know of it."""
        answer = self.backend.call("upload_part", self.path, PartNumber=number, Body=body, **self.upload)
        # AWS wants back the checksums that the AWS library chose to send.
        sums = {name: answer[name] for name in answer if name.startswith("Checksum") and name != "ChecksumType"}
        return {"PartNumber": number, "ETag": answer.get("ETag", ""), **sums}

    def finish_part(self) -> None:
        """Wait for the part that is on its way."""
        if self.sending is not None:
            sending, self.sending = self.sending, None
            self.parts.append(sending.result())

    def commit(self) -> None:
        """Upload the rest and complete."""
        if not self.upload:
            self.threads.shutdown()
            self.backend.write(self.path, bytes(self.buffer))
            return
        num_last = len(self.buffer)
        self.send_part()
        self.finish_part()
        self.threads.shutdown()
        num_bytes = (len(self.parts) - 1) * PART_BYTES + num_last
        try:
            parts = {"Parts": self.parts}
            self.backend.call("complete_multipart_upload", self.path, MultipartUpload=parts, **self.upload)
        except FileNotFoundError:
            # The upload is gone: completed by an earlier try whose answer was lost, if the object is all there.
            if not self.backend.is_there(self.path) or self.backend.size(self.path) != num_bytes:
                raise

    def abort(self) -> None:
        """Delete the parts."""
        self.threads.shutdown()  # a part that arrived after the abort would stay
        if self.upload:
            self.backend.call("abort_multipart_upload", self.path, **self.upload)
