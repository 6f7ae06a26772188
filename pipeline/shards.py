"""One shard: its tar, DALI's index of it, and the parquet index, which is written last and makes it a finished one."""

from __future__ import annotations

import hashlib
import tarfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import google_crc32c
import numpy as np

from pipeline.errors import ManifestError, ShardError
from pipeline.images import MAX_IMAGE_BYTES, BadImageError, Check, StoredImage, prepare_image
from pipeline.listing import SampleRef
from pipeline.manifest import (
    BadSample,
    ShardIndex,
    ShardInfo,
    idx_path,
    index_path,
    parse_index,
    tar_path,
    write_index,
)
from pipeline.sources import Source
from pipeline.store import Store, Writer

NUM_READS_AHEAD = 8
IDX_VERSION = "v1.2"

_TAR_BLOCK, _TAR_RECORD = 512, 10240
_TAR_NAME_BYTES, _TAR_SIZE_BYTES, _TAR_SIZE_AT, _TAR_CHECKSUM_AT = 100, 11, 124, 148
_EMPTY_HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
_EMPTY_CHECKSUM, _ZERO_SIZE = int(_EMPTY_HEADER[_TAR_CHECKSUM_AT : _TAR_CHECKSUM_AT + 6], 8), 11 * ord("0")
# Written and hashed at a time: a call an image and more would cost as much as the copy.
_WRITE_BYTES = 2**20


@dataclass(frozen=True)
class ShardTask:
    """One shard to write. `found` are the lengths of its tar and its idx, where these and its parquet exist."""

    name: str
    refs: tuple[SampleRef, ...]
    found: tuple[int, int] | None


@dataclass(frozen=True)
class ShardResult:
    """A finished shard; `info` is None where none of its images was good, or there were too many bad ones."""

    name: str
    info: ShardInfo | None
    bad_samples: tuple[BadSample, ...]
    num_converted: int
    resumed: bool = False


class Flag(Protocol):
    """A threading or multiprocessing Event."""

    def is_set(self) -> bool:
        """Whether it was set."""


class StoppedError(Exception):
    """The run was asked to stop while this shard was being written."""


class _AbandonedError(Exception):
    """This shard will not exist: no good image, or too many bad ones."""


def shard_paths(name: str) -> tuple[str, str, str]:
    """All objects of a shard."""
    return tar_path(name), idx_path(name), index_path(name)


def another_plan_error(store: Store, path: str) -> ManifestError:
    """What to raise where a shard of another plan is."""
    return ManifestError(
        f"{store}/{path} belongs to an unfinished dataset of other images or with other settings (seed, "
        f"shard_bytes, max_side, check); use another URL, or remove it first"
    )


@dataclass(frozen=True)
class ShardWriter:
    """Writes any shard of a plan. Picklable: each worker process has one."""

    source: Source
    store: Store
    plan_digest: str
    max_bad: int
    max_side: int | None = None
    check: Check = "structure"

    def run(self, task: ShardTask, stop: Flag) -> ShardResult:
        """Write a shard, or recognise that it is there.

        Raises:
            StoppedError: `stop` was set.
            ManifestError: what is there belongs to another plan.
        """
        return self.find(task) or self._write(task, stop)

    def find(self, task: ShardTask) -> ShardResult | None:
        """The shard, if an earlier run of this plan finished it. Raises ManifestError."""
        if task.found is None:
            return None
        data = self.store.read(index_path(task.name))
        try:
            index, metadata = parse_index(data, index_path(task.name))
        except ShardError:
            return None  # damaged: write it again
        if metadata.get("plan_digest") != self.plan_digest:
            raise another_plan_error(self.store, index_path(task.name))
        if list(task.found) != [metadata["tar_bytes"], metadata["idx_bytes"]]:
            return None
        index_sha256 = hashlib.sha256(data).hexdigest()
        info = ShardInfo(
            name=task.name,
            num_samples=len(index),
            num_bytes=metadata["tar_bytes"],
            sha256=metadata["tar_sha256"],
            index_sha256=index_sha256,
            idx_sha256=metadata["idx_sha256"],
        )
        bad = tuple(BadSample(**sample) for sample in metadata["bad_samples"])
        return ShardResult(task.name, info, bad, metadata["num_converted"], resumed=True)

    def _write(self, task: ShardTask, stop: Flag) -> ShardResult:
        rows, bad = _Rows(), list[BadSample]()
        try:
            with self.store.writer(tar_path(task.name)) as stream:
                tar = TarWriter(stream)
                for ref, data in self._read_ahead(task.refs):
                    if stop.is_set():
                        raise StoppedError
                    try:
                        rows.add(tar, ref, _prepare(ref, data, self.max_side, self.check))
                    except BadImageError as error:
                        bad.append(BadSample(ref.where, str(error)))
                        if len(bad) > self.max_bad:
                            raise _AbandonedError from error
                if not rows.keys:
                    raise _AbandonedError
                tar.finish()
        except _AbandonedError:
            return ShardResult(task.name, None, tuple(bad), 0)
        idx = rows.idx()
        idx_sha256 = hashlib.sha256(idx).hexdigest()
        self.store.write(idx_path(task.name), idx)
        metadata = {
            "plan_digest": self.plan_digest,
            "tar_sha256": tar.sha256.hexdigest(),
            "tar_bytes": tar.num_bytes,
            "idx_bytes": len(idx),
            "idx_sha256": idx_sha256,
            "num_converted": rows.num_converted,
            "bad_samples": [asdict(sample) for sample in bad],
        }
        index_sha256 = write_index(self.store, task.name, rows.index(), metadata)
        tar_sha256 = tar.sha256.hexdigest()
        info = ShardInfo(task.name, len(rows.keys), tar.num_bytes, tar_sha256, index_sha256, idx_sha256)
        return ShardResult(task.name, info, tuple(bad), rows.num_converted)

    def _read_ahead(self, refs: tuple[SampleRef, ...]) -> Iterator[tuple[SampleRef, bytes | OSError]]:
        """Each image's bytes in order, or why they cannot be read; a few are requested ahead."""
        threads = ThreadPoolExecutor(NUM_READS_AHEAD)
        waiting = deque((ref, threads.submit(_read, self.source, ref)) for ref in refs[: 2 * NUM_READS_AHEAD])
        following = iter(refs[2 * NUM_READS_AHEAD :])
        try:
            while waiting:
                ref, future = waiting.popleft()
                if (following_ref := next(following, None)) is not None:
                    waiting.append((following_ref, threads.submit(_read, self.source, following_ref)))
                yield ref, future.result()
        finally:
            threads.shutdown(cancel_futures=True)


def _read(source: Source, ref: SampleRef) -> bytes | OSError:
    if ref.num_bytes > MAX_IMAGE_BYTES:
        return OSError(f"{ref.num_bytes} bytes are more than an image may have ({MAX_IMAGE_BYTES})")
    try:
        return source.read(ref)
    except OSError as error:
        return error


def _prepare(ref: SampleRef, data: bytes | OSError, max_side: int | None, check: Check) -> StoredImage:
    if isinstance(data, OSError):
        raise BadImageError(f"cannot be read: {data.strerror or data}") from data
    if len(data) != ref.num_bytes and ref.group < 0:
        raise BadImageError(f"has {len(data)} bytes now, but had {ref.num_bytes} when it was listed")
    return prepare_image(data, max_side, check)


class TarWriter:
    """Appends files to a USTAR stream: the same bytes whoever writes them, and when.

    Source: POSIX.1-1988, ustar interchange format.
    """

    def __init__(self, stream: Writer) -> None:
        self._stream = stream
        self._waiting = bytearray()
        self.num_bytes = 0
        self.sha256 = hashlib.sha256()

    def add(self, name: str, data: bytes) -> int:
        """Append a file; returns the offset of its first byte."""
        self._append(tar_header(name, len(data)))
        offset = self.num_bytes
        self._append(data)
        self._append(bytes(-len(data) % _TAR_BLOCK))
        return offset

    def finish(self) -> None:
        """Append the end-of-archive blocks, up to a whole record as tar writes them."""
        self._append(bytes(2 * _TAR_BLOCK))
        self._append(bytes(-self.num_bytes % _TAR_RECORD))
        self._flush()

    def _append(self, data: bytes) -> None:
        self._waiting += data
        self.num_bytes += len(data)
        if len(self._waiting) >= _WRITE_BYTES:
            self._flush()

    def _flush(self) -> None:
        self._stream.write(self._waiting)
        self.sha256.update(self._waiting)
        self._waiting.clear()


def tar_header(name: str, num_bytes: int) -> bytes:
    """The header of a file in a USTAR stream: mode 0644, and no time, owner or group. The same as tarfile's."""
    encoded, size = name.encode("ascii"), b"%011o" % num_bytes
    if len(encoded) > _TAR_NAME_BYTES or len(size) > _TAR_SIZE_BYTES:
        header = tarfile.TarInfo(name)  # splits the name, or refuses it
        header.size = num_bytes
        return header.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
    # What differs from file to file is name, size and checksum, a sum over all bytes.
    checksum = b"%06o" % (_EMPTY_CHECKSUM + sum(encoded) + sum(size) - _ZERO_SIZE)
    named = encoded + _EMPTY_HEADER[len(encoded) : _TAR_SIZE_AT] + size
    return named + _EMPTY_HEADER[len(named) : _TAR_CHECKSUM_AT] + checksum + _EMPTY_HEADER[_TAR_CHECKSUM_AT + 6 :]


@dataclass
class _Rows:
    """The columns of a shard's index as they grow, and the lines of DALI's."""

    keys: list[str] = field(default_factory=list)
    numbers: list[tuple[int, int, int, int, int, int]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    num_converted: int = 0

    def add(self, tar: TarWriter, ref: SampleRef, image: StoredImage) -> None:
        """Append one sample: its image, and its label if it has one."""
        name = f"{ref.key}.{image.extension}"
        offset, num_bytes = tar.add(name, image.data), len(image.data)
        line = f"{image.extension} {offset} {num_bytes} {name}"
        if ref.label >= 0:
            label = str(ref.label).encode()
            label_offset = tar.add(f"{ref.key}.cls", label)
            line += f" cls {label_offset} {len(label)} {ref.key}.cls"
        self.keys.append(ref.key)
        crc = google_crc32c.value(image.data)
        self.numbers.append((offset, num_bytes, crc, image.height, image.width, ref.label))
        self.lines.append(line)
        self.num_converted += image.converted

    def idx(self) -> bytes:
        """DALI's index. Source: tools/wds2idx.py of DALI, format v1.2."""
        return "".join(f"{line}\n" for line in (f"{IDX_VERSION} {len(self.lines)}", *self.lines)).encode()

    def index(self) -> ShardIndex:
        """The parquet index's columns."""
        columns: list[Any] = list(zip(*self.numbers, strict=True))
        dtypes = (np.int64, np.int64, np.uint32, np.int32, np.int32, np.int32)
        arrays = [np.array(column, dtype) for column, dtype in zip(columns, dtypes, strict=True)]
        return ShardIndex(np.array(self.keys, dtype=np.dtypes.StringDType()), *arrays)
