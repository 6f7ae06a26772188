"""What the report and the console say of notices and of waiting."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from cluster.progress import RunProgress
from cluster.relay import News
from cluster.report_events import tell_events
from tests.console_lines import strange_lines

WAITING = {"event": "waiting", "need": {"CPU": 8.0}, "have": {"CPU": 16.0}}


def told(event: dict[str, Any]) -> str:
    (line,) = tell_events([{"time": 1.0, "attempt": 1, **event}])
    return line.text


def shown(event: dict[str, Any]) -> str:
    out = io.StringIO()
    with RunProgress(Console(file=out, width=300), num_steps=10) as progress:
        progress.show(News(events=[event]))
    return out.getvalue()


@pytest.mark.parametrize(
    ("action", "in_report", "on_console"),
    [
        ("move", "saved, and moved away", "going on without it"),
        ("save", "goes away; saved", "and going on"),
        ("stop", "saved and stopped: the driver was on it", "stopping: the driver is on it"),
    ],
)
def test_a_notice_says_what_is_done(action: str, in_report: str, on_console: str) -> None:
    notice = {"event": "notice", "node": "n" * 56, "source": "ec2", "deadline": None, "action": action}
    assert told(notice).startswith(f"notice (ec2): node {'n' * 56}")
    assert told(notice).endswith(in_report)
    assert on_console in shown(notice)
    assert "without it" not in shown(notice) or action == "move"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "the workers need 8 CPU, the nodes that stay have 16 CPU"),  # as older runs have it
        ({"num_fitting": 1, "num_least": 2, "retry_s": 0.0}, "with room for 1 of 2 workers beside what else runs"),
        ({"num_fitting": 2, "num_least": 2, "retry_s": 41.6}, "Ray found no place for them there, and is asked again"),
    ],
)
def test_waiting_says_for_what(fields: dict[str, Any], text: str) -> None:
    assert text in told(WAITING | fields)
    assert text in shown(WAITING | fields)
    assert strange_lines(shown(WAITING | fields)) == []
