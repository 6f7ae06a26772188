"""The commands that make, check and show a dataset."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cluster.options import check_at_least, check_png, parse, report, say


@dataclass(frozen=True, kw_only=True)
class ShardOptions:
    """Turn images into shards in object storage, ready for training.

    Killed and run again it finishes, without redoing finished shards. The manifest is written last: until then the
    dataset does not exist.

    Example: tarmac shard ./train s3://bucket/imagenet/train --num-workers 16 --max-bad 10
    """

    source: Annotated[str, tyro.conf.Positional]
    """An image folder (class/name.jpg), a flat folder of images, or a tar of images; a path or a URL."""
    dataset: Annotated[str, tyro.conf.Positional]
    """URL of the dataset to make."""
    shard_bytes: int = 256 * 2**20
    """Bytes of images a shard, about."""
    seed: int = 0
    """Of the permutation of images over shards."""
    num_workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    """Processes that read, check and write; by default one a CPU."""
    max_bad: int = 0
    """Unreadable images that are left out before it is an error."""
    json: bool = False
    """Print the result as JSON."""


def shard(arguments: list[str]) -> int:
    """Turn images into shards in object storage."""
    options = parse(ShardOptions, arguments, "shard")
    from pipeline.sources import open_source
    from pipeline.write import ShardDone, write_dataset

    check_at_least(options, shard_bytes=1, num_workers=1, max_bad=0, seed=0)
    source = open_source(options.source)
    console = Console(stderr=True)
    resumed = 0
    with _progress(console, "sharding") as progress:
        task = progress.add_task("images", total=None, megabytes_per_s=0.0)
        num_bytes = 0

        def on_progress(done: ShardDone) -> None:
            nonlocal num_bytes, resumed
            resumed += done.resumed
            num_bytes += 0 if done.resumed else done.num_bytes
            speed = num_bytes / 1e6 / max(progress.tasks[0].elapsed or 0.0, 0.1)
            progress.update(task, total=done.num_source_images, megabytes_per_s=speed)
            progress.advance(task, done.num_samples + done.num_bad)

        manifest = write_dataset(
            source,
            options.dataset,
            seed=options.seed,
            shard_bytes=options.shard_bytes,
            num_workers=options.num_workers,
            max_bad=options.max_bad,
            on_progress=on_progress,
        )
    for bad in manifest.bad_samples:
        say(console, f"left out: {bad.key}: {bad.reason}")
    summary = {
        "dataset": options.dataset,
        "num_samples": manifest.num_samples,
        "num_bytes": manifest.num_bytes,
        "num_shards": len(manifest.shards),
        "num_shards_resumed": resumed,
        "num_classes": len(manifest.classes or ()),
        "num_bad": len(manifest.bad_samples),
        "num_ignored_files": manifest.settings["num_ignored_files"],
        "ignored_extensions": manifest.settings["ignored_extensions"],
    }
    report(summary, options.json)
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

    with _progress(Console(stderr=True), "verifying") as progress:
        task = progress.add_task("shards", total=None, megabytes_per_s=0.0)
        problems = verify_dataset(
            Store(options.dataset),
            deep=options.deep,
            num_threads=options.num_threads,
            on_progress=lambda info: progress.advance(task),
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


def _progress(console: Console, what: str) -> Progress:
    """A bar with speed and time left; nothing where the console is a file or a pipe."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    speed = (TextColumn("{task.fields[megabytes_per_s]:.0f} MB/s"), TimeRemainingColumn())
    return Progress(*columns, *speed, console=console, disable=not console.is_terminal)
