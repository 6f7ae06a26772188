"""The manifest of a dataset and the index of a shard: read, write, check.

Layout of a dataset in a bucket: `manifest.json` (written last: it is the commit), `shard-000000.tar`,
`shard-000000.idx`, `index/shard-000000.parquet`.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ManifestError, ShardError, StoreNotFoundError
from pipeline.store import Store

MANIFEST_PATH = "manifest.json"
FORMAT_VERSION = 1
UNLABELLED = -1

_METADATA_KEY = b"tarmac"
# `tarmac shard` writes shard-000000 and so on; `tarmac index` keeps the names that there are.
_SHARD_NAME = re.compile(r"(?!index/|\.)[^/\x00-\x1f]+(/(?!\.)[^/\x00-\x1f]+)*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COLUMNS = {
    "offset": np.int64,
    "num_bytes": np.int64,
    "crc32c": np.uint32,
    "height": np.int32,
    "width": np.int32,
    "label": np.int32,
}


@dataclass(frozen=True)
class ShardInfo:
    """One tar file of a dataset: its size in bytes, its sha256, and those of its parquet index and DALI's index."""

    name: str
    num_samples: int
    num_bytes: int
    sha256: str
    index_sha256: str
    idx_sha256: str


@dataclass(frozen=True)
class BadSample:
    """A file of the source that was left out: its path there, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    """What a dataset holds. A sample's id is its row in the order of `shards`."""

    num_samples: int
    num_bytes: int
    classes: tuple[str, ...] | None
    settings: dict[str, Any]
    shards: tuple[ShardInfo, ...]
    bad_samples: tuple[BadSample, ...]
    version: int = FORMAT_VERSION

    def to_json(self) -> bytes:
        """The manifest as JSON, one shard a line, the same bytes for the same content."""
        head = {
            "version": self.version,
            "num_samples": self.num_samples,
            "num_bytes": self.num_bytes,
            "settings": dict(sorted(self.settings.items())),
            "classes": None if self.classes is None else list(self.classes),
        }
        lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
        for name, rows in (("bad_samples", self.bad_samples), ("shards", self.shards)):
            table = ",\n  ".join(json.dumps(asdict(row)) for row in rows)
            lines.append(f'"{name}": [\n  {table}\n ]' if rows else f'"{name}": []')
        return ("{\n " + ",\n ".join(lines) + "\n}\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Parse and check a manifest.

        Raises:
            ManifestError: it is not JSON, has missing or unknown fields, or its counts do not add up.
        """
        try:
            values = json.loads(data)
            version = values.get("version")
            if version != FORMAT_VERSION:
                raise ManifestError(
                    f"version ({version!r}) must be {FORMAT_VERSION}; a newer Tarmac may have written it"
                )
            classes = values.pop("classes")
            manifest = cls(
                classes=None if classes is None else tuple(classes),
                shards=tuple(ShardInfo(**row) for row in values.pop("shards")),
                bad_samples=tuple(BadSample(**row) for row in values.pop("bad_samples")),
                **values,
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ManifestError(f"is not a dataset manifest: {error!r}") from error
        _check(manifest)
        return manifest

    def digest(self) -> str:
        """Sha256 of the JSON, in hex: the identity of the dataset."""
        return hashlib.sha256(self.to_json()).hexdigest()


def _check(manifest: Manifest) -> None:
    seen: set[str] = set()
    for shard in manifest.shards:
        if not isinstance(shard.name, str) or not _SHARD_NAME.fullmatch(shard.name):
            raise ManifestError(f"shard name {shard.name!r} must look like 'shard-000000' or 'folder/name'")
        if shard.name in seen:
            raise ManifestError(f"{shard.name} is listed twice")
        seen.add(shard.name)
        for field in ("num_samples", "num_bytes"):
            value = getattr(shard, field)
            if type(value) is not int or value < 1:
                raise ManifestError(f"{shard.name}: {field} ({value!r}) must be a positive integer")
        for field in ("sha256", "index_sha256", "idx_sha256"):
            value = getattr(shard, field)
            if not isinstance(value, str) or not _SHA256.fullmatch(value):
                raise ManifestError(f"{shard.name}: {field} ({value!r}) must be 64 hex digits")
    for field in ("num_samples", "num_bytes"):
        stated, summed = getattr(manifest, field), sum(getattr(shard, field) for shard in manifest.shards)
        if stated != summed:
            raise ManifestError(f"{field} ({stated!r}) must be the sum over its shards ({summed})")
    if not manifest.shards:
        raise ManifestError("lists no shards")
    if manifest.classes is not None and not all(isinstance(name, str) for name in manifest.classes):
        raise ManifestError("classes must be a list of names, or null")
    if not isinstance(manifest.settings, dict):
        raise ManifestError("settings must be an object")


def read_manifest(store: Store) -> Manifest:
    """Read and check the manifest of the dataset at `store`.

    Raises:
        ManifestError: there is none, or it is damaged.
        StoreError: the store does not answer or refuses us.
    """
    try:
        data = store.read(MANIFEST_PATH)
    except StoreNotFoundError as error:
        raise ManifestError(
            f"{store}/{MANIFEST_PATH} does not exist, so there is no finished dataset at this URL; "
            f"make one, or finish it, with `tarmac shard SOURCE {store}` ({error})"
        ) from error
    try:
        return Manifest.from_json(data)
    except ManifestError as error:
        raise ManifestError(
            f"{store}/{MANIFEST_PATH} {error}; restore it, or write the dataset anew at another URL"
        ) from error


def write_manifest(store: Store, manifest: Manifest) -> None:
    """Write the manifest: from now on the dataset exists."""
    _check(manifest)
    store.write(MANIFEST_PATH, manifest.to_json())


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Where each of a shard's n samples lies, in tar order.

    Args:
        keys: [n] str, unique in the dataset.
        offset: [n] int64, first byte of the image in the tar.
        num_bytes: [n] int64, length of the image.
        crc32c: [n] uint32, of the image's bytes.
        height: [n] int32, as stored in the file, before any EXIF rotation.
        width: [n] int32.
        label: [n] int32, position in the manifest's classes; -1 where there are none.
    """

    keys: np.ndarray
    offset: np.ndarray
    num_bytes: np.ndarray
    crc32c: np.ndarray
    height: np.ndarray
    width: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.offset)

    def rows(self, first: int, stop: int) -> ShardIndex:
        """A copy of rows [first, stop), so that the whole index can go."""
        return ShardIndex(**{field.name: getattr(self, field.name)[first:stop].copy() for field in fields(self)})

    @property
    def memory_bytes(self) -> int:
        """What it takes in memory, about."""
        arrays = sum(int(getattr(self, field.name).nbytes) for field in fields(self))
        return arrays + int(np.strings.str_len(self.keys).sum())


def tar_path(name: str) -> str:
    """Where shard `name` lies in the dataset."""
    return f"{name}.tar"


def idx_path(name: str) -> str:
    """Where DALI's index of shard `name` lies in the dataset."""
    return f"{name}.idx"


def index_path(name: str) -> str:
    """Where the parquet index of shard `name` lies in the dataset."""
    return f"index/{name}.parquet"


def write_index(store: Store, name: str, index: ShardIndex, metadata: dict[str, Any] | None = None) -> str:
    """Write a shard's index; `metadata` (JSON values) rides in the parquet schema.

    Returns:
        Sha256 of the file, in hex.
    """
    columns = {"key": pa.array(index.keys.tolist(), pa.string())}
    columns |= {column: pa.array(getattr(index, column)) for column in _COLUMNS}
    table = pa.table(columns).replace_schema_metadata(
        {_METADATA_KEY: json.dumps(metadata or {}, sort_keys=True).encode()}
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    data = buffer.getvalue()
    store.write(index_path(name), data)
    return hashlib.sha256(data).hexdigest()


def read_index(store: Store, info: ShardInfo) -> ShardIndex:
    """Read a shard's index and check it against the manifest.

    Raises:
        ShardError: it is missing, is not the file that the manifest names, or has another number of rows.
        StoreError: the store does not answer or refuses us.
    """
    where = f"{store}/{index_path(info.name)}"
    index, _ = parse_index(_read_whole(store, index_path(info.name), info.index_sha256), where)
    if len(index) != info.num_samples:
        raise ShardError(f"{where} has {len(index)} rows, but the manifest says {info.num_samples}")
    return index


def read_idx(store: Store, info: ShardInfo) -> list[str]:
    """The lines of DALI's index of a shard, checked against the manifest.

    Raises:
        ShardError: it is missing, or is not the file that the manifest names.
        StoreError: the store does not answer or refuses us.
    """
    return _read_whole(store, idx_path(info.name), info.idx_sha256).decode("ascii", "replace").splitlines()


def _read_whole(store: Store, path: str, sha256: str) -> bytes:
    """An object that must have this sha256. Raises ShardError."""
    try:
        data = store.read(path)
    except StoreNotFoundError as error:
        raise ShardError(f"{store}/{path} is missing; run `tarmac verify {store}` ({error})") from error
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ShardError(
            f"{store}/{path} has sha256 {found}, but the manifest says {sha256}; it was changed or damaged: restore "
            f"it, or write the dataset anew, after `tarmac verify {store}` has told what else is damaged"
        )
    return data


def parse_index(data: bytes, where: str) -> tuple[ShardIndex, dict[str, Any]]:
    """Parse the bytes of a shard's index.

    Returns:
        The index, and the metadata that was written with it.

    Raises:
        ShardError: the bytes are not such an index; `where` names them.
    """
    try:
        table = pq.read_table(pa.BufferReader(data), memory_map=False)
        # Variable-width strings: a third of the memory of Python's, and hundreds of indexes are held at once.
        keys = np.array(table["key"].to_pylist(), dtype=np.dtypes.StringDType())
        columns = {
            column: np.ascontiguousarray(table[column].to_numpy(), dtype=dtype) for column, dtype in _COLUMNS.items()
        }
        metadata = json.loads((table.schema.metadata or {}).get(_METADATA_KEY, b"{}"))
    except (pa.ArrowException, KeyError, ValueError, OSError) as error:
        raise ShardError(f"{where} is not a shard index: {error}") from error
    return ShardIndex(keys=keys, **columns), metadata
