"""The training step against its peers and against the limit of matrix products, side by side on the same cores.

    make bench-step
    python -m benchmarks.step --quick     tiny models, one turn: does everything run?

Prints one table and writes build/bench/step.json. docs/benchmarks.md says how to read it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
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
    parser.add_argument("--quick", action="store_true", help="tiny models and one turn: no numbers to believe")
    parser.add_argument("--table", default="", help="tables whose names begin with this: base, large, loop; no goals")
    parser.add_argument("--result", type=Path, default=RESULT, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    size = step_rows.QUICK if options.quick else step_rows.Size()
    options.result.parent.mkdir(parents=True, exist_ok=True)
    log = options.result.with_suffix(".log")
    log.write_text("")
    found = measure(size, options.table, log)
    print_report(found)
    options.result.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\nwritten to {options.result}; what the processes said, to {log}")
    return 0


def measure(size: step_rows.Size, table: str, log: Path) -> dict[str, Any]:
    """Everything, as the JSON file has it."""
    load_before = os.getloadavg()[0]
    chosen = [one for one in step_rows.tables(size) if one.name.startswith(table)]
    rows = [row for one in chosen for row in step_rows.measure(one, log)]
    found = [] if table else step_goals.all_goals(rows)
    return {
        "machine": machine(len(os.sched_getaffinity(0)), load_before, PACKAGES),
        "rows": rows,
        "goals": [goal.record() for goal in found],
    }


def print_report(found: dict[str, Any]) -> None:
    """The table, for people."""
    place = found["machine"]
    print(f"\na step at 224 px on {place['cpus']} CPUs ({place['model']}, load {place['load_before']} before):")
    print("forward, backward and AdamW on a batch in memory; the rows of a group take turns: medians of the turns,")
    print("and each turn against the first row's of the same round, with the lowest and the highest\n")
    table = Table(box=None, pad_edge=False, header_style="")
    table.add_column("")
    for title in ("model", "images", "images/s", "x first", "lowest", "highest", "images/CPU-s", "x first"):
        table.add_column(title, justify="right")
    for title in ("peak GiB", "kept GiB", "GFLOP/image", "GFLOP/s"):
        table.add_column(title, justify="right")
    for title in ("of the limit", "first loss"):
        table.add_column(title, justify="right")
    group = ""
    for row in found["rows"]:
        if row["table"] != group:
            group = row["table"]
            table.add_row(f"-- {group}")
        table.add_row(*_cells(row, found["rows"]))
    Console(width=190).print(table)
    for row in found["rows"]:
        if row["not_measured"]:
            print(f"{row['name']}, {row['size']} {row['precision']}: not measured: {row['not_measured']}")
    print_goals(found["goals"])


def _cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    name, model = row["name"], f"{row['size']} {row['precision']}"
    if row["not_measured"]:
        return [name, model, str(row["batch_size"]), "not measured"]
    share = step_goals.of_limit(rows, row)
    keys = ("images_per_s", "x_first", "lowest_x_first", "highest_x_first", "images_per_cpu_s", "cpu_x_first")
    speeds = [_number(row[key], 3) for key in keys]
    memory = [_number(row[key], 2, 2**30) for key in ("peak_bytes", "saved_bytes")]
    flops = [_number(row["flops_per_image"], 1, 1e9), _number(row["flops_per_s"], 0, 1e9)]
    ends = ["" if share is None else f"{share:.0%}", _number(row["first_loss"], 4)]
    return [name, model, str(row["batch_size"]), *speeds, *memory, *flops, *ends]


def _number(value: float | None, digits: int, unit: float = 1.0) -> str:
    return "" if value is None else f"{value / unit:.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
