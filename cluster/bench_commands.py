"""The commands that measure this machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console

from cluster.options import UsageError, check_at_least, parse, report, say
from cluster.run_commands import take_recipe
from trainer import recipes
from trainer.config import TrainConfig

if TYPE_CHECKING:
    from trainer.checkpoint_bench import CheckpointTimes
    from trainer.headspace import Headspace


@dataclass(frozen=True, kw_only=True)
class BenchPipelineOptions:
    """Measure whether the pipeline or the model is the limit on this machine, as one rank of a run; writes nothing.

    Three measurements in turn, medians over the rounds: the model fed from memory, the loader alone, and the model
    fed by the loader. A step is one micro-batch and an update.

    Example: tarmac bench pipeline mae_base_800ep --data s3://bucket/imagenet/train
    """

    data: str
    """URL of a sharded dataset."""
    micro_batch_size: int | None = None
    """Images a step; by default the recipe's micro-batch, on a CPU at most 16 of 224 px or as many patches."""
    num_rounds: int = 5
    """Times that the three are measured, in turn."""
    num_steps: int = 10
    """Timed steps of each measurement in each round, after a warm-up."""
    json: bool = False
    """Print the result as JSON."""
    train: Annotated[TrainConfig, tyro.conf.arg(name="")]
    """The recipe, field by field."""


@dataclass(frozen=True, kw_only=True)
class BenchCheckpointOptions:
    """Measure what a recipe's checkpoints cost on this machine and store, as one rank of a run.

    How long training stands still for a save that goes on beside it, against a save that it waits for; how fast a
    checkpoint is read back, against plain reads. What is written is removed.

    Example: tarmac bench checkpoint mae_base_800ep --run s3://bucket/scratch/bench
    """

    run: str
    """A URL under which there is nothing."""
    num_rounds: int = 3
    """Times that everything is measured, in turn."""
    json: bool = False
    """Print the result as JSON."""
    train: Annotated[TrainConfig, tyro.conf.arg(name="")]
    """The recipe, field by field."""


def bench(arguments: list[str]) -> int:
    """Measure this machine: the pipeline against the model, and what checkpoints cost."""
    if arguments and arguments[0] in ("-h", "--help"):
        console = Console()
        say(console, "usage: tarmac bench WHAT ...\n")
        for name, command in BENCHES.items():
            say(console, f"  {name:<12} {(command.__doc__ or '').splitlines()[0]}")
        say(console, "\nExample: tarmac bench pipeline mae_base_800ep --data s3://bucket/imagenet/train")
        raise SystemExit(0)
    if not arguments or arguments[0] not in BENCHES:
        given = f"unknown benchmark {arguments[0]!r}" if arguments else "bench needs what to measure first"
        raise UsageError(f"{given}; known are {', '.join(BENCHES)}")
    return BENCHES[arguments[0]](arguments[1:])


def bench_pipeline(arguments: list[str]) -> int:
    """Is the pipeline or the model the limit here?"""
    usage = "bench pipeline RECIPE --data DATASET [--json] [field overrides]"
    recipe, arguments = take_recipe("bench pipeline", arguments, usage, BenchPipelineOptions.__doc__ or "")
    default = BenchPipelineOptions(data=tyro.MISSING, train=recipes.get(recipe))
    options = parse(BenchPipelineOptions, arguments, f"bench pipeline {recipe}", default)
    check_at_least(options, num_rounds=1, num_steps=1)
    if options.micro_batch_size is not None:
        check_at_least(options, micro_batch_size=1)
    import torch

    from pipeline import open_dataset
    from trainer.headspace import measure_headspace, one_rank_config

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    config = one_rank_config(options.train, device, options.micro_batch_size)
    dataset = open_dataset(options.data, config.store)
    with Console(stderr=True).status(f"measuring {recipe} on {device}, {options.num_rounds} rounds"):
        found = measure_headspace(
            config, dataset, device=device, num_rounds=options.num_rounds, num_steps=options.num_steps
        )
    if options.json:
        report(_as_json(recipe, config, found), as_json=True)
    else:
        _print(recipe, config, found)
    return 0


def bench_checkpoint(arguments: list[str]) -> int:
    """How long does training stand still for a checkpoint, and how fast is one read?"""
    usage = "bench checkpoint RECIPE --run URL [--json] [field overrides]"
    recipe, arguments = take_recipe("bench checkpoint", arguments, usage, BenchCheckpointOptions.__doc__ or "")
    default = BenchCheckpointOptions(run=tyro.MISSING, train=recipes.get(recipe))
    options = parse(BenchCheckpointOptions, arguments, f"bench checkpoint {recipe}", default)
    check_at_least(options, num_rounds=1)
    import torch

    from pipeline.store import Store
    from trainer.checkpoint_bench import measure_checkpoints

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    store = Store(options.run, options.train.store)
    store.check_writable()
    with Console(stderr=True).status(f"measuring {recipe}'s checkpoints on {device}, {options.num_rounds} rounds"):
        found = measure_checkpoints(options.train, store, device=device, num_rounds=options.num_rounds)
    if options.json:
        shares = {"stall_share": found.stall_share, "load_share": found.load_share}
        report({"recipe": recipe, **dataclasses.asdict(found), **shares}, as_json=True)
    else:
        _print_checkpoint(recipe, found)
    return 0


def _print_checkpoint(recipe: str, found: CheckpointTimes) -> None:
    def took(seconds: float) -> str:
        return f"{seconds:.3g} s, {found.num_bytes / 1e6 / seconds:,.0f} MB/s"

    rows = {
        "measured": f"{recipe} on {found.device}, {found.num_bytes / 1e6:,.1f} MB a checkpoint",
        "save that the loop waits for": took(found.sync_s),
        "save beside the loop": took(found.async_s),
        "the loop stands still": f"{found.stall_s:.3g} s, {found.stall_share:.1%} of the first",
        "check of every byte": took(found.verify_s),
        "load": f"{took(found.load_s)}, {found.load_share:.0%} of plain reads",
        "plain reads of its files": took(found.plain_read_s),
        "plain write of as much": took(found.plain_write_s),
    }
    report(rows, as_json=False)


def _as_json(recipe: str, config: TrainConfig, found: Headspace) -> dict[str, Any]:
    derived = ("headspace", "fed_share", "store_bytes_per_s", "limit")
    return {
        "recipe": recipe,
        "decode_device": config.data.decode_device,
        **dataclasses.asdict(found),
        **{name: getattr(found, name) for name in derived},
        "verdict": found.verdict(),
    }


def _print(recipe: str, config: TrainConfig, found: Headspace) -> None:
    decoding = f"decoding on {config.data.decode_device}"
    waits = f"{found.fetch_wait_share:.1%} fetch, {found.decode_wait_share:.1%} decode"
    rows = {
        "measured": f"{recipe} on {found.device}, {found.images_per_step} images a step, {decoding}",
        "model from memory": f"{found.model_images_per_s:,.1f} images/s",
        "loader alone": f"{found.loader_images_per_s:,.1f} images/s, {found.store_bytes_per_s / 1e6:,.1f} MB/s read",
        "model from loader": f"{found.together_images_per_s:,.1f} images/s, {found.fed_share:.0%} of from memory",
        "where time went": f"waiting for {waits}; {found.copy_share:.1%} copy; {found.model_share:.1%} model",
    }
    report(rows, as_json=False)
    say(Console(), found.verdict())


BENCHES: dict[str, Callable[[list[str]], int]] = {"pipeline": bench_pipeline, "checkpoint": bench_checkpoint}
