"""A run's numbers for Prometheus, through Ray: it exports them on every node beside its own, as `ray_tarmac_...`."""

from __future__ import annotations

import math
from typing import Any

from ray.util.metrics import Counter, Gauge

from cluster.relay import News

_TAGS = ("run",)


class RunMetrics:
    """Follows a run from what the driver hears of it. Lives in a process that has joined a Ray cluster.

    Counters begin at 0 with this process, each a time series of its own; a run's ledger has the whole.

    Args:
        run: the run's URL without user, password and query, as `str(store)` gives it: the tag of all metrics.
    """

    def __init__(self, run: str) -> None:
        self._gauges = {name: Gauge(f"tarmac_{name}", text, _TAGS) for name, text in _GAUGES.items()}
        self._values: dict[str, float] = {}
        self._counters = {name: Counter(f"tarmac_{name}", text, _TAGS) for name, text in _COUNTERS.items()}
        for metric in (*self._gauges.values(), *self._counters.values()):
            metric.set_default_tags({"run": run})
        for counter in self._counters.values():
            # A series that begins at its first event hides it: Prometheus' `increase` sees no step from 0. `inc` takes
            # no 0, what is under it does.
            counter._record(0.0)

    def take(self, news: News) -> None:
        """Take what came in since the last call."""
        if news.records:
            self._take_records(news.records)
        for event in news.events:  # after the records: workers that were lost train no more, whatever came in of theirs
            self._take_event(event)
        for name, value in self._values.items():
            self._gauges[name].set(value)  # Ray exports a gauge that is not set again only once

    def _take_records(self, records: list[dict[str, Any]]) -> None:
        last = records[-1]
        step_s = sum(float(record["step_s"]) for record in records)
        self._set("step", last["step"])
        self._set("epoch", last["epoch"])
        self._set("loss", last["loss"])
        self._set("learning_rate", last["lr"])
        if step_s > 0:
            # All images of these steps over all their time: the mean of their speeds would weigh fast steps more.
            images = sum(float(record["images_per_s"]) * float(record["step_s"]) for record in records)
            self._set("images_per_second", images / step_s)
            self._set("data_wait_ratio", sum(float(record["data_wait_s"]) for record in records) / step_s)
        self._add("skipped_steps_total", sum(record["skipped"] for record in records))

    def _take_event(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "save":
            self._add("checkpoints_total", 1)
            self._add("checkpoint_stall_seconds_total", event["stall_s"])
        elif kind == "placed":
            self._set("workers", event["num_workers"])
        elif kind in ("lost", "ended"):
            for name in ("workers", "images_per_second", "data_wait_ratio"):
                self._set(name, 0)
        elif kind == "notice":
            self._add("preemption_notices_total", 1)
        elif kind == "quarantined":
            self._add("quarantined_samples_total", 1)
        elif kind == "asked" and event["reason"] != "first":
            self._add("restarts_total", 1)

    def _set(self, name: str, value: float) -> None:
        if math.isfinite(value):
            self._values[name] = float(value)

    def _add(self, name: str, amount: float) -> None:
        if amount > 0:  # Ray refuses 0
            self._counters[name].inc(float(amount))


_GAUGES = {
    "step": "Completed optimizer updates.",
    "epoch": "Passes over the dataset.",
    "loss": "Mean over the removed patches of the last step's images.",
    "learning_rate": "Of the last step.",
    "images_per_second": "Trained on, over all workers.",
    "data_wait_ratio": "Share of the steps' time that the model waited for images.",
    "workers": "Workers that train, or are being started.",
}

_COUNTERS = {
    "checkpoints_total": "Committed checkpoints.",
    "checkpoint_stall_seconds_total": "Time that training stood still for checkpoints.",
    "preemption_notices_total": "Notices that a node goes away.",
    "restarts_total": "Attempts after the run's first.",
    "skipped_steps_total": "Updates that were not made: loss or gradient were not finite, or a spike.",
    "quarantined_samples_total": "Damaged samples that were replaced.",
}
