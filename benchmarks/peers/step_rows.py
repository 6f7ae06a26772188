"""The rows of the step benchmark: what runs, beside what, and what is said about each."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.peers.report import say
from benchmarks.peers.step_models import Spec, why_not
from benchmarks.peers.step_turns import Contender, Plan, RowError

PEERS = {"transformers": "transformers", "lightly": "lightly", "timm blocks": "timm"}
OURS, COMPILED, LIMIT = "tarmac", "tarmac, compiled", "limit: matrix products"
CROSS, WITH_MASKS, SHALLOW = "tarmac, cross decoder", "tarmac, mask tokens in encoder", "tarmac, decoder depth 1"
BARE, LOOP, UNDER_RAY = "bare loop", "the loop without Ray", "Ray Train and the loop"
CROSS_MODEL = {"decoder": "cross", "predict_ratio": 0.25}


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    base: str = "base"
    large: str = "large"
    batch_size: int = 16
    large_batch_size: int = 8
    loop_batch_size: int = 4
    step: Plan = Plan(num_turns=5, num_steps=1)
    slow_step: Plan = Plan(num_turns=3, num_steps=1)
    loop: Plan = Plan(num_turns=12, num_steps=2)
    spared_loop: Plan = Plan(num_turns=6, num_steps=2)


QUICK = Size("tiny", "tiny", 2, 2, 2, step=Plan(1, 1), slow_step=Plan(1, 1), loop=Plan(2, 2), spared_loop=Plan(1, 2))


@dataclass(frozen=True)
class Table:
    """Rows that take turns with each other; their models must fit into memory together."""

    name: str
    specs: list[Spec]
    """The first is what the others are compared with."""
    plan: Plan
    count: bool = True
    """Operations and memory."""


def tables(size: Size) -> list[Table]:
    """Everything that is measured."""
    base = Spec(OURS, "ours", "ours", size.base, batch_size=size.batch_size)
    large = replace(base, size=size.large, batch_size=size.large_batch_size)
    found = []
    for precision in ("fp32", "bf16"):
        for name, model in (("base", base), ("large", large)):
            ours = replace(model, precision=precision)
            for peer, builder in PEERS.items():
                found.append(
                    Table(f"{name}: {peer}", [ours, replace(ours, name=peer, kind="peer", builder=builder)], size.step)
                )
            limit = replace(ours, name=LIMIT, kind="limit", builder="matmuls")
            found.append(Table(f"{name}: limit", [ours, replace(ours, name=COMPILED, compiled=True), limit], size.step))
        ours = replace(base, precision=precision)
        cross = replace(ours, name=CROSS, kind="variant", model=CROSS_MODEL)
        found.append(Table("base: decoder", [ours, cross], size.step))
    masks = replace(large, name=WITH_MASKS, kind="variant", model={"masking_in_encoder": True})
    shallow = replace(large, name=SHALLOW, kind="variant", model={"decoder_depth": 1})
    found.append(Table("large: encoder", [masks, large], size.slow_step))
    found.append(Table("large: decoder depth 1", [masks, shallow], size.slow_step))
    bare = replace(base, name=BARE, kind="variant", builder="bare", batch_size=size.loop_batch_size)
    around = [replace(bare, name=OURS, builder="ours"), replace(bare, name=LOOP, builder="loop")]
    loop = [bare, *around, replace(bare, name=UNDER_RAY, builder="ray")]
    found.append(Table("loop", loop, size.loop, count=False))
    spared = [replace(spec, spare_cpus=1) for spec in loop]
    found.append(Table("loop, a CPU spared", spared, size.spared_loop, count=False))
    return found


def measure(table: Table, log: Path) -> list[dict[str, Any]]:
    """A row a spec.

    Args:
        table: what to run.
        log: gets what the processes say.
    """
    reasons = {index: reason for index, spec in enumerate(table.specs) if (reason := why_not(spec))}
    turns: list[list[dict[str, float]]] = [[] for _ in table.specs]
    ends: list[dict[str, Any]] = [{} for _ in table.specs]
    with ExitStack() as running:
        contenders = [running.enter_context(Contender(spec, table.plan, table.count, log)) for spec in table.specs]

        def run(index: int, *, first: bool) -> None:
            contender = contenders[index]
            try:
                if first:
                    contender.start()
                else:
                    turns[index].append(contender.turn())
                    ends[index] = contender.said
            except RowError as error:
                reasons[index] = str(error)
                contender.end()

        for number in range(table.plan.num_turns + 1):
            for index, spec in enumerate(table.specs):
                if index not in reasons:
                    what = f"turn {number} of {table.plan.num_turns}" if number else "warming up"
                    say(f"{table.name} {spec.precision}, {what}: {spec.name}")
                    run(index, first=number == 0)
    return [row(table, index, turns, ends[index]) | {"not_measured": reasons.get(index)} for index in range(len(turns))]


def row(table: Table, index: int, turns: Sequence[list[dict[str, float]]], end: dict[str, Any]) -> dict[str, Any]:
    """What the table and the JSON file say about a spec.

    Args:
        table: of which it is a row.
        index: its place in there.
        turns: of each row, what its turns took.
        end: what its process said in the end; nothing if it failed.
    """
    spec = table.specs[index]
    images = spec.batch_size * table.plan.num_steps
    ran = turns[index] if end else []
    speeds = [images / turn["seconds"] for turn in ran]
    # Each turn against the first row's of the same round: what the machine does changes more slowly than that.
    against, cpu_against = (
        [first[key] / turn[key] for first, turn in zip(turns[0], ran, strict=False)]
        for key in ("seconds", "cpu_seconds")
    )
    speed, flops = _median(speeds), end.get("flops_per_image")
    return {
        "table": table.name,
        "name": spec.name,
        "kind": spec.kind,
        "size": spec.size,
        "precision": spec.precision,
        "batch_size": spec.batch_size,
        "images_per_s": speed,
        "lowest_images_per_s": min(speeds, default=None),
        "highest_images_per_s": max(speeds, default=None),
        "images_per_cpu_s": _median([images / turn["cpu_seconds"] for turn in ran]),
        "x_first": _median(against),
        "lowest_x_first": min(against, default=None),
        "highest_x_first": max(against, default=None),
        "cpu_x_first": _median(cpu_against),
        "peak_bytes": end.get("peak_bytes"),
        "flops_per_image": flops,
        "flops_per_s": speed * flops if speed and flops else None,
        "saved_bytes": end.get("saved_bytes"),
        "first_loss": end.get("loss"),
    }


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
