"""What the report says of a run, and the page that says it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import jinja2
import numpy as np

from cluster.command_line import join_words, recipe_words
from cluster.ledger import KINDS, Ledger, make_ledger, read_alive_until
from cluster.report_charts import HEIGHT, WIDTH, Chart, draw_chart, draw_time
from cluster.report_events import tell_events
from cluster.run_state import RunState, read_state
from pipeline.store import Store
from trainer.checkpoint_commit import COMMIT, DAMAGED, Commit, parse_commit, step_of
from trainer.config import EncoderConfig, TrainConfig, num_predicted_patches, peak_lr
from trainer.curve import restart_steps
from trainer.errors import CheckpointError
from trainer.evaluate import recipes as evaluation_recipes
from trainer.evaluate.config import EvaluationRecord
from trainer.metrics import Event, read_events
from trainer.run_files import RunRecord, read_any_run
from trainer.step_columns import Floats, StepColumns, latest_columns, read_columns

_MAX_EVENTS = 200

ACCOUNTS = {
    "training": "training",
    "data_wait": "waiting for data",
    "saving": "saving",
    "lost_work": "lost work",
    "loading": "loading",
    "starting": "starting",
    "restarting": "restarting",
    "idle": "idle",
}
"""KINDS as a reader has them."""


@dataclass(frozen=True)
class Checkpoint:
    """One directory of the run's checkpoints."""

    step: int
    state: str
    """`committed`, `damaged` or `unfinished`."""
    num_bytes: int
    num_files: int
    world_size: int | None
    stall_s: float | None
    seconds: float | None


def render_report(run: Store) -> str:
    """The report as HTML.

    Raises:
        RunError: there is no run, or something of it cannot be read.
    """
    record = read_any_run(run)
    events, attempts = read_events(run), read_columns(run)
    steps = latest_columns(attempts)
    ledger = make_ledger(events, attempts, read_alive_until(run, events))
    state = read_state(run)
    told = tell_events(events)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cluster", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"seconds": _seconds, "moment": _moment, "size": _size}
    return environment.get_template("report_page.html.j2").render(
        run=str(run),
        made=time.time(),
        state=state.state,
        reason=state.reason,
        facts=_facts(state, steps, ledger),
        recipe=_recipe(record),
        versions=record.versions,
        ledger=ledger,
        accounts={kind: ACCOUNTS[kind] for kind in KINDS},
        slices=draw_time(ledger),
        charts=_charts(steps, restart_steps(events)),
        width=WIDTH,
        height=HEIGHT,
        events=told[-_MAX_EVENTS:],
        num_left_out=max(0, len(told) - _MAX_EVENTS),
        checkpoints=list_checkpoints(run, events),
        command=_command(run, record, ledger),
        digest=record.manifest_digest,
    )


def list_checkpoints(run: Store, events: list[Event]) -> list[Checkpoint]:
    """Every directory of a checkpoint, newest first; complete ones by commit record and sizes, their bytes unread."""
    directories: dict[str, dict[str, int]] = {}
    for entry in run.list("checkpoints"):
        directory, _, name = entry.path.rpartition("/")
        if step_of(directory) is not None:
            directories.setdefault(directory, {})[name] = entry.num_bytes
    saves = {event["step"]: event for event in events if event["event"] == "save"}
    found = [_checkpoint(run, directory, sizes, saves) for directory, sizes in directories.items()]
    return sorted(found, key=lambda checkpoint: -checkpoint.step)


def _checkpoint(run: Store, directory: str, sizes: dict[str, int], saves: dict[int, Event]) -> Checkpoint:
    step = step_of(directory)
    assert step is not None
    commit: Commit | None = None
    state = "damaged" if DAMAGED in sizes else "unfinished"
    if COMMIT in sizes:
        try:
            commit = parse_commit(run.read(f"{directory}/{COMMIT}"), directory)
            whole = all(sizes.get(name) == record.num_bytes for name, record in commit.files.items())
            state = "committed" if whole else "damaged"
        except CheckpointError:
            state = "damaged"
    save = saves.get(step, {})
    return Checkpoint(
        step=step,
        state=state,
        num_bytes=sum(sizes.values()),
        num_files=len(sizes),
        world_size=commit.world_size if commit else None,
        stall_s=save.get("stall_s"),
        seconds=save.get("seconds"),
    )


def _facts(state: RunState, steps: StepColumns, ledger: Ledger) -> dict[str, str]:
    """The numbers at the top of the page."""
    total = f" of {state.num_steps:,}" if state.num_steps else ""
    facts = {"step": f"{state.step:,}{total}", "attempts": str(state.attempts), "wall time": _seconds(ledger.wall_s)}
    if not len(steps):
        return facts
    tail = max(1, len(steps) // 40)
    loss, speed = (_mean(values[-tail:]) for values in (steps.loss, steps.images_per_s))
    return facts | {
        "epoch": f"{state.epoch:.2f}",
        f"loss, mean of {tail:,} steps" if tail > 1 else "loss": f"{loss:.4f}",
        "images/s": f"{speed:,.0f}",
    }


def _mean(values: Floats) -> float:
    numbers = values[np.isfinite(values)]
    return float(numbers.mean()) if len(numbers) else math.nan


def _recipe(record: RunRecord) -> dict[str, str]:
    """The fields that say what is trained."""
    config, optim = record.loop, record.loop.optim
    length = f"{optim.num_steps:,} steps" if optim.num_steps is not None else f"{optim.num_epochs:g} epochs"
    return {
        **(_evaluation(record.config) if isinstance(record.config, EvaluationRecord) else _pretraining(record.config)),
        "batch": f"{config.data.global_batch_size:,} images a step, {config.data.num_lanes} lanes, "
        f"seed {config.data.seed}",
        "length": length,
        "learning rate": f"{peak_lr(config):.3g} after {optim.warmup_fraction:.0%} of warm-up",
        "precision": config.parallel.precision,
        "checkpoints": f"every {config.checkpoint.every_steps:,} steps",
    }


def _encoder(model: EncoderConfig) -> str:
    return f"{model.embed_dim} wide, {model.depth} deep, {model.num_heads} heads"


def _pretraining(config: TrainConfig) -> dict[str, str]:
    augment, model = config.data.augment, config.model
    height, width = augment.image_size
    return {
        "encoder": _encoder(model),
        "decoder": f"{model.decoder_embed_dim} wide, {model.decoder_depth} deep, {model.decoder}",
        "images": f"{height} x {width}, patch {augment.patch_size}, {augment.mask_ratio:.0%} masked, "
        f"{num_predicted_patches(model, augment)} patches predicted",
    }


def _evaluation(record: EvaluationRecord) -> dict[str, str]:
    augment, model, source = record.train.data.augment, record.train.model, record.source
    height, width = augment.image_size
    return {
        "encoder": _encoder(model),
        "encoder from": f"{source.run}, step {source.step:,}{', averaged' if source.average else ''}",
        "what is trained": f"{'the head alone' if model.frozen_encoder else 'all'}, for {model.num_classes} classes",
        "images": f"{height} x {width}, patch {augment.patch_size}",
    }


def _charts(steps: StepColumns, restarts: list[int]) -> list[Chart]:
    if not len(steps):
        return []
    waiting = (steps.data_wait_s / steps.step_s).clip(0, 1)
    charts = (
        draw_chart("Loss", steps.step, steps.loss, restarts=restarts, label=_short, from_zero=False),
        draw_chart("Learning rate", steps.step, steps.lr, restarts=restarts, label=lambda value: f"{value:.3g}"),
        draw_chart("Images a second", steps.step, steps.images_per_s, restarts=restarts, label=_whole),
        draw_chart("Share of time waiting for data", steps.step, waiting, restarts=restarts, label=_percent),
    )
    return [chart for chart in charts if chart is not None]


def _command(run: Store, record: RunRecord, ledger: Ledger) -> str:
    workers = next((row.facts.num_workers for row in reversed(ledger.rows) if row.facts.num_workers), None)
    if isinstance(record.config, EvaluationRecord):
        recipe, *options = recipe_words(record.loop, evaluation_recipes.BOOK)
        source = ["--from", record.config.source.run, *(["--average"] if record.config.source.average else [])]
        words = ["tarmac", "evaluate", recipe, *source, "--data", "DATASET", "--val", "DATASET", "--run", str(run)]
    else:
        recipe, *options = recipe_words(record.config)
        words = ["tarmac", "pretrain", recipe, "--data", "DATASET", "--run", str(run)]
    return join_words([*words, *(["--num-workers", str(workers)] if workers else []), *options])


def _short(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".")


def _whole(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10 else f"{value:.2g}"


def _percent(value: float) -> str:
    return f"{value * 100:.2g}%"


def _seconds(seconds: float) -> str:
    """`3d 4h`, `2h 03m`, `4m 05s`, `12.3s`."""
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {rest:02}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02}m" if hours < 48 else f"{hours // 24}d {hours % 24}h"


def _moment(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at))


def _size(num_bytes: int) -> str:
    units = ("B", "kB", "MB", "GB", "TB")
    power = min(len(units) - 1, int(math.log10(max(num_bytes, 1)) // 3))
    return f"{num_bytes / 1000**power:.3g} {units[power]}"
