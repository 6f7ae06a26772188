"""torch's distributed checkpoint format on a Store: streamed and summed writes, ranged reads, no unsafe pickle."""

from __future__ import annotations

import io
import os
import pickle
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future as ThreadFuture
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import google_crc32c
import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import (
    CURRENT_DCP_VERSION,
    FileSystemBase,
    FileSystemWriter,
    _StorageInfo,
)
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader, WriteResult
from torch.futures import Future

from pipeline.store import Store
from trainer.checkpoint_commit import Commit, FileRecord, hex_crc32c
from trainer.errors import CheckpointError

METADATA = ".metadata"
SPAN_BYTES = 32 * 2**20
NUM_READS = 4
# torch writes a tensor in a hundred small pieces and a large one.
BUFFER_BYTES = 2**20


class SummedStream(io.RawIOBase):
    """Passes what is written on, and keeps its length and CRC-32C."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self._crc32c = 0
        self._num_bytes = 0

    @property
    def record(self) -> FileRecord:
        """Of everything written so far."""
        return FileRecord(num_bytes=self._num_bytes, crc32c=hex_crc32c(self._crc32c))

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, data: Any, /) -> int:
        """Write all of `data`; torch lends its memory for the length of this call only, hence the copy."""
        chunk = bytes(data)
        self._raw.write(chunk)
        self._crc32c = google_crc32c.extend(self._crc32c, chunk)
        self._num_bytes += len(chunk)
        return len(chunk)

    def tell(self) -> int:
        """Bytes written so far."""
        return self._num_bytes


class StoreFiles(FileSystemBase):
    """One checkpoint directory of a Store, for torch's writer."""

    def __init__(self, directory: Store) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self.written: dict[str, FileRecord] = {}
        """Every file that was written to its end."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """A stream that becomes a file when the context ends well, and nothing when it does not."""
        assert mode == "wb", mode
        name = os.fspath(path)
        with self._directory.writer(name) as raw:
            summed = SummedStream(raw)
            stream = io.BufferedWriter(summed, BUFFER_BYTES)
            try:
                yield stream
                if not stream.closed:
                    stream.flush()
            finally:
                summed.close()  # what is left in the buffer after an error goes nowhere
        with self._lock:
            self.written[name] = summed.record

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        """Names are flat: the directory is the store's."""
        return suffix

    def init_path(self, path: str | os.PathLike[str]) -> str:
        """Names are flat."""
        return os.fspath(path)

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """Object stores have no directories."""

    def exists(self, path: str | os.PathLike[str]) -> bool:
        """Whether a file is there."""
        return self._directory.exists(os.fspath(path))

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        """Delete one file."""
        self._directory.remove(os.fspath(path))

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Never: object stores copy instead."""
        raise AssertionError("a checkpoint's files are written under their last names")

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """The directory is given, not named."""
        return False


class StoreWriter(FileSystemWriter):
    """torch's writer, into one directory of a Store; `files.written` has each file's size and checksum."""

    def __init__(self, directory: Store) -> None:
        super().__init__("", sync_files=False)
        self.files = StoreFiles(directory)
        self.fs = self.files  # type: ignore[assignment]  # declared as the default's type, used as the base's
        self.path = ""

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the metadata, under its own name at once: the commit makes it count, not a rename."""
        metadata.version = CURRENT_DCP_VERSION
        metadata.storage_data = {result.index: result.storage_data for part in results for result in part}
        metadata.storage_meta = self.storage_meta()
        with self.files.create_stream(METADATA, "wb") as stream:
            pickle.dump(metadata, stream)


@dataclass
class _Span:
    """Neighbouring tensors of one file, read together."""

    name: str
    offset: int
    end: int
    items: list[tuple[ReadItem, _StorageInfo]] = field(default_factory=list)


class StoreReader(StorageReader):
    """Reads the tensors of a verified checkpoint from a Store, in long ranges, some ahead of time."""

    def __init__(self, directory: Store, metadata: Metadata) -> None:
        self._directory = directory
        self._metadata = metadata

    def read_metadata(self, *args: Any) -> Metadata:
        """What `read_metadata` below made of the file."""
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any) -> None:
        """Nothing to do."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing to do."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """The directory is given, not named."""
        return False

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy every tensor of `plan` into place."""
        spans = _spans((item, self._metadata.storage_data[item.storage_index]) for item in plan.items)
        ranges = [(span.name, span.offset, span.end - span.offset) for span in spans]
        for span, data in zip(spans, read_ahead(self._directory, ranges), strict=True):
            view = memoryview(data)
            for item, info in span.items:
                start = info.offset - span.offset
                _fill(item, view[start : start + info.length], planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _fill(item: ReadItem, data: memoryview, planner: LoadPlanner) -> None:
    # torch's planner would unpickle anything else with no restriction; our checkpoints hold tensors only.
    if item.type == LoadItemType.BYTE_IO:
        raise CheckpointError(f"{item.storage_index.fqn} is not a tensor")
    saved = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    saved = narrow_tensor_by_index(saved, item.storage_offsets, item.lengths)
    target = planner.resolve_tensor(item).detach()
    if target.size() != saved.size():
        raise CheckpointError(f"{item.storage_index.fqn} has shape {tuple(saved.size())}, not {tuple(target.size())}")
    target.copy_(saved)
    planner.commit_tensor(item, target)


def _spans(items: Iterable[tuple[ReadItem, _StorageInfo]]) -> list[_Span]:
    spans: list[_Span] = []
    for item, info in sorted(items, key=lambda pair: (pair[1].relative_path, pair[1].offset)):
        end = info.offset + info.length
        last = spans[-1] if spans else None
        if last is None or last.name != info.relative_path or info.offset > last.end or end - last.offset > SPAN_BYTES:
            last = _Span(info.relative_path, info.offset, end)
            spans.append(last)
        last.end = max(last.end, end)
        last.items.append((item, info))
    return spans


def read_ahead(directory: Store, ranges: Iterable[tuple[str, int, int]]) -> Iterator[bytes]:
    """The bytes of each (name, offset, length) of `ranges`, in their order, `NUM_READS` of them in flight.

    Raises:
        CheckpointError: a file ends too soon.
    """

    def read(name: str, offset: int, num_bytes: int) -> bytes:
        data = directory.read_range(name, offset, num_bytes)
        if len(data) != num_bytes:
            raise CheckpointError(f"{name} ends {num_bytes - len(data)} bytes too soon, at {offset + len(data)}")
        return data

    waiting: deque[ThreadFuture[bytes]] = deque()
    with ThreadPoolExecutor(NUM_READS, thread_name_prefix="checkpoint-read") as pool:
        for name, offset, num_bytes in ranges:
            waiting.append(pool.submit(read, name, offset, num_bytes))
            if len(waiting) == NUM_READS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def sum_file(directory: Store, name: str, num_bytes: int) -> str:
    """CRC-32C of a file of `num_bytes` bytes, as commit.json has it."""
    starts = range(0, num_bytes, SPAN_BYTES)
    crc32c = 0
    for data in read_ahead(directory, ((name, at, min(SPAN_BYTES, num_bytes - at)) for at in starts)):
        crc32c = google_crc32c.extend(crc32c, data)
    return hex_crc32c(crc32c)


def read_metadata(directory: Store, commit: Commit) -> Metadata:
    """Read a checkpoint's `.metadata`, a pickle, without running anything that it asks for.

    Raises:
        CheckpointError: it names a type that has no place there, or files that the commit does not list.
    """
    data = directory.read(METADATA)
    try:
        metadata = _MetadataUnpickler(io.BytesIO(data)).load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle raises whatever it trips over
        raise CheckpointError(f"{METADATA} of {commit.directory} cannot be read ({error})") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, Mapping):
        raise CheckpointError(f"{METADATA} of {commit.directory} holds a {type(metadata).__name__}")
    for info in metadata.storage_data.values():
        record = commit.files.get(info.relative_path) if isinstance(info, _StorageInfo) else None
        if record is None or not 0 <= info.offset <= info.offset + info.length <= record.num_bytes:
            raise CheckpointError(f"{METADATA} of {commit.directory} points outside the checkpoint: {info}")
    return metadata


_SAFE = {
    *((dcp_metadata.__name__, name) for name in (*dcp_metadata.__all__, "_MEM_FORMAT_ENCODING")),
    (_StorageInfo.__module__, _StorageInfo.__name__),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) in _SAFE:
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise CheckpointError(
            f"{METADATA} asks for {module}.{name}, which has no place in a checkpoint; "
            "it was damaged or made to run code, and nothing of it was run"
        )
