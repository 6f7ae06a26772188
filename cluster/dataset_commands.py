"""The commands that make, check and show a dataset."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console

from cluster.dataset_progress import DatasetProgress
from cluster.options import check_at_least, check_png, parse, report, say

if TYPE_CHECKING:
    from pipeline.manifest import Manifest, ShardInfo
    from pipeline.write import RunTasks


@dataclass(frozen=True, kw_only=True)
class ShardOptions:
    """Turn images into shards in object storage, ready for training.

    Killed and run again it finishes, without redoing finished shards. The manifest is written last: until then the
    dataset does not exist.

    Example: tarmac shard ./train s3://bucket/imagenet/train --num-workers 16 --max-bad 10
    """

    source: Annotated[str, tyro.conf.Positional]
    """A folder of images (class/name.jpg, or flat), tars (of images, WebDataset, ImageNet) or parquet files, or one."""
    dataset: Annotated[str, tyro.conf.Positional]
    """URL of the dataset to make."""
    shard_bytes: int = 256 * 2**20
    """Bytes of images a shard, about."""
    seed: int = 0
    """Of the permutation of images over shards."""
    num_workers: int | None = None
    """Processes that read, check and write; by default one a CPU, of this machine or of the cluster."""
    address: str | None = field(default_factory=lambda: os.environ.get("RAY_ADDRESS"))
    """A Ray cluster that writes the shards, as RAY_ADDRESS names it; None writes them here."""
    max_bad: int = 0
    """Unreadable images that are left out before it is an error."""
    max_side: int | None = None
    """Make images with a longer side than this, in pixels, smaller, and encode them anew."""
    check: Literal["structure", "pixels"] = "structure"
    """Prove each image whole by its file's structure, or, at five times the cost, by decoding its pixels."""
    labels: str | None = None
    """A text file of labels: one a line in the order of the images' names, or `name label` lines."""
    classes: str | None = None
    """A text file of class names, one a line in the order of the labels; for labels that are numbers."""
    json: bool = False
    """Print the result as JSON."""


def shard(arguments: list[str]) -> int:
    """Turn images into shards in object storage."""
    options = parse(ShardOptions, arguments, "shard")
    from pipeline.sources import open_source
    from pipeline.write import ShardDone, write_dataset

    check_at_least(options, shard_bytes=1, max_bad=0, seed=0)
    for name in ("max_side", "num_workers"):
        if getattr(options, name) is not None:
            check_at_least(options, **{name: 1})
    source = open_source(options.source, labels=options.labels, classes=options.classes)
    console = Console(stderr=True)
    resumed = 0
    with DatasetProgress(console, "sharding", "images") as progress:

        def on_progress(done: ShardDone) -> None:
            nonlocal resumed
            resumed += done.resumed
            count = done.num_samples + done.num_bad
            progress.advance(count, done.num_bytes, total=done.num_source_images, found=done.resumed)

        manifest = write_dataset(
            source,
            options.dataset,
            seed=options.seed,
            shard_bytes=options.shard_bytes,
            num_workers=options.num_workers or os.cpu_count() or 1,
            run_tasks=_run_tasks(options),
            max_bad=options.max_bad,
            max_side=options.max_side,
            check=options.check,
            on_progress=on_progress,
        )
    _report_dataset(console, options.dataset, manifest, resumed, options.json)
    return 0


def _run_tasks(options: ShardOptions) -> RunTasks | None:
    """The cluster's tasks, if there is one."""
    if not options.address:
        return None
    from cluster.shard_on_ray import RayTasks

    source, dataset = (url.removeprefix("file://") for url in (options.source, options.dataset))
    if "://" not in dataset:
        os.makedirs(dataset, exist_ok=True)
    paths = [os.path.abspath(path) for path in (source, dataset) if "://" not in path]
    return RayTasks(options.address, options.num_workers, paths)


def _report_dataset(console: Console, url: str, manifest: Manifest, num_resumed: int, as_json: bool) -> None:
    """What was left out, and what the dataset holds."""
    for bad in manifest.bad_samples:
        say(console, f"left out: {bad.key}: {bad.reason}")
    summary = {
        "dataset": url,
        "num_samples": manifest.num_samples,
        "num_bytes": manifest.num_bytes,
        "num_shards": len(manifest.shards),
        "num_shards_resumed": num_resumed,
        "num_classes": len(manifest.classes or ()),
        "num_bad": len(manifest.bad_samples),
        "num_ignored_files": manifest.settings["num_ignored_files"],
        "ignored_extensions": manifest.settings["ignored_extensions"],
    }
    report(summary, as_json)


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """Make a dataset of WebDataset tars that somebody else wrote, where they are.

    Reads each tar once, and adds indexes and a manifest beside the tars; these are neither copied nor changed. Killed
    and run again it finishes, without reading finished tars again.

    Example: tarmac index s3://bucket/laion-tars --max-bad 100
    """

    dataset: Annotated[str, tyro.conf.Positional]
    """URL of the folder with the tars."""
    classes: str | None = None
    """A text file of class names, one a line in the order of the labels."""
    num_workers: int = 8
    """Tars that are read at once."""
    max_bad: int = 0
    """Unreadable images that are left out of the index before it is an error."""
    json: bool = False
    """Print the result as JSON."""


def index(arguments: list[str]) -> int:
    """Make a dataset of tars that somebody else wrote, in place."""
    options = parse(IndexOptions, arguments, "index")
    from pipeline.index_dataset import TarIndexed, index_dataset

    check_at_least(options, num_workers=1, max_bad=0)
    console = Console(stderr=True)
    resumed = 0
    with DatasetProgress(console, "indexing", "tars") as progress:

        def on_progress(done: TarIndexed) -> None:
            nonlocal resumed
            resumed += done.resumed
            progress.advance(1, done.num_bytes, total=done.num_tars, found=done.resumed)

        manifest = index_dataset(
            options.dataset,
            classes=options.classes,
            num_workers=options.num_workers,
            max_bad=options.max_bad,
            on_progress=on_progress,
        )
    _report_dataset(console, options.dataset, manifest, resumed, options.json)
    return 0


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Check that the dataset in the bucket still matches its manifest; exit code 1 if it does not.

    Example: tarmac verify s3://bucket/imagenet/train --deep
    """

    dataset: Annotated[str, tyro.conf.Positional]
    """URL of the dataset."""
    deep: bool = False
    """Read every byte and check every checksum."""
    num_threads: int = 8
    """Objects that are checked at once."""
    json: bool = False
    """Print the problems as JSON."""


def verify(arguments: list[str]) -> int:
    """Check that a dataset still matches its manifest."""
    options = parse(VerifyOptions, arguments, "verify")
    check_at_least(options, num_threads=1)
    from pipeline.store import Store
    from pipeline.verify import verify_dataset

    with DatasetProgress(Console(stderr=True), "verifying", "shards") as progress:

        def on_progress(info: ShardInfo) -> None:
            progress.advance(1, info.num_bytes if options.deep else 0)

        problems = verify_dataset(
            Store(options.dataset), deep=options.deep, num_threads=options.num_threads, on_progress=on_progress
        )
    if options.json:
        print(json.dumps({"problems": [{"path": p.path, "message": p.message} for p in problems]}))  # noqa: T201
    else:
        console = Console()
        for problem in problems:
            say(console, f"{problem.path}: {problem.message}")
        depth = "every byte" if options.deep else "names, sizes and indexes"
        say(console, f"{len(problems)} problems; checked {depth} of {options.dataset}")
    return 1 if problems else 0


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Show what a dataset holds: counts, sizes, classes, dimensions.

    Example: tarmac inspect s3://bucket/imagenet/train --grid grid.png
    """

    dataset: Annotated[str, tyro.conf.Positional]
    """URL of the dataset."""
    grid: Path | None = None
    """Draw samples into this PNG file."""
    num_samples: int = 16
    """Samples in the grid."""
    seed: int = 0
    """Of the choice of samples."""
    json: bool = False
    """Print the numbers as JSON."""


def inspect(arguments: list[str]) -> int:
    """Show what a dataset holds; draw samples."""
    options = parse(InspectOptions, arguments, "inspect")
    check_at_least(options, num_samples=1, seed=0)
    if options.grid is not None:
        check_png("grid", options.grid)
    from pipeline import open_dataset
    from pipeline.inspect_dataset import draw_grid, inspect_dataset

    dataset = open_dataset(options.dataset)
    report(inspect_dataset(dataset).to_dict(), options.json)
    if options.grid is not None:
        draw_grid(dataset, options.num_samples, options.seed).save(options.grid)
        say(Console(stderr=True), f"drew {options.grid}")
    return 0
