"""What the benchmarks share: the machine in words, progress, and the lines about goals."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def machine(num_cpus: int, load: float, packages: Iterable[str]) -> dict[str, Any]:
    """Where it was measured, and with what."""
    model = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "cpus": num_cpus,
        "model": model,
        "load_before": round(load, 2),
        "python": platform.python_version(),
        "versions": versions,
    }


def print_goals(goals: Iterable[dict[str, Any]]) -> None:
    """A line a goal."""
    lines = list(goals)
    if lines:
        print("\ngoals")
    for goal in lines:
        sign, verdict = "<=" if goal["at_most"] else ">=", "met" if goal["met"] else "MISSED"
        measured = "not measured" if goal["measured"] is None else f"{goal['measured']:.3g}"
        print(f"  {goal['name']:<58}{sign} {goal['goal']:<8.3g}{measured:>14}  {verdict}")


def say(what: str) -> None:
    """Progress, on stderr: the table is what goes to stdout."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)
