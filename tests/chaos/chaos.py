"""Everything that ends a run, done to one, on a Ray cluster of several nodes on loopback; and a bad night.

python -m tests.chaos.chaos [--rows NAME,NAME] [--quick] [--night-minutes N]

Run by `make chaos`. The same photographs are trained on from an S3 server once undisturbed, and once for every fault.
Prints a table, and writes build/bench/chaos.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.peers.goals import Goal
from benchmarks.peers.report import machine, print_goals
from cluster.demo_run import Terminal
from tests.chaos.faults import ROWS, Row
from tests.chaos.goals import MAX_LOSS_DIFFERENCE, NIGHT_MINUTES, exempt, goals_of
from tests.chaos.night import bad_night
from tests.chaos.nodes import ray_environment
from tests.chaos.scene import Job
from tests.chaos.stage import BUCKET, S3, Stage
from tests.chaos.verify_resume import find_photos

DATASET = f"s3://{BUCKET}/photos"
RESULT = Path("build/bench/chaos.json")
PACKAGES = ("torch", "ray", "s3fs")
FULL, QUICK = (250, 50), (160, 12)
"""Steps, and steps between checkpoints."""


def main() -> int:
    """Run the rows. Returns 0 if no run was lost and no sample or weight is wrong; times decide nothing here.

    Of the nights ours counts.
    """
    arguments = parse_arguments()
    rows = chosen_rows(arguments.rows)
    os.environ |= ray_environment()
    arguments.out.mkdir(parents=True, exist_ok=True)
    about = machine(os.cpu_count() or 1, os.getloadavg()[0], PACKAGES)
    num_steps, cadence = QUICK if arguments.quick else FULL
    with (
        tempfile.TemporaryDirectory(prefix="tarmac-chaos-") as s3_folder,
        Terminal(arguments.out / "chaos.log", Console()) as terminal,
        contextlib.closing(S3(Path(s3_folder))) as s3,
    ):
        terminal.title("Dataset")
        source = find_photos(terminal, arguments.out, num_photos=600)
        terminal.tarmac("shard", str(source), DATASET, "--num-workers", "2", "--shard-bytes", str(16 * 2**20))
        stage = Stage(terminal, Job(DATASET, num_steps, cadence), s3, arguments.out)
        with contextlib.closing(stage):
            for row in rows:
                stage.play(row)
        nights = bad_night(stage, arguments.night_minutes) if arguments.night_minutes else []
        terminal.title("Result")
        terminal.show(table_of(stage.rows))
        for night in nights:
            terminal.say(", ".join(f"{name} {value}" for name, value in night.items()))
    goals = goals_of(rows, stage.rows, nights, cadence)
    write_result(about, stage.rows + nights, goals, exempt(rows, stage.rows))
    return 0 if all(holds(row) for row in stage.rows) and all(night_holds(night) for night in nights[:1]) else 1


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.chaos", description=__doc__)
    parser.add_argument("--rows", help=f"comma-separated; default: all of {', '.join(row.name for row in ROWS)}")
    parser.add_argument("--quick", action="store_true", help="shorter runs, and no night unless asked for")
    parser.add_argument(
        "--night-minutes", type=float, help="of the bad night, for us and for Ray; default 20, 0 = none"
    )
    parser.add_argument("--out", type=Path, default=Path("build/chaos"), help="folder for logs")
    arguments = parser.parse_args()
    if arguments.night_minutes is None:
        arguments.night_minutes = 0.0 if arguments.quick or arguments.rows else NIGHT_MINUTES
    shutil.rmtree(arguments.out, ignore_errors=True)
    return arguments


def chosen_rows(names: str | None) -> list[Row]:
    """The rows of a comma-separated list, all without one."""
    known = {row.name: row for row in ROWS}
    wanted = list(known) if names is None else [name for name in names.split(",") if name]
    if unknown := sorted(set(wanted) - set(known)):
        raise SystemExit(f"--rows: unknown {', '.join(unknown)}; known are {', '.join(known)}")
    return [known[name] for name in wanted]


def holds(row: dict[str, Any]) -> bool:
    """Whether the run came to its end with every sample once, and the right losses or weights if they are known."""
    if "error" in row or row["samples_wrong"]:
        return False
    if row["same_weights"] is None:
        return True
    return bool(row["loss_difference"] <= MAX_LOSS_DIFFERENCE if row["resized"] else row["same_weights"])


def night_holds(night: dict[str, Any]) -> bool:
    """Whether the night came to its end with every sample once."""
    return "error" not in night and night["samples_wrong"] == 0


def table_of(rows: list[dict[str, Any]]) -> Table:
    """One row a fault."""
    times = ("detected_s", "again_s", "paused_s", "saved_s")
    heads = ("Detected in", "Training again in", "Paused", "Notice to commit")
    table = Table("Fault", *heads, "Steps lost", "Samples wrong", "Result")
    for row in rows:
        if "error" in row:
            table.add_row(row["what"], *[""] * 6, f"FAILED: {row['error'].splitlines()[0]}")
            continue
        told = [f"{row[name]:.1f} s" if row[name] is not None else "-" for name in times]
        table.add_row(row["what"], *told, str(row["steps_lost"]), str(row["samples_wrong"]), result_of(row))
    return table


def result_of(row: dict[str, Any]) -> str:
    """In words, how the run compares with the undisturbed one."""
    if row["same_weights"] is None:
        return "not compared"
    return "same weights" if row["same_weights"] else f"losses within {row['loss_difference']:.1g}"


def write_result(
    about: dict[str, Any], rows: list[dict[str, Any]], goals: list[Goal], exempt_rows: list[dict[str, Any]]
) -> None:
    """The goals on the screen, and chaos.json."""
    records = [goal.record() for goal in goals]
    print_goals(records)
    for row in exempt_rows:
        again = "not measured" if row["again_s"] is None else f"{row['again_s']:.1f} s"
        print(f"  no goal for training again: {row['name']}, {again} ({row['why']})")
    result = {"machine": about, "rows": rows, "goals": records, "exempt": exempt_rows}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {RESULT}")


if __name__ == "__main__":
    sys.exit(main())
