"""The commands that make a run and show what came of it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console

from cluster.config import JobConfig
from cluster.options import CommandError, UsageError, check_at_least, check_png, parse, say
from trainer import recipes
from trainer.config import TrainConfig, check_world, num_steps
from trainer.recipe_book import RecipeBook

if TYPE_CHECKING:
    from pipeline.store import Store


class LostRayError(CommandError):
    """Ray is not there, or went away under a driver. The run is in its bucket, and goes on with the next one."""


@dataclass(frozen=True, kw_only=True)
class PretrainOptions:
    """Pretrain a masked autoencoder, here, on a local Ray or on the cluster of RAY_ADDRESS.

    The same command again goes on from the newest checkpoint that verifies. SIGTERM or Ctrl-C saves a checkpoint,
    stops, and exits with 75; so does a driver that cannot go on for now, as when the store does not answer.

    Example: tarmac pretrain mae_base_800ep --data s3://bucket/imagenet/train --run s3://bucket/runs/b \\
        --num-workers 8 --gpus-per-worker 1
    """

    data: str
    """URL of a sharded dataset."""
    run: str
    """URL of the run."""
    num_workers: str = "1"
    """Ray Train workers, one rank each: a number, or MIN:MAX to go on with fewer while nodes are lost, and with more
    when they come."""
    cpus_per_worker: float = 1.0
    """CPUs a worker reserves and uses."""
    gpus_per_worker: float = 0.0
    """1 trains on CUDA with nccl, 0 on CPUs with gloo."""
    max_attempts_without_progress: int = 3
    """Restarts in a row that committed nothing, after which the run stops as a crash loop."""
    silence_timeout_s: float = 20.0
    """A worker that gives no sign of life for this long is killed, and the run restarted."""
    stall_timeout_s: float = 600.0
    """Workers that complete no step for this long are killed, and the run restarted."""
    standby: bool = True
    """Have a process with all imports wait on spare nodes: faster moves to them, for their memory."""
    train: Annotated[TrainConfig, tyro.conf.arg(name="")]
    """The recipe, field by field."""


def pretrain(arguments: list[str]) -> int:
    """Pretrain a masked autoencoder; the same command again resumes."""
    usage = "pretrain RECIPE --data DATASET --run RUN [--num-workers N] [field overrides]"
    recipe, arguments = take_recipe("pretrain", arguments, usage, PretrainOptions.__doc__ or "")
    default = PretrainOptions(data=tyro.MISSING, run=tyro.MISSING, train=recipes.get(recipe))
    options = parse(PretrainOptions, arguments, f"pretrain {recipe}", default)
    return _train(job_of(options))


def job_of(options: PretrainOptions) -> JobConfig:
    """The job that a command line asks for, its paths made absolute: workers run in a folder of Ray's.

    Raises:
        UsageError: the config refuses it.
    """
    from pipeline.store import Store

    values = {name: getattr(options, name) for name in PretrainOptions.__dataclass_fields__}
    try:
        values |= {name: Store(values[name]).url for name in ("data", "run")} | worker_range(options.num_workers)
        job = JobConfig(**values)
        check_world(job.train, job.num_workers)
        check_world(job.train, job.least_workers)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return job


def worker_range(words: str) -> dict[str, Any]:
    """What `--num-workers` says, as a JobConfig's fields: `8`, or `2:8`. Raises UsageError."""
    least, colon, most = words.rpartition(":")
    if not most.isdecimal() or (colon and not least.isdecimal()):
        raise UsageError(f"--num-workers ({words}) must be a number, or MIN:MAX as in 2:8")
    return {"num_workers": int(most), "min_workers": int(least) if colon else None}


def _train(job: JobConfig) -> int:
    from pipeline import open_dataset
    from pipeline.store import Store
    from trainer.errors import RunMismatchError
    from trainer.run_files import open_run

    dataset = open_dataset(job.data, job.train.store)
    dataset.check_sizes()
    run = Store(job.run, job.train.store)
    run.check_writable()
    try:
        open_run(run, job.train, dataset.manifest.digest())
    except RunMismatchError as error:
        raise UsageError(str(error)) from error
    # This very stream: `launch` redirects sys.stdout, where Ray prints.
    return drive(job, run, num_steps(job.train, dataset.num_samples), Console(file=sys.stdout))


def drive(job: JobConfig, run: Store, total: int, console: Console) -> int:
    """Launch a job whose run is open, unless it is finished; tell the console, and return the exit code.

    Args:
        job: what runs.
        run: its store.
        total: steps of the whole run.
        console: where progress goes.

    Raises:
        CommandError: the run failed.
        LostRayError: Ray is not there, or went away.
        LeaseError: another driver has the run.
    """
    from ray.exceptions import AuthenticationError, RayError, RayTaskError

    from cluster.launch import RunFailedError, launch
    from cluster.progress import RunProgress
    from trainer.checkpoint import newest_step
    from trainer.loop import StopReason

    if _is_finished(run, total):
        say(console, f"finished: {job.run} is at step {total} of {total}")
        return 0
    try:
        with RunProgress(console, total) as progress:
            reason = launch(job, on_news=progress.show)
    except RunFailedError as error:
        raise CommandError(str(error)) from error
    except RayTaskError:
        raise  # an error in our own code
    except (RayError, ConnectionError) as error:  # the latter of `ray.init`
        what = str(error).partition("\n")[0] or type(error).__name__
        if isinstance(error, AuthenticationError):
            raise CommandError(f"{what}; set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token") from error
        raise LostRayError(f"Ray does not answer the driver ({what}); the same command goes on") from error
    if reason is StopReason.FINISHED:
        say(console, f"finished: {job.run} is at step {total} of {total}")
        return 0
    say(console, f"stopped at step {newest_step(run)} of {total}; the same command goes on")
    return 75


def _is_finished(run: Store, total: int) -> bool:
    """Whether the run's last checkpoint is there and verifies; damage is left to the workers to report."""
    from trainer.checkpoint import find_resume, newest_step

    if newest_step(run) != total:
        return False
    commit = find_resume(run, lambda path, reason: None)
    return commit is not None and commit.step == total


def take_recipe(
    command: str, arguments: list[str], usage: str, summary: str, book: RecipeBook[Any] = recipes.BOOK
) -> tuple[str, list[str]]:
    """The recipe, and the arguments after it. `--help` in its place lists the recipes and ends the process.

    Args:
        command: its name, for messages.
        arguments: the words after the command.
        usage: what `--help` shows as the command's form.
        summary: what it says about the command.
        book: the recipes that there are.

    Raises:
        UsageError: no recipe, or an unknown one.
    """
    known = ", ".join(book.names())
    if arguments and arguments[0] in ("-h", "--help"):
        console = Console()
        say(console, f"usage: tarmac {usage}\n")
        say(console, f"{summary}\nRecipes:")
        for name in book.names():
            say(console, f"  {name:<20} {book.summary(name)}")
        say(console, f"\ntarmac {command} RECIPE --help lists every field, with the recipe's values.")
        raise SystemExit(0)
    if not arguments or arguments[0].startswith("-"):
        raise UsageError(f"{command} needs a recipe first; known are {known}")
    if arguments[0] not in book.names():
        raise UsageError(f"unknown recipe {arguments[0]!r}; known are {known}")
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
    average: bool = False
    """Use the encoder's averaged weights, which a run with --optim.ema-decay keeps."""


def reconstruct(arguments: list[str]) -> int:
    """Draw masked images, their reconstructions and the originals."""
    options = parse(ReconstructOptions, arguments, "reconstruct")
    check_png("out", options.out)
    from pipeline import Loader, open_dataset
    from trainer.evaluate.reconstruct import draw_reconstructions, whole_image_config
    from trainer.evaluate.trained import load_trained

    check_at_least(options, num_samples=1, seed=0)
    trained = load_trained(options.run, average=options.average)
    data = whole_image_config(trained.config.data, options.num_samples, options.seed)
    with Loader(open_dataset(options.data), data) as loader:
        batch = next(loader)
    picture = draw_reconstructions(trained.model, data.augment, batch.images, batch.kept_ids, batch.masked_ids)
    picture.save(options.out)
    say(Console(), f"drew {options.out} from step {trained.commit.step}")
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
    options = parse(CurveOptions, arguments, "curve")
    check_png("out", options.out)
    from pipeline.store import Store
    from trainer.curve import draw_loss_curve
    from trainer.metrics import read_events, read_metrics

    run = Store(options.run)
    records = read_metrics(run)
    if not records:
        raise CommandError(f"{options.run} has no metrics; is it the URL of a run that has trained a step?")
    draw_loss_curve(records, read_events(run), options.out)
    say(Console(), f"drew {options.out} from {len(records)} steps")
    return 0
