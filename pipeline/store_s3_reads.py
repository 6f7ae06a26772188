"""Reads from S3 that a slow connection does not hold up, and that become fewer when the server asks for it.

A read that takes longer than nearly all of its size before it is asked for a second time, and the first good answer
wins (Dean and Barroso 2013, "The tail at scale"). Hedges are few by a budget: a server that is slow for all gets no
more work from them.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from fsspec.asyn import sync

MAX_IN_FLIGHT = 64
MIN_BYTES_PER_S = 2**20
"""A body that comes slower than this is asked for again."""
HEDGED_SHARE = 0.05
"""Hedges a read, at most, in the long run."""
_MAX_HEDGES_SAVED = 5.0
_HISTORY, _MIN_HISTORY = 200, 20


@dataclass(frozen=True, slots=True)
class Answer:
    """The bytes, and which version of the object they are of: an ETag, or what else the server says of it."""

    data: bytes
    version: str


class Limiter:
    """Bounds the requests in flight: half of them after a request to slow down, one more after a run of successes.

    Source: additive increase, multiplicative decrease (Chiu and Jain 1989).
    """

    def __init__(self, most: int = MAX_IN_FLIGHT) -> None:
        self.most = self.limit = most
        self.num_in_flight = 0
        self._num_successes = 0
        self._changed = threading.Condition()

    @property
    def is_throttled(self) -> bool:
        """Whether the server has lately asked for less."""
        return self.limit < self.most

    @contextmanager
    def request(self, end: float) -> Iterator[None]:
        """Wait for a place until `end`, by `time.monotonic`, and hold it. Raises TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.num_in_flight < self.limit, max(end - time.monotonic(), 0)):
                raise TimeoutError("no request was allowed before the deadline, since the server asks to slow down")
            self.num_in_flight += 1
        try:
            yield
        finally:
            with self._changed:
                self.num_in_flight -= 1
                self._changed.notify()

    def succeeded(self) -> None:
        """A request was served."""
        with self._changed:
            self._num_successes += 1
            if self._num_successes >= self.limit and self.is_throttled:
                self.limit += 1
                self._num_successes = 0
                self._changed.notify()

    def slow_down(self) -> None:
        """The server asked for fewer requests."""
        with self._changed:
            self.limit = max(min(self.limit, self.num_in_flight) // 2, 1)
            self._num_successes = 0


class HedgedReads:
    """The GET requests of one process to one filesystem."""

    def __init__(self, filesystem: Any, read_timeout_s: float) -> None:
        self._filesystem, self._read_timeout_s = filesystem, read_timeout_s
        self.limiter = Limiter()
        self.num_reads = self.num_hedges = 0
        self._budget = 0.0
        self._seconds: dict[int, deque[float]] = {}  # by the bit length of the number of bytes
        self._lock = threading.Lock()

    def read(self, path: str, offset: int | None, num_bytes: int, version: str, end: float) -> Answer:
        """One try to read an object, or a range of it.

        Args:
            path: bucket and key.
            offset: first byte; None takes the whole object.
            num_bytes: how many, at most.
            version: the ETag that the object must have; "" takes any.
            end: when to give up, by `time.monotonic`.

        Raises:
            TimeoutError: no answer until `end`, or within what this many bytes take.
            OSError: as the filesystem raises it; 412 if the object has another ETag.
        """
        request: dict[str, Any] = dict(zip(("Bucket", "Key"), self._filesystem.split_path(path)[:2], strict=True))
        if offset is not None:
            request["Range"] = f"bytes={offset}-{offset + num_bytes - 1}"
        if version:
            request["IfMatch"] = version
        with self.limiter.request(end):
            started = time.monotonic()
            bound = self._read_timeout_s + num_bytes / MIN_BYTES_PER_S if offset is not None else end - started
            timeout = min(bound, end - started)
            if timeout <= 0:
                raise TimeoutError("the deadline is over")
            hedge_after = self._hedge_after(num_bytes) if offset is not None else None
            answer: Answer = sync(self._filesystem.loop, self._race, request, hedge_after, timeout, timeout=timeout + 5)
            self.limiter.succeeded()
            self._remember(num_bytes, time.monotonic() - started)
        return answer

    async def _race(self, request: dict[str, Any], hedge_after: float | None, timeout: float) -> Answer:
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        tasks = {asyncio.ensure_future(self._get(request))}
        error: BaseException = TimeoutError(f"no whole answer within {timeout:.1f} s")
        try:
            if hedge_after is not None:
                done, _ = await asyncio.wait(tasks, timeout=min(hedge_after, timeout))
                if not done and self._may_hedge():
                    tasks.add(asyncio.ensure_future(self._get(request)))
            waiting = set(tasks)
            while waiting:
                done, waiting = await asyncio.wait(
                    waiting, timeout=max(end - loop.time(), 0), return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    break
                for task in done:
                    found = task.exception()
                    if found is None:
                        return task.result()
                    error = found
            raise error
        finally:
            for task in tasks:
                task.cancel()
            # A cancelled one closes its connection; its error, if any, is nobody's.
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _get(self, request: dict[str, Any]) -> Answer:
        response = await self._filesystem._call_s3("get_object", **request)
        try:
            data = await response["Body"].read()
        finally:
            with suppress(Exception):
                response["Body"].close()
        return Answer(data, version_of(response))

    def _hedge_after(self, num_bytes: int) -> float | None:
        """Seconds after which to ask again: what 95 of 100 reads of this size stayed below; None if not known."""
        with self._lock:
            self.num_reads += 1
            self._budget = min(self._budget + HEDGED_SHARE, _MAX_HEDGES_SAVED)
            seconds = self._seconds.get(num_bytes.bit_length(), ())
            if len(seconds) < _MIN_HISTORY:
                return None
            return sorted(seconds)[int(len(seconds) * 0.95)]

    def _may_hedge(self) -> bool:
        with self._lock:
            if self._budget < 1 or self.limiter.is_throttled:
                return False
            self._budget -= 1
            self.num_hedges += 1
            return True

    def _remember(self, num_bytes: int, seconds: float) -> None:
        with self._lock:
            self._seconds.setdefault(num_bytes.bit_length(), deque(maxlen=_HISTORY)).append(seconds)


def version_of(response: dict[str, Any]) -> str:
    """The ETag; where a server has none, when the object was written, and its length."""
    etag = str(response.get("ETag") or "").strip()
    if etag.strip('"'):
        return etag
    length = str(response.get("ContentRange") or "").rpartition("/")[2] or response.get("ContentLength")
    return f"{response.get('LastModified')} {length}"
