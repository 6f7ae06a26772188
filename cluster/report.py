"""`tarmac report`: a run as one HTML page that needs nothing but itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console

from cluster.options import UsageError, parse, say

if TYPE_CHECKING:
    from pipeline.store import Store

REPORT = "report.html"


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Write a run's report: goodput, curves, events, checkpoints and the command that goes on, as one HTML page.

    Example: tarmac report s3://bucket/runs/b --out report.html
    """

    run: Annotated[str, tyro.conf.Positional]
    """URL of the run."""
    out: Path | None = None
    """The HTML file to write; without it, report.html in the run."""


def report(arguments: list[str]) -> int:
    """Write a run's goodput, curves, events and checkpoints as one HTML page."""
    options = parse(ReportOptions, arguments, "report")
    _check_out(options.out)
    from cluster.report_page import render_report
    from pipeline.store import Store

    run = Store(options.run)
    page = render_report(run).encode()
    if options.out is None:
        run.write(REPORT, page)
    else:
        options.out.write_bytes(page)
    say(Console(), f"wrote {_target(run, options.out)}")
    return 0


def _check_out(path: Path | None) -> None:
    """Before the work, not after it: whether a page can be written there."""
    if path is None:
        return
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out ({path}) must be the name of an .html file")
    if not path.resolve().parent.is_dir():
        raise UsageError(f"--out ({path}) must be in a folder that exists; make {path.resolve().parent}")


def _target(run: Store, out: Path | None) -> str:
    return f"{run}/{REPORT}" if out is None else str(out)
