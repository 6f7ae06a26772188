"""Tars that somebody else wrote become a dataset where they are: indexes and a manifest are added, nothing is copied.

Each tar is read once. Its parquet index is written last, so that a run that was killed goes on from the finished ones.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from pipeline.config import StoreConfig, require
from pipeline.errors import ManifestError, ShardError, SourceError
from pipeline.index_tar import TarRows, first_label_ids, read_tar
from pipeline.labels import class_ids, read_classes
from pipeline.listing import is_hidden, most_common
from pipeline.manifest import (
    MANIFEST_PATH,
    BadSample,
    Manifest,
    ShardInfo,
    idx_path,
    index_path,
    parse_index,
    read_manifest,
    tar_path,
    write_index,
    write_manifest,
)
from pipeline.shards import Flag
from pipeline.store import Store

_INDEXED_VERSION = 1

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TarIndexed:
    """Progress: a tar is indexed, or was found indexed (`resumed`)."""

    name: str
    num_samples: int
    num_bytes: int
    num_bad: int
    resumed: bool
    num_tars: int


@dataclass(frozen=True)
class _Indexed:
    """A tar with its indexes. `label_ids` are what its labels are written as by now; None without labels."""

    info: ShardInfo
    label_ids: dict[str, int] | None
    bad_samples: tuple[BadSample, ...]
    ignored: dict[str, int]
    resumed: bool


def index_dataset(
    dataset_url: str,
    *,
    classes: str | None = None,
    num_workers: int = 8,
    max_bad: int = 0,
    on_progress: Callable[[TarIndexed], None] | None = None,
    store_config: StoreConfig = StoreConfig(),  # noqa: B008 (frozen)
) -> Manifest:
    """Make a dataset of all tars below a URL, where they are, or finish what was interrupted.

    Args:
        dataset_url: where the tars are; the indexes and the manifest go there. Nobody else may be writing there.
        classes: a text file of class names, one a line in the order of the labels.
        num_workers: tars that are read side by side; each holds about 16 MiB and its index.
        max_bad: images that may be left out of the index.
        on_progress: called after each tar, in their order.
        store_config: how patient requests are.

    Returns:
        The manifest, which is at the URL now.

    Raises:
        SourceError: there are no tars, one is damaged or unclear, or more than `max_bad` images are bad.
        ManifestError: the URL holds a dataset of `tarmac shard`, or one of other tars.
        StoreError: the bucket is missing, refuses us, or does not answer.
    """
    require(num_workers >= 1, f"num_workers ({num_workers}) must be at least 1")
    require(max_bad >= 0, f"max_bad ({max_bad}) must not be negative")
    store = Store(dataset_url, store_config)
    store.check_writable()
    names = None if classes is None else read_classes(classes, store_config)
    sizes = {entry.path: entry.num_bytes for entry in store.list()}
    tars = {path: sizes[path] for path in sizes if path.endswith(".tar") and not is_hidden(path)}
    if not tars:
        raise SourceError(f"{store} holds no .tar files; give the folder that they are in")
    if MANIFEST_PATH in sizes:
        return _existing_manifest(store, tars, names)
    found = _index_tars(store, sizes, sorted(tars), max_bad, num_workers, on_progress)
    all_names, shards = _agree_on_labels(store, found, names)
    ignored = sum((Counter(tar.ignored) for tar in found), Counter[str]())
    settings: dict[str, Any] = {"indexed": True, "num_ignored_files": ignored.total()}
    manifest = Manifest(
        num_samples=sum(info.num_samples for info in shards),
        num_bytes=sum(info.num_bytes for info in shards),
        classes=all_names,
        settings=settings | {"ignored_extensions": most_common(ignored)},
        shards=shards,
        bad_samples=tuple(bad for tar in found for bad in tar.bad_samples),
    )
    store.remove_leftovers()
    write_manifest(store, manifest)
    return manifest


def _existing_manifest(store: Store, tars: dict[str, int], classes: tuple[str, ...] | None) -> Manifest:
    manifest = read_manifest(store)
    if not manifest.settings.get("indexed"):
        raise ManifestError(f"{store} was made by `tarmac shard`, which wrote its indexes: there is nothing to do")
    indexed = {tar_path(info.name): info.num_bytes for info in manifest.shards}
    differing = sorted(path for path in {*tars, *indexed} if tars.get(path) != indexed.get(path))
    if differing:
        what = f"{len(differing)} tars were added, removed or changed since, {differing[0]} for one"
    elif classes is not None and classes != manifest.classes:
        what = "with other classes"
    else:
        logger.info("%s is indexed already: %d samples", store, manifest.num_samples)
        return manifest
    raise ManifestError(
        f"{store} is indexed already, but {what}. Runs on it would not go on with another dataset: to index it anew, "
        f"remove its {MANIFEST_PATH} first"
    )


def _index_tars(
    store: Store,
    sizes: dict[str, int],
    paths: list[str],
    max_bad: int,
    num_workers: int,
    on_progress: Callable[[TarIndexed], None] | None,
) -> list[_Indexed]:
    """Index all tars. Raises SourceError beyond max_bad; finished indexes stay for the next run."""
    indexed: list[_Indexed] = []
    bad: list[BadSample] = []
    stop = threading.Event()
    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(num_workers))
        stack.callback(threads.shutdown, wait=False, cancel_futures=True)
        stack.callback(stop.set)
        for found in threads.map(lambda path: _index_tar(store, sizes, path, max_bad, stop), paths):
            bad += found.bad_samples
            if len(bad) > max_bad:
                lines = "".join(f"\n  {sample.key}: {sample.reason}" for sample in bad)
                raise SourceError(
                    f"{store} has more bad images than --max-bad ({max_bad}) allows; raise it to leave them out of the "
                    f"index. The {len(bad)} found so far:{lines}"
                )
            if isinstance(found, TarRows):
                raise SourceError(f"{found.where} has no image that can be indexed; move it away")
            indexed.append(found)
            if on_progress is not None:
                info = found.info
                numbers = (info.num_samples, info.num_bytes, len(found.bad_samples))
                on_progress(TarIndexed(info.name, *numbers, found.resumed, len(paths)))
    return indexed


def _index_tar(store: Store, sizes: dict[str, int], path: str, max_bad: int, stop: Flag) -> _Indexed | TarRows:
    """Index one tar, or recognise that it is. Where no index can be made, what was found in the tar."""
    name = path.removesuffix(".tar")
    if (found := _find(store, sizes, name)) is not None:
        return found
    rows = read_tar(store, path, max_bad, stop)
    if not rows.samples or len(rows.bad_samples) > max_bad:
        return rows
    texts = rows.label_texts()
    label_ids = first_label_ids(texts)
    idx = rows.idx()
    store.write(idx_path(name), idx)
    metadata = {
        "indexed": _INDEXED_VERSION,
        "tar_sha256": rows.sha256,
        "tar_bytes": rows.num_bytes,
        "idx_sha256": hashlib.sha256(idx).hexdigest(),
        "idx_bytes": len(idx),
        "label_ids": None if texts is None else label_ids,
        "bad_samples": [asdict(sample) for sample in rows.bad_samples],
        "ignored": dict(sorted(rows.ignored.items())),
    }
    index_sha256 = write_index(store, name, rows.index(label_ids), metadata)
    return _from_metadata(name, len(rows.samples), index_sha256, metadata, resumed=False)


def _find(store: Store, sizes: dict[str, int], name: str) -> _Indexed | None:
    """The indexes of a tar that an earlier run made. Raises ManifestError if `tarmac shard` made them."""
    if index_path(name) not in sizes or idx_path(name) not in sizes:
        return None
    data = store.read(index_path(name))
    try:
        index, metadata = parse_index(data, index_path(name))
    except ShardError:
        return None  # damaged: write it again
    if "plan_digest" in metadata:
        raise ManifestError(
            f"{store}/{index_path(name)} belongs to an unfinished dataset of `tarmac shard`; give that command again "
            f"to finish it"
        )
    sizes_then = (metadata.get("tar_bytes"), metadata.get("idx_bytes"))
    if metadata.get("indexed") != _INDEXED_VERSION or sizes_then != (sizes[tar_path(name)], sizes[idx_path(name)]):
        return None
    return _from_metadata(name, len(index), hashlib.sha256(data).hexdigest(), metadata, resumed=True)


def _from_metadata(name: str, num_samples: int, index_sha256: str, metadata: dict[str, Any], resumed: bool) -> _Indexed:
    tar_bytes, tar_sha256, idx_sha256 = (metadata[field] for field in ("tar_bytes", "tar_sha256", "idx_sha256"))
    info = ShardInfo(name, num_samples, tar_bytes, tar_sha256, index_sha256, idx_sha256)
    bad = tuple(BadSample(**sample) for sample in metadata["bad_samples"])
    return _Indexed(info, metadata["label_ids"], bad, metadata["ignored"], resumed)


def _agree_on_labels(
    store: Store, tars: list[_Indexed], classes: tuple[str, ...] | None
) -> tuple[tuple[str, ...] | None, tuple[ShardInfo, ...]]:
    """The classes of all tars together, and the shards; indexes that counted them otherwise are written again."""
    labelled = [tar for tar in tars if tar.label_ids is not None]
    if not labelled:
        if classes is not None:
            raise SourceError(f"{store} has no labels, so a classes file says nothing; leave it out")
        return None, tuple(tar.info for tar in tars)
    for tar in tars:
        if tar.label_ids is None:
            raise SourceError(f"{store}/{tar_path(tar.info.name)} has no .cls, but others have; label all or none")
    ids, names = class_ids({text for tar in labelled for text in tar.label_ids or ()}, classes, str(store))
    return names, tuple(_relabelled(store, tars, ids))


def _relabelled(store: Store, tars: list[_Indexed], ids: dict[str, int]) -> Iterator[ShardInfo]:
    for tar in tars:
        assert tar.label_ids is not None
        wanted = {text: ids[text] for text in tar.label_ids}
        if wanted == tar.label_ids:
            yield tar.info
            continue
        path = index_path(tar.info.name)
        index, metadata = parse_index(store.read(path), path)
        positions = {label: wanted[text] for text, label in tar.label_ids.items()}
        labels = np.array([positions[label] for label in index.label.tolist()], np.int32)
        sha256 = write_index(store, tar.info.name, replace(index, label=labels), metadata | {"label_ids": wanted})
        yield replace(tar.info, index_sha256=sha256)
