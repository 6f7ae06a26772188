"""The rows of the step benchmark: what runs, in which turn, and what is said about each."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.peers.report import say
from benchmarks.peers.step_models import Spec

TIMEOUT_S = 600.0
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
    num_rounds: dict[str, int] = field(default_factory=lambda: {"base": 2, "large": 2, "loop": 3})
    num_steps: int = 1
    """Timed in each round, after one that warms up."""
    num_loop_steps: int = 8


QUICK = Size(
    base="tiny",
    large="tiny",
    batch_size=2,
    large_batch_size=2,
    loop_batch_size=2,
    num_rounds={"base": 1, "large": 1, "loop": 1},
    num_steps=1,
    num_loop_steps=4,
)


@dataclass(frozen=True)
class Table:
    """Rows that take turns with each other."""

    name: str
    """base, large or loop."""
    specs: list[Spec]
    num_rounds: int
    num_steps: int


def tables(size: Size) -> list[Table]:
    """Everything that is measured."""
    base, large = contenders(size.base, size.batch_size), contenders(size.large, size.large_batch_size)
    ours = Spec(OURS, "variant", "ours", size.base, batch_size=size.batch_size)
    base += [replace(ours, name=CROSS, precision=precision, model=CROSS_MODEL) for precision in ("fp32", "bf16")]
    ours = replace(ours, size=size.large, batch_size=size.large_batch_size)
    large.append(replace(ours, name=WITH_MASKS, model={"masking_in_encoder": True}))
    large.append(replace(ours, name=SHALLOW, model={"decoder_depth": 1}))
    bare = Spec(BARE, "variant", "bare", size.base, batch_size=size.loop_batch_size)
    loop = [bare, replace(bare, name=OURS, builder="ours")]
    loop += [replace(bare, name=LOOP, builder="loop"), replace(bare, name=UNDER_RAY, builder="ray")]
    return [
        Table("base", base, size.num_rounds["base"], size.num_steps),
        Table("large", large, size.num_rounds["large"], size.num_steps),
        Table("loop", loop, size.num_rounds["loop"], size.num_loop_steps),
    ]


def contenders(size: str, batch_size: int) -> list[Spec]:
    """Ours, the peers and the limit in both precisions."""
    specs = []
    for precision in ("fp32", "bf16"):
        ours = Spec(OURS, "ours", "ours", size, precision, batch_size=batch_size)
        specs += [ours, replace(ours, name=COMPILED, compiled=True)]
        specs += [replace(ours, name=name, kind="peer", builder=builder) for name, builder in PEERS.items()]
        specs.append(replace(ours, name=LIMIT, kind="limit", builder="matmuls"))
    return specs


def measure(table: Table, only: str, log: Path) -> list[dict[str, Any]]:
    """A row a spec: medians over rounds in turn, or the reason why there are none.

    Args:
        table: what to run.
        only: rows whose names have this in them.
        log: gets what the processes say.
    """
    specs = [spec for spec in table.specs if only in spec.name]
    rounds: list[list[dict[str, Any]]] = [[] for _ in specs]
    reasons: dict[int, str] = {}
    for number in range(table.num_rounds):
        for index, spec in enumerate(specs):
            if index not in reasons:
                say(f"{table.name}, round {number + 1} of {table.num_rounds}: {spec.name}, {spec.precision}")
                try:
                    rounds[index].append(run(spec, table.num_steps, number == 0, log))
                except RowError as error:
                    reasons[index] = str(error)
    return [row(table.name, spec, rounds[index], reasons.get(index)) for index, spec in enumerate(specs)]


class RowError(Exception):
    """A row does not run, and why."""


def run(spec: Spec, num_steps: int, count: bool, log: Path) -> dict[str, Any]:
    """One round of one row, in a process of its own.

    Raises:
        RowError: the process failed or did not end.
    """
    arguments = [json.dumps(asdict(spec)), str(num_steps), str(int(count))]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.peers.step_runner", *arguments]
    with log.open("a") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)
        try:
            output, _ = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise RowError(f"no end within {TIMEOUT_S:.0f} s") from None
        finally:
            with suppress(ProcessLookupError):  # Ray's own processes may be left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode != 0:
        raise RowError(_last_line(log) or f"exit code {process.returncode}")
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def row(table: str, spec: Spec, rounds: Sequence[dict[str, Any]], reason: str | None) -> dict[str, Any]:
    """What the table and the JSON file say about a spec."""
    speeds, cpu_speeds = (
        [] if reason else [spec.batch_size / statistics.median(found[key]) for found in rounds]
        for key in ("seconds", "cpu_seconds")
    )
    first = {} if reason else rounds[0]
    speed, flops = statistics.median(speeds) if speeds else None, first.get("flops_per_image")
    return {
        "table": table,
        "name": spec.name,
        "kind": spec.kind,
        "size": spec.size,
        "precision": spec.precision,
        "batch_size": spec.batch_size,
        "images_per_s": speed,
        "lowest_images_per_s": min(speeds, default=None),
        "highest_images_per_s": max(speeds, default=None),
        "images_per_cpu_s": statistics.median(cpu_speeds) if cpu_speeds else None,
        "peak_bytes": max((found["peak_bytes"] for found in rounds if "peak_bytes" in found), default=None),
        "flops_per_image": flops,
        "flops_per_s": speed * flops if speed and flops else None,
        "saved_bytes": first.get("saved_bytes"),
        "first_loss": first.get("loss"),
        "not_measured": reason,
    }
