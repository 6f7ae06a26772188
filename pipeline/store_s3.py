"""S3, by single requests, each of them retried by itself."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple
from uuid import uuid4

from pipeline.config import StoreConfig
from pipeline.store_backend import Pin, Sink
from pipeline.store_remote import RemoteBackend, http_error, http_status
from pipeline.store_s3_reads import HedgedReads

PART_BYTES = 64 * 2**20
MAX_PARTS = 10_000
"""Of an S3 multipart upload, so an object may have 625 GiB. Some servers want all parts equally long."""
CREATOR_KEY = "tarmac-creator"


class Upload(NamedTuple):
    """An unfinished multipart upload."""

    path: str
    id: str


class S3Backend(RemoteBackend):
    """S3, by single requests: each is retried by itself, a missing object costs one, a page of a listing too."""

    def __init__(self, filesystem: Any, config: StoreConfig) -> None:
        super().__init__(filesystem, config)
        self.reads = HedgedReads(filesystem, config.read_timeout_s)

    def read(self, path: str, offset: int | None, num_bytes: int, pin: Pin | None = None) -> bytes:
        """All bytes, or `num_bytes` from `offset` on."""

        def attempt(timeout: float) -> bytes:
            version = pin.version if pin is not None and pin.version.endswith('"') else ""  # an ETag
            try:
                answer = self.reads.read(path, offset, num_bytes, version, time.monotonic() + timeout)
            except OSError as error:
                status, code = http_error(error)
                if status in (429, 503) or code == "SlowDown":
                    self.reads.limiter.slow_down()
                if pin is not None and status == 412:
                    pin.changed("another ETag")
                raise
            if pin is not None:
                pin.check(answer.version)
            return answer.data

        try:
            return bytes(self.request(attempt))
        except OSError as error:
            if offset is not None and http_status(error) == 416:  # the object ends before
                return b""
            raise

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
        for page in self.pages(Bucket=bucket, Prefix=f"{key}/" if key else ""):
            for item in page.get("Contents", []):
                if not item["Key"].endswith("/"):  # a directory's placeholder
                    yield f"{bucket}/{item['Key']}", item["Size"]

    def folders(self, path: str) -> Iterator[str]:
        """Path of each directory right below the directory `path`, without what is below it."""
        bucket, key, _ = self.filesystem.split_path(path)
        for page in self.pages(Bucket=bucket, Prefix=f"{key}/" if key else "", Delimiter="/"):
            for item in page.get("CommonPrefixes", []):
                yield f"{bucket}/{item['Prefix']}".rstrip("/")

    def pages(self, **ask: Any) -> Iterator[dict[str, Any]]:
        """The pages of one listing, each a request."""
        while True:
            page: dict[str, Any] = self.request(self.filesystem.call_s3, "list_objects_v2", **ask)
            yield page
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
