"""`tarmac report`: a run as one HTML page that needs nothing but itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from cluster.options import check_file, parse, say

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
    if options.out is not None:
        check_file("out", options.out, ".html")
    from cluster.report_page import render_report
    from pipeline.store import Store

    run = Store(options.run)
    page = render_report(run).encode()
    if options.out is None:
        run.write(REPORT, page)
    else:
        options.out.write_bytes(page)
    say(Console(), f"wrote {options.out or f'{run}/{REPORT}'}")
    return 0
