"""A run's numbers for Prometheus, by what is recorded with Ray's own metric classes; no Ray runs."""

from __future__ import annotations

from typing import Any

import pytest
from ray.util.metrics import Metric

from cluster.relay import News
from cluster.run_metrics import RunMetrics

RECORD = {
    "step": 4,
    "epoch": 1.0,
    "loss": 0.5,
    "lr": 1e-3,
    "images_per_s": 100.0,
    "step_s": 2.0,
    "data_wait_s": 0.5,
    "skipped": False,
}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """By metric, all values that Ray was given."""
    values: dict[str, list[float]] = {}

    def record(metric: Metric, value: float, tags: Any = None) -> None:
        values.setdefault(metric.info["name"].removeprefix("tarmac_"), []).append(value)

    monkeypatch.setattr(Metric, "_record", record)
    return values


def test_every_counter_is_there_with_0_before_anything_has_happened(recorded: dict[str, list[float]]) -> None:
    RunMetrics("s3://bucket/run")
    assert len(recorded) == 6
    assert {name for name, values in recorded.items() if values == [0.0]} == set(recorded)
    assert all(name.endswith("_total") for name in recorded)


def test_a_first_event_is_a_step_from_0(recorded: dict[str, list[float]]) -> None:
    RunMetrics("s3://bucket/run").take(
        News(events=[{"event": "asked", "reason": "resume"}, {"event": "notice"}, {"event": "quarantined"}])
    )
    for name in ("restarts_total", "preemption_notices_total", "quarantined_samples_total"):
        assert recorded[name] == [0.0, 1.0], name


@pytest.mark.parametrize("event", [{"event": "lost", "error": "e"}, {"event": "ended", "outcome": "moved"}])
def test_a_run_without_workers_has_no_speed(event: dict[str, Any], recorded: dict[str, list[float]]) -> None:
    """Also where the last records of the lost workers come in with the word of their loss."""
    metrics = RunMetrics("s3://bucket/run")
    metrics.take(News(events=[{"event": "placed", "num_workers": 2}]))
    metrics.take(News(records=[RECORD]))
    before = {name: recorded[name][-1] for name in ("workers", "images_per_second", "data_wait_ratio")}
    metrics.take(News(records=[RECORD | {"step": 5}], events=[event]))
    assert before == {"workers": 2, "images_per_second": 100, "data_wait_ratio": 0.25}
    assert {name: recorded[name][-1] for name in before} == dict.fromkeys(before, 0)
    assert recorded["step"][-1] == 5
