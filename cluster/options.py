"""What the commands of `tarmac` share: parsing, checks of values, and how an answer is printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import tyro
from rich.console import Console
from rich.table import Table

from cluster.log_setup import without_secrets

Options = TypeVar("Options")


class UsageError(Exception):
    """The command line asks for something that cannot be."""


class CommandError(Exception):
    """A command ran and failed."""


def parse(kind: type[Options], arguments: list[str], name: str, default: Any = None) -> Options:
    """The options of one command; a wrong one ends the process with 2 and tyro's explanation."""
    extra = {} if default is None else {"default": default}
    options: Options = tyro.cli(kind, args=arguments, prog=f"tarmac {name}", **extra)
    return options


def check_at_least(options: Any, **bounds: int) -> None:
    """Raise UsageError if an option is below its bound."""
    for name, least in bounds.items():
        value = getattr(options, name)
        if value < least:
            raise UsageError(f"--{name.replace('_', '-')} ({value}) must be at least {least}")


def check_png(name: str, path: Path) -> None:
    """Before the work, not after it: whether a picture can be written there."""
    check_file(name, path, ".png")


def check_file(name: str, path: Path, suffix: str) -> None:
    """Before the work, not after it: whether a file of this kind can be written there."""
    if path.suffix.lower() != suffix:
        raise UsageError(f"--{name} ({path}) must be the name of a {suffix} file")
    if not path.resolve().parent.is_dir():
        raise UsageError(f"--{name} ({path}) must be in a folder that exists; make {path.resolve().parent}")


def say(console: Console, message: str) -> None:
    """A line as it is: not wrapped, so that paths and URLs stay whole, but for secrets in URLs."""
    console.print(without_secrets(message), highlight=False, markup=False, soft_wrap=True)


def report(numbers: dict[str, Any], as_json: bool) -> None:
    """Print named numbers, as JSON or as a table; URLs without secrets."""
    numbers = {name: without_secrets(value) if isinstance(value, str) else value for name, value in numbers.items()}
    if as_json:
        json.dump(numbers, sys.stdout, indent=2)
        sys.stdout.write("\n")
        return
    table = Table.grid(padding=(0, 2))
    for name, value in numbers.items():
        table.add_row(f"[dim]{name}[/dim]", f"{value:,}" if isinstance(value, int) else str(value))
    Console().print(table, highlight=False)


def amounts(resources: dict[str, float]) -> str:
    """`2 CPU` or `2 CPU and 2 GPU`."""
    return " and ".join(f"{amount:g} {kind}" for kind, amount in resources.items() if amount or kind == "CPU")


def shortage(waiting: Mapping[str, Any]) -> str:
    """Why workers wait, from a `waiting` event; those of older runs say less."""
    need, have = amounts(waiting["need"]), amounts(waiting["have"])
    text = f"the workers need {need}, the nodes that stay have {have}"
    if waiting.get("retry_s"):
        return f"{text}; Ray found no place for them there, and is asked again in {waiting['retry_s']:.0f} s"
    if "num_fitting" in waiting:
        text += f", with room for {waiting['num_fitting']} of {waiting['num_least']} workers beside what else runs"
    return text


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
