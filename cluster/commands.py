"""The commands of `tarmac`: each parses its own arguments and returns an exit code."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from cluster.config import JobConfig
from trainer import recipes
from trainer.config import TrainConfig, check_world, num_steps

if TYPE_CHECKING:
    from pipeline.store import Store

Options = TypeVar("Options")


class UsageError(Exception):
    """The command line asks for something that cannot be."""


class CommandError(Exception):
    """A command ran and failed."""


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
    options = _parse(ShardOptions, arguments, "shard")
    from pipeline.sources import open_source
    from pipeline.write import ShardDone, write_dataset

    for name, least in (("shard_bytes", 1), ("num_workers", 1), ("max_bad", 0), ("seed", 0)):
        if getattr(options, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} ({getattr(options, name)}) must be at least {least}")
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
        _say(console, f"left out: {bad.key}: {bad.reason}")
    summary = {
        "dataset": options.dataset,
        "num_samples": manifest.num_samples,
        "num_bytes": manifest.num_bytes,
        "num_shards": len(manifest.shards),
        "num_shards_resumed": resumed,
        "num_classes": len(manifest.classes or ()),
        "num_bad": len(manifest.bad_samples),
    }
    _report(summary, options.json)
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
    options = _parse(VerifyOptions, arguments, "verify")
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
            _say(console, f"{problem.path}: {problem.message}")
        depth = "every byte" if options.deep else "names, sizes and indexes"
        _say(console, f"{len(problems)} problems; checked {depth} of {options.dataset}")
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
    options = _parse(InspectOptions, arguments, "inspect")
    from pipeline import open_dataset
    from pipeline.inspect_dataset import draw_grid, inspect_dataset

    dataset = open_dataset(options.dataset)
    _report(inspect_dataset(dataset).to_dict(), options.json)
    if options.grid is not None:
        draw_grid(dataset, options.num_samples, options.seed).save(options.grid)
        _say(Console(stderr=True), f"drew {options.grid}")
    return 0


@dataclass(frozen=True, kw_only=True)
class PretrainOptions:
    """Pretrain a masked autoencoder, here, on a local Ray or on the cluster of RAY_ADDRESS.

    The same command again goes on from the newest checkpoint that verifies. SIGTERM or Ctrl-C saves a checkpoint,
    stops, and exits with 75.

    Example: tarmac pretrain mae_base_800ep --data s3://bucket/imagenet/train --run s3://bucket/runs/b --num-workers 8
    """

    data: str
    """URL of a sharded dataset."""
    run: str
    """URL of the run."""
    num_workers: int = 1
    """Ray Train workers, one rank each."""
    cpus_per_worker: float = 1.0
    """CPUs a worker reserves and uses."""
    gpus_per_worker: float = 0.0
    """1 trains on CUDA with nccl, 0 on CPUs with gloo."""
    max_attempts_without_progress: int = 3
    """Restarts in a row that committed nothing, after which the run stops as a crash loop."""
    train: Annotated[TrainConfig, tyro.conf.arg(name="")]
    """The recipe, field by field."""


def pretrain(arguments: list[str]) -> int:
    """Pretrain a masked autoencoder; the same command again resumes."""
    recipe, arguments = _take_recipe(arguments)
    default = PretrainOptions(data=tyro.MISSING, run=tyro.MISSING, train=recipes.get(recipe))
    options = _parse(PretrainOptions, arguments, f"pretrain {recipe}", default)
    return _train(job_of(options))


def job_of(options: PretrainOptions) -> JobConfig:
    """The job that a command line asks for.

    Raises:
        UsageError: the config refuses it.
    """
    try:
        job = JobConfig(**{name: getattr(options, name) for name in PretrainOptions.__dataclass_fields__})
        check_world(job.train, job.num_workers)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return job


def _train(job: JobConfig) -> int:
    from cluster.launch import RunFailedError, launch
    from cluster.progress import RunProgress
    from pipeline import open_dataset
    from pipeline.store import Store
    from trainer.checkpoint import newest_step
    from trainer.errors import RunMismatchError
    from trainer.loop import StopReason
    from trainer.run_files import open_run

    console = Console(file=sys.stdout)  # this very stream: `launch` redirects sys.stdout, where Ray prints
    dataset = open_dataset(job.data, job.train.data.store)
    dataset.check_sizes()
    run = Store(job.run, job.train.data.store)
    run.check_writable()
    try:
        open_run(run, job.train, dataset.manifest.digest())
    except RunMismatchError as error:
        raise UsageError(str(error)) from error
    total = num_steps(job.train, dataset.num_samples)
    if _is_finished(run, total):
        _say(console, f"finished: {job.run} is at step {total} of {total}")
        return 0
    try:
        with RunProgress(console, total) as progress:
            reason = launch(job, on_news=progress.show)
    except RunFailedError as error:
        raise CommandError(str(error)) from error
    if reason is StopReason.FINISHED:
        _say(console, f"finished: {job.run} is at step {total} of {total}")
        return 0
    _say(console, f"stopped at step {newest_step(run)} of {total}; the same command goes on")
    return 75


def _is_finished(run: Store, total: int) -> bool:
    """Whether the run's last checkpoint is there and verifies; damage is left to the workers to report."""
    from trainer.checkpoint import find_resume, newest_step

    if newest_step(run) != total:
        return False
    commit = find_resume(run, lambda path, reason: None)
    return commit is not None and commit.step == total


def _take_recipe(arguments: list[str]) -> tuple[str, list[str]]:
    if not arguments or arguments[0].startswith("-"):
        if {"-h", "--help"} & set(arguments):
            return recipes.names()[0], arguments
        raise UsageError(f"pretrain needs a recipe first; known are {', '.join(recipes.names())}")
    if arguments[0] not in recipes.names():
        raise UsageError(f"unknown recipe {arguments[0]!r}; known are {', '.join(recipes.names())}")
    return arguments[0], arguments[1:]


@dataclass(frozen=True, kw_only=True)
class ReconstructOptions:
    """Draw what a run's model makes of masked images: masked, reconstruction, original.

    Example: tarmac reconstruct s3://bucket/runs/b --data s3://bucket/imagenet/val --out reconstruction.png
    """

    run: Annotated[str, tyro.conf.Positional]
    """URL of the run; its newest checkpoint that verifies is used."""
    data: str
    """URL of the dataset whose images are drawn."""
    out: Path
    """The PNG file to write."""
    num_samples: int = 8
    """Images, a row each."""
    seed: int = 0
    """Of the choice of images and masks."""


def reconstruct(arguments: list[str]) -> int:
    """Draw masked images, their reconstructions and the originals."""
    options = _parse(ReconstructOptions, arguments, "reconstruct")
    from pipeline import Loader, open_dataset
    from pipeline.store import Store
    from trainer.evaluate.reconstruct import draw_reconstructions, whole_image_config
    from trainer.evaluate.trained import load_trained

    if options.num_samples < 1:
        raise UsageError(f"--num-samples ({options.num_samples}) must be at least 1")
    trained = load_trained(Store(options.run))
    data = whole_image_config(trained.config.data, options.num_samples, options.seed)
    with Loader(open_dataset(options.data), data) as loader:
        batch = next(loader)
    picture = draw_reconstructions(trained.model, data.augment, batch.images, batch.kept_ids, batch.masked_ids)
    picture.save(options.out)
    _say(Console(), f"drew {options.out} from step {trained.commit.step}")
    return 0


@dataclass(frozen=True, kw_only=True)
class CurveOptions:
    """Draw a run's loss and learning rate over its steps, with its restarts.

    Example: tarmac curve s3://bucket/runs/b --out loss.png
    """

    run: Annotated[str, tyro.conf.Positional]
    """URL of the run."""
    out: Path
    """The PNG file to write."""


def curve(arguments: list[str]) -> int:
    """Draw a run's loss curve."""
    options = _parse(CurveOptions, arguments, "curve")
    from pipeline.store import Store
    from trainer.curve import draw_loss_curve
    from trainer.metrics import read_events, read_metrics

    run = Store(options.run)
    records = read_metrics(run)
    if not records:
        raise CommandError(f"{options.run} has no metrics; is it the URL of a run that has trained a step?")
    draw_loss_curve(records, read_events(run), options.out)
    _say(Console(), f"drew {options.out} from {len(records)} steps")
    return 0


def _progress(console: Console, what: str) -> Progress:
    """A bar with speed and time left; nothing where the console is a file or a pipe."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    speed = (TextColumn("{task.fields[megabytes_per_s]:.0f} MB/s"), TimeRemainingColumn())
    return Progress(*columns, *speed, console=console, disable=not console.is_terminal)


def _parse(kind: type[Options], arguments: list[str], name: str, default: Any = None) -> Options:
    """The options of one command; a wrong one ends the process with 2 and tyro's explanation."""
    extra = {} if default is None else {"default": default}
    options: Options = tyro.cli(kind, args=arguments, prog=f"tarmac {name}", **extra)
    return options


def _say(console: Console, message: str) -> None:
    """A line as it is: not wrapped, so that paths and URLs stay whole."""
    console.print(message, highlight=False, markup=False, soft_wrap=True)


def _report(numbers: dict[str, Any], as_json: bool) -> None:
    """Print named numbers, as JSON or as a table."""
    if as_json:
        json.dump(numbers, sys.stdout, indent=2)
        sys.stdout.write("\n")
        return
    table = Table.grid(padding=(0, 2))
    for name, value in numbers.items():
        table.add_row(f"[dim]{name}[/dim]", f"{value:,}" if isinstance(value, int) else str(value))
    Console().print(table, highlight=False)
