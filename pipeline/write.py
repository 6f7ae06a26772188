"""Images of a source -> shards, their indexes, and the manifest. Parallel over processes, and resumable.

Which image goes into which shard is a pure function of the listing, the seed and the shard size, so that any process
can write any shard, and writes the same bytes. A shard's parquet index is written last and says which plan it belongs
to: a run that was killed finds its finished shards and goes on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from pipeline.config import StoreConfig, require
from pipeline.errors import ManifestError, SourceError
from pipeline.images import Check
from pipeline.listing import Listing, SampleRef
from pipeline.manifest import FORMAT_VERSION, MANIFEST_PATH, BadSample, Manifest, read_manifest, write_manifest
from pipeline.shards import ShardResult, ShardTask, ShardWriter, another_plan_error, shard_paths
from pipeline.sources import Source
from pipeline.store import Store
from pipeline.write_workers import WriteWorkers

DEFAULT_SHARD_BYTES = 256 * 2**20

RunTasks = Callable[[ShardWriter, list[ShardTask]], Generator[ShardResult, None, None]]
"""Runs all tasks, in any order and anywhere; closing it stops those in flight."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardDone:
    """Progress: a shard is finished, or was found finished (`resumed`). The last two are of the whole plan."""

    name: str
    num_samples: int
    num_bytes: int
    resumed: bool
    num_bad: int
    num_shards: int
    num_source_images: int


def write_dataset(
    source: Source,
    dataset_url: str,
    *,
    seed: int = 0,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    num_workers: int = 1,
    max_bad: int = 0,
    max_side: int | None = None,
    check: Check = "structure",
    on_progress: Callable[[ShardDone], None] | None = None,
    store_config: StoreConfig = StoreConfig(),  # noqa: B008 (frozen)
    run_tasks: RunTasks | None = None,
) -> Manifest:
    """Write all images of `source` as a dataset, or finish one that was interrupted.

    If more than `max_bad` files are bad, everything that this dataset has at the URL so far is removed, shards of
    earlier runs included. Any other error leaves finished shards for the next run.

    Args:
        source: where the images are.
        dataset_url: where the dataset goes; any fsspec URL or bare path. Nobody else may be writing there.
        seed: permutes samples over shards.
        shard_bytes: a shard takes source files until the next would go over this; one file may be larger by itself,
            and so may a shard whose images had to be converted to PNG. With `max_side`, shards come out smaller.
        num_workers: processes; 1 writes in this process.
        max_bad: unreadable files that may be left out.
        max_side: in pixels; images with a longer side are made smaller and encoded anew. None leaves them as they are.
        check: how each image is proven whole: by its file's structure, or by decoding its pixels.
        on_progress: called after each shard, in no fixed order.
        store_config: how patient requests are.
        run_tasks: runs the tasks elsewhere, for example on a cluster, and not in processes here.

    Returns:
        The manifest, which is in the bucket now.

    Raises:
        SourceError: the source is empty, or has more than `max_bad` bad files, or a worker process died.
        ManifestError: the URL holds a dataset made of other images or with other settings.
        StoreError: the bucket is missing, refuses us, or does not answer.
    """
    require(0 <= seed < 2**63, f"seed ({seed}) must be in [0, 2**63)")
    require(shard_bytes >= 1, f"shard_bytes ({shard_bytes}) must be at least 1")
    require(num_workers >= 1, f"num_workers ({num_workers}) must be at least 1")
    require(max_bad >= 0, f"max_bad ({max_bad}) must not be negative")
    require(max_side is None or max_side >= 1, f"max_side ({max_side}) must be at least 1")
    require(check in ("structure", "pixels"), f"check ({check!r}) must be 'structure' or 'pixels'")
    store = Store(dataset_url, store_config)
    store.check_writable()
    with WriteWorkers(1 if run_tasks else num_workers) as workers:  # they start while the source is listed
        listing = source.scan()
        logger.info("%s: %d images, %d other files ignored", source, len(listing.refs), listing.num_ignored_files)
        shards = plan_shards(listing.refs, seed, shard_bytes)
        digest = plan_digest(listing, seed, shard_bytes, max_side, check)
        settings: dict[str, Any] = {"seed": seed, "shard_bytes": shard_bytes, "max_side": max_side, "check": check}
        settings |= {"plan_digest": digest}
        settings |= {"num_source_images": len(listing.refs), "num_ignored_files": listing.num_ignored_files}
        settings |= {"ignored_extensions": listing.ignored_extensions}
        if store.exists(MANIFEST_PATH):
            return _existing_manifest(store, settings)
        tasks = _tasks(store, shards, digest)
        writer = ShardWriter(source, store, digest, max_bad, max_side, check)
        results = _write_shards(writer, tasks, run_tasks or workers.run, on_progress)
    manifest = _assemble(results, listing.classes, settings)
    store.remove_leftovers()
    write_manifest(store, manifest)
    return manifest


def plan_shards(refs: Iterable[SampleRef], seed: int, shard_bytes: int) -> list[tuple[SampleRef, ...]]:
    """Permute the images by a hash keyed with the seed, and fill shard after shard.

    Rows of a table are permuted by row groups, and stay together, because a group is read as a whole.
    """
    salt = seed.to_bytes(8, "big")

    def place(ref: SampleRef) -> tuple[bytes, int]:
        name, row = (ref.key, 0) if ref.group < 0 else (f"{ref.archive}/{ref.group}", ref.offset)
        return hashlib.blake2b(os.fsencode(name), key=salt, digest_size=16).digest(), row

    ordered = sorted(refs, key=place)
    shards: list[tuple[SampleRef, ...]] = []
    shard: list[SampleRef] = []
    num_bytes = 0
    for ref in ordered:
        if shard and num_bytes + ref.num_bytes > shard_bytes:
            shards.append(tuple(shard))
            shard, num_bytes = [], 0
        shard.append(ref)
        num_bytes += ref.num_bytes
    return [*shards, tuple(shard)] if shard else shards


def plan_digest(
    listing: Listing, seed: int, shard_bytes: int, max_side: int | None = None, check: Check = "structure"
) -> str:
    """Sha256 of all that decides a dataset's bytes, but for the images' content."""
    plan = [FORMAT_VERSION, seed, shard_bytes, listing.classes, max_side, check]
    digest = hashlib.sha256(json.dumps(plan).encode())
    for ref in listing.refs:
        digest.update(f"\n{ref.key} {ref.num_bytes} {ref.label}".encode())
    return digest.hexdigest()


def _existing_manifest(store: Store, settings: dict[str, Any]) -> Manifest:
    manifest = read_manifest(store)
    if manifest.settings.get("plan_digest") == settings["plan_digest"]:
        logger.info("%s is complete already: %d samples", store, manifest.num_samples)
        return manifest
    names = ("seed", "shard_bytes", "max_side", "check", "num_source_images")
    pairs = [(name, manifest.settings.get(name), settings[name]) for name in names]
    differing = [f"{name} ({old}, now {new})" for name, old, new in pairs if old != new]
    raise ManifestError(
        f"{store} holds another dataset already; {', '.join(differing) or 'its images or classes'} differ. "
        f"Use another URL, or remove it first"
    )


def _tasks(store: Store, shards: list[tuple[SampleRef, ...]], digest: str) -> list[ShardTask]:
    """One task a shard, with what is there of it. Raises ManifestError on shards of another plan."""
    sizes = {entry.path: entry.num_bytes for entry in store.list()}
    tasks = []
    for number, refs in enumerate(shards):
        name = f"shard-{number:06d}"
        tar, idx, index = shard_paths(name)
        found = (sizes[tar], sizes[idx]) if tar in sizes and idx in sizes and index in sizes else None
        tasks.append(ShardTask(name, refs, found))
    ours = {path for task in tasks for path in shard_paths(task.name)}
    for path in sizes:
        if path.startswith(("shard-", "index/shard-")) and path not in ours:
            raise another_plan_error(store, path)
    return tasks


def _write_shards(
    writer: ShardWriter,
    tasks: list[ShardTask],
    run_tasks: RunTasks,
    on_progress: Callable[[ShardDone], None] | None,
) -> list[ShardResult]:
    """Run all tasks; the results in the order of the shards. Raises SourceError beyond max_bad, and cleans up."""
    results: list[ShardResult] = []
    num_bad, num_images = 0, sum(len(task.refs) for task in tasks)
    with closing(run_tasks(writer, tasks)) as running:
        for result in running:
            results.append(result)
            num_bad += len(result.bad_samples)
            if num_bad > writer.max_bad:
                break
            if on_progress is not None:
                on_progress(_progress(result, len(tasks), num_images))
    lines = "".join(f"\n  {sample.key}: {sample.reason}" for sample in _bad_samples(results))
    if num_bad > writer.max_bad:
        _remove(writer.store, tasks)
        raise SourceError(
            f"{writer.source} has more bad files than --max-bad ({writer.max_bad}) allows. Repair or remove them, or "
            f"raise --max-bad to leave them out; nothing was kept at {writer.store}. The {num_bad} found so "
            f"far:{lines}"
        )
    if all(result.info is None for result in results):
        raise SourceError(f"{writer.source} has no image that can be read:{lines}")
    return sorted(results, key=lambda result: (len(result.name), result.name))


def _progress(result: ShardResult, num_shards: int, num_images: int) -> ShardDone:
    num_samples, num_bytes = (result.info.num_samples, result.info.num_bytes) if result.info else (0, 0)
    num_bad = len(result.bad_samples)
    return ShardDone(result.name, num_samples, num_bytes, result.resumed, num_bad, num_shards, num_images)


def _bad_samples(results: list[ShardResult]) -> tuple[BadSample, ...]:
    bad = (sample for result in results for sample in result.bad_samples)
    return tuple(sorted(bad, key=lambda sample: sample.key))


def _remove(store: Store, tasks: list[ShardTask]) -> None:
    ours = {path for task in tasks for path in shard_paths(task.name)}
    for entry in store.list():
        if entry.path in ours:
            store.remove(entry.path)


def _assemble(results: list[ShardResult], classes: tuple[str, ...] | None, settings: dict[str, Any]) -> Manifest:
    infos = tuple(result.info for result in results if result.info is not None)
    return Manifest(
        num_samples=sum(info.num_samples for info in infos),
        num_bytes=sum(info.num_bytes for info in infos),
        classes=classes,
        settings=settings | {"num_converted": sum(result.num_converted for result in results)},
        shards=infos,
        bad_samples=_bad_samples(results),
    )
