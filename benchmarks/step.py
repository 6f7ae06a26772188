"""The training step against its peers and against the limit of matrix products, side by side on the same cores.

    make bench-step
    python -m benchmarks.step --quick     tiny models, one round: does everything run?

Prints one table and writes build/bench/step.json. docs/benchmarks.md says how to read it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.peers import step_goals, step_rows
from benchmarks.peers.report import machine, print_goals

RESULT = Path("build/bench/step.json")
PACKAGES = ["torch", "ray", "timm", "transformers", "lightly"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 0 whether goals are met or not, since a shared machine may miss them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models and one round: no numbers to believe")
    parser.add_argument("--rounds", type=int, help="rounds of every row")
    parser.add_argument("--only", default="", help="rows whose names have this in them; no goals")
    parser.add_argument("--table", default="", help="base, large or loop, in place of all three; no goals")
    parser.add_argument("--result", type=Path, default=RESULT, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    size = step_rows.QUICK if options.quick else step_rows.Size()
    if options.rounds:
        size = replace(size, num_rounds=dict.fromkeys(size.num_rounds, options.rounds))
    options.result.parent.mkdir(parents=True, exist_ok=True)
    log = options.result.with_suffix(".log")
    log.write_text("")
    found = measure(size, options.only, options.table, log)
    print_report(found)
    options.result.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\nwritten to {options.result}; what the processes said, to {log}")
    return 0


def measure(size: step_rows.Size, only: str, table: str, log: Path) -> dict[str, Any]:
    """Everything, as the JSON file has it."""
    load_before = os.getloadavg()[0]
    chosen = [one for one in step_rows.tables(size) if table in ("", one.name)]
    rows = [row for one in chosen for row in step_rows.measure(one, only, log)]
    found = [] if only or table else step_goals.all_goals(rows)
    return {
        "machine": machine(len(os.sched_getaffinity(0)), load_before, PACKAGES),
        "rows": rows,
        "goals": [goal.record() for goal in found],
    }


def print_report(found: dict[str, Any]) -> None:
    """The table, for people."""
    place = found["machine"]
    print(f"\na step at 224 px on {place['cpus']} CPUs ({place['model']}, load {place['load_before']} before):")
    print("forward, backward and AdamW on a batch in memory; medians of the rounds, and the lowest and the highest\n")
    table = Table(box=None, pad_edge=False, header_style="")
    table.add_column("")
    for title in ("model", "images", "images/s", "lowest", "highest", "images/CPU-s"):
        table.add_column(title, justify="right")
    for title in ("peak GiB", "kept GiB", "GFLOP/image", "GFLOP/s"):
        table.add_column(title, justify="right")
    for title in ("of the limit", "first loss"):
        table.add_column(title, justify="right")
    for row in found["rows"]:
        table.add_row(*_cells(row, found["rows"]))
    Console(width=175).print(table)
    for row in found["rows"]:
        if row["not_measured"]:
            print(f"{row['name']}, {row['size']} {row['precision']}: not measured: {row['not_measured']}")
    print_goals(found["goals"])


def _cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    name, model = row["name"], f"{row['size']} {row['precision']}"
    if row["not_measured"]:
        return [name, model, str(row["batch_size"]), "not measured"]
    limit = step_goals.find(rows, row["table"], step_rows.LIMIT, row["precision"]).get("flops_per_s")
    share = step_goals.ratio(row["flops_per_s"], limit)
    speeds = [
        _number(row[key], 2)
        for key in ("images_per_s", "lowest_images_per_s", "highest_images_per_s", "images_per_cpu_s")
    ]
    memory = [_number(row[key], 2, 2**30) for key in ("peak_bytes", "saved_bytes")]
    flops = [_number(row["flops_per_image"], 1, 1e9), _number(row["flops_per_s"], 0, 1e9)]
    ends = ["" if share is None else f"{share:.0%}", _number(row["first_loss"], 4)]
    return [name, model, str(row["batch_size"]), *speeds, *memory, *flops, *ends]


def _number(value: float | None, digits: int, unit: float = 1.0) -> str:
    return "" if value is None else f"{value / unit:.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
