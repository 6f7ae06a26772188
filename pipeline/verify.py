"""Does the dataset in the bucket still match its manifest?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from pipeline.config import require
from pipeline.errors import ManifestError, ShardError
from pipeline.listing import is_hidden
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
from pipeline.verify_tar import tar_problems


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
        num_threads: shards looked at side by side; each holds at most 16 MiB and one sample.
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
    check = partial(_check_shard, store, sizes, manifest, deep)
    with ThreadPoolExecutor(num_threads) as threads:
        for info, found in zip(manifest.shards, threads.map(check, manifest.shards), strict=True):
            problems += found
            if on_progress is not None:
                on_progress(info)
    return problems


def _extra_objects(manifest: Manifest, sizes: dict[str, int]) -> Iterator[Problem]:
    expected = {path for info in manifest.shards for path in shard_paths(info.name)}
    indexed = bool(manifest.settings.get("indexed"))
    for path in sizes:
        is_shard = path.endswith(".tar") and not is_hidden(path) if indexed else path.startswith("shard-")
        if (is_shard or path.startswith("index/")) and path not in expected:
            yield Problem(
                path, "is not in the manifest; " + ("move it away, or index anew" if indexed else "remove it")
            )


def _check_shard(store: Store, sizes: dict[str, int], manifest: Manifest, deep: bool, info: ShardInfo) -> list[Problem]:
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
            messages = _index_problems(index, info, manifest.classes)
            problems += [Problem(index_path(info.name), message) for message in messages]
    if idx not in missing:
        problems += [Problem(idx, message) for message in _idx_problems(store, info, index)]
    if deep and tar not in missing:
        problems += [Problem(tar, message) for message in tar_problems(store, info, index, manifest)]
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
