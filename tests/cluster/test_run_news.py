"""What `submit --wait` hears of a run from its bucket."""

import io
import math

from rich.console import Console
from run_folders import NOW, record, write_lines

from cluster.progress import RunProgress
from cluster.run_news import RunNews
from pipeline.store import Store


def test_records_and_events_are_told_once_in_order_and_history_is_not(tmp_path):
    run = Store(str(tmp_path))
    for attempt in (1, 2):
        write_lines(run, attempt, "events.jsonl", [{"event": "start", "step": 0, "world_size": 1, "time": NOW}])
        for part in range(3):
            write_lines(run, attempt, f"metrics-{part:06d}.jsonl", [record(10 * attempt + part)])
    news = RunNews(run)
    first = news.take()
    assert [item["step"] for item in first.records] == [22]
    assert [event["event"] for event in first.events] == ["attempt"]
    assert news.take().events == []
    write_lines(run, 2, "metrics-000003.jsonl", [record(23), record(24)])
    write_lines(run, 2, "driver.jsonl", [{"event": "lost", "error": "gone", "detected": "silence", "time": NOW}])
    write_lines(run, 3, "events.jsonl", [{"event": "start", "step": 20, "world_size": 2, "time": NOW + 1}])
    write_lines(run, 3, "metrics-000000.jsonl", [record(21)])
    later = news.take()
    assert [item["step"] for item in later.records] == [23, 24, 21]
    assert [(event["event"], event.get("error")) for event in later.events] == [("lost", "gone"), ("attempt", None)]
    assert news.take().records == []


def test_a_run_that_has_not_begun_has_no_news(tmp_path):
    news = RunNews(Store(str(tmp_path / "none")))
    assert news.take().records == []
    write_lines(Store(str(tmp_path / "none")), 1, "metrics-000000.jsonl", [record(1), record(2)])
    assert [item["step"] for item in news.take().records] == [1, 2]


def test_a_step_whose_loss_was_not_finite_is_shown(tmp_path):
    """The bucket has null for it."""
    run, out = Store(str(tmp_path)), io.StringIO()
    write_lines(run, 1, "metrics-000000.jsonl", [record(7) | {"loss": None, "grad_norm": None, "skipped": True}])
    news = RunNews(run).take()
    assert math.isnan(news.records[0]["loss"])
    with RunProgress(Console(file=out, width=200, force_terminal=False), num_steps=20) as progress:
        progress.show(news)
    assert "step 7 was skipped: loss nan, gradient norm nan" in out.getvalue()
    assert "loss nan" in out.getvalue().splitlines()[-1]  # the progress line
