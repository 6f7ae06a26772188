"""Does the dataset in the bucket still match its manifest?"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import cast

import google_crc32c
import numpy as np

from pipeline.config import require
from pipeline.errors import ManifestError, ShardError, StoreNotFoundError
from pipeline.manifest import (
    MANIFEST_PATH,
    UNLABELLED,
    Manifest,
    ShardIndex,
    ShardInfo,
    idx_path,
    index_path,
    read_idx,
    read_index,
    read_manifest,
    tar_path,
)
from pipeline.shards import IDX_VERSION, shard_paths
from pipeline.store import Store

READ_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Problem:
    """Something that does not match: the object's path in the dataset, and what is wrong with it."""

    path: str
    message: str


def verify_dataset(
    store: Store,
    *,
    deep: bool = False,
    num_threads: int = 8,
    on_progress: Callable[[ShardInfo], None] | None = None,
) -> list[Problem]:
    """Compare a dataset with its manifest: all names, the tars' sizes, and the indexes byte for byte.

    Args:
        store: the dataset's URL.
        deep: read every byte too: the tars' sha256, and each sample's name, label and crc.
        num_threads: shards looked at side by side; each holds at most READ_BYTES and one sample.
        on_progress: called after each shard, in order.

    Returns:
        All problems, in the order of the shards; none for a sound dataset.

    Raises:
        ValueError: no threads.
        StoreError: the store does not answer or refuses us.
    """
    require(num_threads >= 1, f"num_threads ({num_threads}) must be at least 1")
    try:
        manifest = read_manifest(store)
    except ManifestError as error:
        return [Problem(MANIFEST_PATH, str(error))]
    sizes = {entry.path: entry.num_bytes for entry in store.list()}
    problems = list(_extra_objects(manifest, sizes))
    check = partial(_check_shard, store, sizes, manifest.classes, deep)
    with ThreadPoolExecutor(num_threads) as threads:
        for info, found in zip(manifest.shards, threads.map(check, manifest.shards), strict=True):
            problems += found
            if on_progress is not None:
                on_progress(info)
    return problems


def _extra_objects(manifest: Manifest, sizes: dict[str, int]) -> Iterator[Problem]:
    expected = {path for info in manifest.shards for path in shard_paths(info.name)}
    for path in sizes:
        if path.startswith(("shard-", "index/")) and path not in expected:
            yield Problem(path, "is not in the manifest; remove it")


def _check_shard(
    store: Store, sizes: dict[str, int], classes: tuple[str, ...] | None, deep: bool, info: ShardInfo
) -> list[Problem]:
    problems = [Problem(path, "is missing") for path in shard_paths(info.name) if path not in sizes]
    missing = {problem.path for problem in problems}
    tar, idx = tar_path(info.name), idx_path(info.name)
    if tar not in missing and sizes[tar] != info.num_bytes:
        problems.append(Problem(tar, f"has {sizes[tar]} bytes; the manifest says {info.num_bytes}"))
    index = None
    if index_path(info.name) not in missing:
        try:
            index = read_index(store, info)
        except ShardError as error:
            problems.append(Problem(index_path(info.name), str(error)))
        else:
            messages = _index_problems(index, info, classes)
            problems += [Problem(index_path(info.name), message) for message in messages]
    if idx not in missing:
        problems += [Problem(idx, message) for message in _idx_problems(store, info, index)]
    if deep and tar not in missing:
        problems += [Problem(tar, message) for message in _tar_problems(store, info, index)]
    return problems


def _index_problems(index: ShardIndex, info: ShardInfo, classes: tuple[str, ...] | None) -> Iterator[str]:
    ends = index.offset + index.num_bytes
    # A header of one block lies before each image.
    starts_after = np.concatenate([[0], ends[:-1]]) + 512
    if np.any(index.num_bytes < 1) or np.any(index.offset < starts_after) or ends[-1] > info.num_bytes:
        yield f"has samples that overlap, or lie outside of the tar's {info.num_bytes} bytes"
    if len(set(index.keys.tolist())) != len(index):
        yield "has a key twice"
    if np.any(index.height < 1) or np.any(index.width < 1):
        yield "has images without height or width"
    low, high = (UNLABELLED, UNLABELLED) if classes is None else (0, len(classes) - 1)
    if np.any(index.label < low) or np.any(index.label > high):
        yield f"has labels outside of [{low}, {high}]"


def _idx_problems(store: Store, info: ShardInfo, index: ShardIndex | None) -> Iterator[str]:
    try:
        lines = read_idx(store, info)
    except ShardError as error:
        yield str(error)
        return
    if index is None:
        return
    if not lines or lines[0] != f"{IDX_VERSION} {len(index)}":
        yield f"starts with {lines[0] if lines else ''!r}; it should be '{IDX_VERSION} {len(index)}'"
        return
    expected = [[str(o), str(n)] for o, n in zip(index.offset, index.num_bytes, strict=True)]
    if [line.split(" ")[1:3] for line in lines[1:]] != expected:
        yield "has other offsets or sizes than the parquet index; write it anew with DALI's wds2idx"


class _HashedStream:
    """A tar read front to back in ranges, and its sha256 so far."""

    def __init__(self, store: Store, path: str) -> None:
        self._store, self._path = store, path
        self._position = 0
        self.sha256 = hashlib.sha256()

    def read(self, num_bytes: int) -> bytes:
        """The next bytes; none at the end."""
        data = self._store.read_range(self._path, self._position, num_bytes)
        self._position += len(data)
        self.sha256.update(data)
        return data


def _tar_problems(store: Store, info: ShardInfo, index: ShardIndex | None) -> Iterator[str]:
    stream = _HashedStream(store, tar_path(info.name))
    try:
        with tarfile.open(fileobj=cast("io.BytesIO", stream), mode="r|", bufsize=READ_BYTES) as tar:
            if index is not None:
                yield from _sample_problems(tar, index)
    except tarfile.TarError as error:
        yield f"cannot be read as a tar: {error}"
    except StoreNotFoundError:
        yield "is missing"
        return
    while stream.read(READ_BYTES):
        pass
    found = stream.sha256.hexdigest()
    if found != info.sha256:
        yield f"has sha256 {found}; the manifest says {info.sha256}"


def _sample_problems(tar: tarfile.TarFile, index: ShardIndex) -> Iterator[str]:
    """Compare the members, in their order, with the rows of the index."""
    row = -1
    for member in tar:
        file = tar.extractfile(member)
        data = b"" if file is None else file.read()
        key, _, extension = member.name.partition(".")
        if extension == "cls":
            if row < 0 or data != str(index.label[row]).encode():
                yield f"{member.name} holds {data[:20]!r}, which is not the label in the index"
            continue
        row += 1
        if row >= len(index):
            continue
        where = f"sample {row} ({index.keys[row]})"
        if key != index.keys[row]:
            yield f"{where} is called {member.name}"
        if member.offset_data != index.offset[row] or len(data) != index.num_bytes[row]:
            yield f"{where} lies at {member.offset_data} with {len(data)} bytes, not where the index says"
        elif (crc := google_crc32c.value(data)) != index.crc32c[row]:
            yield f"{where} has crc32c {crc:08x}; the index says {index.crc32c[row]:08x}"
    if row + 1 != len(index):
        yield f"has {row + 1} images; the index says {len(index)}"
