"""Images in parquet files, as Hugging Face's datasets have them: `image: {bytes, path}` and perhaps `label`.

An image cannot be read from a parquet file by itself: the unit is the row group. So an image's place in a dataset is
drawn with its row group, and a worker reads a group once for all images in it.

Source: the features in the file's metadata are written by the `datasets` library, `ArrowWriter._build_metadata`.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import SourceError
from pipeline.labels import class_ids
from pipeline.listing import Listing, SampleRef, is_hidden, sample_keys
from pipeline.ranged_file import RangedFile
from pipeline.store import Store

NUM_TABLES_AT_ONCE = 8
# The one that is read from, and the next ones, which are read ahead.
NUM_GROUPS_HELD = 3

_BLOCK_BYTES = 2**16
_LABEL_COLUMNS = ("label", "labels")


class _Table(NamedTuple):
    """What the scan of a file found: of each row group its rows and the bytes of its images; labels and their names."""

    name: str
    groups: list[tuple[int, int]]
    labels: list[Any] | None
    classes: tuple[str, ...] | None


def is_table(path: str) -> bool:
    """Whether a file is a parquet file, by its name."""
    return path.lower().endswith(".parquet") and not is_hidden(path)


def list_tables(store: Store, names: Sequence[str], where: str) -> Listing:
    """List the images of parquet files by their footers and labels; the images' lengths are estimates.

    Raises:
        SourceError: a file is damaged or has no images, or the files differ in their labels; `where` names the source.
        StoreError: the store does not answer or refuses us.
    """
    with ThreadPoolExecutor(NUM_TABLES_AT_ONCE) as threads:
        tables = list(threads.map(lambda name: _scan(store, name), names))
    rows = [
        (table.name, group, row, num_bytes // num_rows)
        for table in tables
        for group, (num_rows, num_bytes) in enumerate(table.groups)
        for row in range(num_rows)
    ]
    if not rows:
        raise SourceError(f"{where} holds no images: its parquet files have no rows")
    labels, classes = _labels(tables, len(rows), where)
    paths = [f"{os.path.splitext(name)[0]}/{group:04d}-{row:06d}" for name, group, row, _ in rows]
    refs = (
        SampleRef(key, path, num_bytes, label, row, name, group)
        for key, path, label, (name, group, row, num_bytes) in zip(sample_keys(paths), paths, labels, rows, strict=True)
    )
    return Listing(tuple(refs), classes)


class RowGroups:
    """Images by their row groups, of which the last few are held. Usable from threads; a pickled copy has its own."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[str, int], pa.ChunkedArray[Any]] = OrderedDict()

    def __reduce__(self) -> tuple[type[RowGroups], tuple[Store]]:
        return RowGroups, (self._store,)

    def read(self, ref: SampleRef) -> bytes:
        """The bytes of one image.

        Raises:
            OSError: the row has none.
            SourceError: the file is damaged.
            StoreError: the store does not answer or refuses us.
        """
        at = (ref.archive, ref.group)
        with self._lock:  # while it reads too: the others most likely wait for the same group
            images = self._held.get(at)
            if images is None:
                images = self._held[at] = _read_images(self._store, *at)
                if len(self._held) > NUM_GROUPS_HELD:
                    self._held.popitem(last=False)
            self._held.move_to_end(at)
        image: bytes | None = (images[ref.offset].as_py() or {}).get("bytes")
        if image is None:
            raise FileNotFoundError(errno.ENOENT, "the row has no bytes of an image")
        return image


def _read_images(store: Store, name: str, group: int) -> pa.ChunkedArray[Any]:
    with _opened(store, name) as file:
        column = _image_column(file.schema_arrow, f"{store}/{name}")
        return file.read_row_group(group, columns=[f"{column}.bytes"])[column]


def _scan(store: Store, name: str) -> _Table:
    with _opened(store, name) as file:
        schema = file.schema_arrow
        column = _image_column(schema, f"{store}/{name}")
        label = next((name for name in _LABEL_COLUMNS if name in schema.names), None)
        columns = {file.metadata.schema.column(i).path: i for i in range(len(file.metadata.schema))}
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        sizes = [(group.num_rows, group.column(columns[f"{column}.bytes"]).total_compressed_size) for group in groups]
        labels = None if label is None else file.read(columns=[label])[label].to_pylist()
        return _Table(name, sizes, labels, _class_names(schema, label))


@contextmanager
def _opened(store: Store, name: str) -> Iterator[pq.ParquetFile]:
    """A parquet file in the store; its damage becomes a SourceError."""
    file = RangedFile(store, name, _BLOCK_BYTES)
    try:
        with pq.ParquetFile(pa.PythonFile(file, mode="r")) as opened:
            yield opened
    except (pa.ArrowException, OSError) as error:  # an OSError is what Arrow calls damaged compression
        raise SourceError(f"{store}/{name} is not a whole parquet file: {error}; copy it anew") from error


def _image_column(schema: pa.Schema, where: str) -> str:
    """The column with `{bytes, ...}`: `image` or `img` if there are several."""
    found = [field.name for field in schema if pa.types.is_struct(field.type) and _has_bytes(field.type)]
    named = [name for name in ("image", "img") if name in found] or found
    if not named or (len(named) > 1 and named is found):
        raise SourceError(
            f"{where} must have one column of images, `image: {{bytes, path}}`, and has {found or 'none'} among "
            f"{schema.names}"
        )
    return named[0]


def _has_bytes(struct: pa.StructType) -> bool:
    position: int = struct.get_field_index("bytes")
    return position >= 0 and struct[position].type in (pa.binary(), pa.large_binary())


def _class_names(schema: pa.Schema, label: str | None) -> tuple[str, ...] | None:
    """The names of a `ClassLabel`, by the metadata of the `datasets` library; None if it says nothing."""
    try:
        names = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return tuple(map(str, names)) if names else None


def _labels(tables: list[_Table], num_rows: int, where: str) -> tuple[list[int], tuple[str, ...] | None]:
    """The label of each row, and the classes. -1 and null mean that there is none. Raises SourceError."""
    values = [None if value in (None, -1) else value for table in tables for value in table.labels or ()]
    if not any(value is not None for value in values):
        return [-1] * num_rows, None
    if len(values) < num_rows or None in values:
        raise SourceError(f"{where} has labels for some images only; label all or none")
    known = {table.classes for table in tables}
    if len(known) > 1:
        raise SourceError(f"{where} has files that name the classes differently; give one kind of files")
    if not all(isinstance(value, int | str) for value in values):
        raise SourceError(f"{where} has labels that are neither numbers nor names, such as {values[0]!r}")
    texts = [str(value) for value in values]
    ids, classes = class_ids(set(texts), known.pop(), where)
    return [ids[text] for text in texts], classes
