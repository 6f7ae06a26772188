"""What Ray exports for Prometheus on a real, local Ray, and whether the Grafana dashboard asks for just that."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scraping import scrape_until

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "docs/grafana/tarmac.json").read_text())
RUN = 's3://bucket/runs/b "quoted"'

# A driver with what it hears: nothing until it is told to go on, then two looks at a run of two steps. It tells where
# Ray exports, and stays until it is told.
DRIVER = """
import sys, ray
from cluster.ray_access import open_ray
from cluster.relay import News
from cluster.run_metrics import RunMetrics

def record(step, **changes):
    return {"step": step, "epoch": step / 4, "loss": 2.5 / step, "lr": 1e-3, "images_per_s": 100.0, "step_s": 1.0,
            "data_wait_s": 0.25, "skipped": False} | changes

with open_ray(num_cpus=1):
    metrics = RunMetrics(sys.argv[1])
    print(ray.nodes()[0]["MetricsExportPort"], flush=True)
    sys.stdin.readline()
    metrics.take(News(events=[
        {"event": "asked", "reason": "first"}, {"event": "placed", "num_workers": 3},
        {"event": "notice"}, {"event": "lost", "error": "e"}, {"event": "ended", "outcome": "lost"},
        {"event": "asked", "reason": "restart"}, {"event": "placed", "num_workers": 2},
    ]))
    metrics.take(News(
        records=[record(1, step_s=3.0), record(2, images_per_s=500.0, skipped=True, data_wait_s=0.75)],
        events=[{"event": "save", "step": 1, "stall_s": 0.25, "seconds": 9},
                {"event": "save", "step": 2, "stall_s": 0.5, "seconds": 9}, {"event": "quarantined"}]))
    metrics.take(News())
    metrics.take(News(records=[record(3, loss=float("nan"), skipped=True)]))
    sys.stdin.read()
"""

EXPECTED = {
    "step": 3.0,
    "epoch": 0.75,
    "loss": 1.25,  # of step 2: that of step 3 is no number
    "learning_rate": 1e-3,
    "images_per_second": 100.0,
    "data_wait_ratio": 0.25,
    "workers": 2.0,
    "checkpoints_total": 2.0,
    "checkpoint_stall_seconds_total": 0.75,
    "preemption_notices_total": 1.0,
    "restarts_total": 1.0,
    "skipped_steps_total": 2.0,
    "quarantined_samples_total": 1.0,
}


def names_in(dashboard: dict[str, Any]) -> set[str]:
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [
        variable["query"]["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"
    ]
    return {name for query in queries for name in re.findall(r"\bray_\w+", query)}


@pytest.mark.ray
def test_prometheus_finds_what_the_dashboard_asks_for() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_metrics_report_interval_ms": "500"}
    command = [sys.executable, "-c", DRIVER, RUN]
    with subprocess.Popen(command, env=environment, stdin=-1, stdout=-1, text=True, cwd=ROOT) as driver:
        try:
            assert driver.stdin is not None
            assert driver.stdout is not None
            port = int(driver.stdout.readline())
            # A series that begins at 1 has no increase: Prometheus must have seen the 0.
            counters = {f"ray_tarmac_{name}": 0.0 for name in EXPECTED if name.endswith("_total")}
            at_first = scrape_until(port, RUN, lambda found: counters.keys() <= found.keys())
            assert counters.items() <= at_first.items(), at_first
            driver.stdin.write("go on\n")
            driver.stdin.flush()
            expected = {f"ray_tarmac_{name}": value for name, value in EXPECTED.items()}
            found = scrape_until(port, RUN, lambda found: expected.items() <= found.items())
        finally:
            driver.communicate(timeout=30)
    assert driver.returncode == 0
    assert expected.items() <= found.items(), found
    assert names_in(DASHBOARD) == set(expected)


class Vector(dict[str, float]):
    """Values by series, with PromQL's `-` and, as `|`, its `or`; Python's precedence of the two is the same."""

    def __sub__(self, other: Vector) -> Vector:
        return Vector({name: self[name] - other[name] for name in self.keys() & other.keys()})

    def __or__(self, other: Vector) -> Vector:  # type: ignore[override]
        return Vector({**other, **self})


def value_of(query: str, scrapes: dict[str, dict[int, float]], at_s: int, window_s: int) -> float | None:
    """What a counting query of the dashboard gives for one run's series; None is no answer.

    Args:
        query: only has last_over_time of one metric, `-`, `or`, and the sum over the run's series.
        scrapes: of each series, the values by time.
        at_s: when it is asked.
        window_s: what Grafana puts in the place of its variables.
    """
    query = re.sub(r"\$__(rate_interval|range)", f"{window_s}s", query).replace("[1h]", "[3600s]")
    last = r"last_over_time\(ray_tarmac_\w+\{[^}]*\}\[(\d+)s\](?: offset (\d+)s)?\)"
    python = re.sub(last, lambda match: f"last({match[1]}, {match[2] or 0})", query)
    python = python.replace(" or ", " | ").removeprefix("sum by (run) ")
    assert re.fullmatch(r"(?:[() |,0-9-]|last)+", python), python

    def last_over_time(over_s: int, offset_s: int) -> Vector:
        ends = at_s - offset_s
        inside = {name: [t for t in times if ends - over_s < t <= ends] for name, times in scrapes.items()}
        return Vector({name: scrapes[name][max(times)] for name, times in inside.items() if times})

    found: Vector = eval(python, {"last": last_over_time})
    return sum(found.values()) if found else None


COUNTS = [
    target["expr"]
    for panel in DASHBOARD["panels"]
    for target in panel["targets"]
    if "_total" in target["expr"] and "rate(" not in target["expr"]
]
QUARTER_S, MINUTE_S, HOUR_S = 15, 60, 3600


@pytest.mark.parametrize("query", COUNTS)
def test_the_dashboard_counts_every_event_once(query: str) -> None:
    """Two drivers, whose processes have series of their own: one counts from 0 and dies, one begins with a restart."""
    first = {t: float(t >= 300) + 2 * (t >= 600) for t in range(0, 900, QUARTER_S)}
    second = {
        t: 1.0 + (t >= 1500) for t in range(1005, 2000, QUARTER_S) if not 1200 < t < 1290
    }  # it was not seen there
    scrapes = {"first": first, "second": second}
    minutes = {t: value_of(query, scrapes, t, MINUTE_S) for t in range(MINUTE_S, 2040, MINUTE_S)}
    assert {t: count for t, count in minutes.items() if count} == {300: 1, 600: 2, 1020: 1, 1500: 1}
    assert value_of(query, scrapes, 2000, 2 * HOUR_S) == 5
    assert value_of(query, scrapes, 2000, 1200) == 2  # first is at its end, second from its begin
    assert value_of(query, {}, 2000, HOUR_S) is None


def test_no_count_of_the_dashboard_is_an_increase() -> None:
    """Which begins with a series' second value."""
    assert len(COUNTS) == 6
    assert "increase(" not in json.dumps(DASHBOARD)


def test_the_dashboard_is_whole() -> None:
    """Against Grafana's dashboard schema, as its foundation SDK has it, in the points that matter for an import."""
    assert DASHBOARD["schemaVersion"] >= 36
    assert "id" not in DASHBOARD  # given by Grafana
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["run"]["datasource"]["uid"] == "${datasource}"
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["type"] in ("timeseries", "stat")
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"]
            assert '{run=~"$run"}' in target["expr"]
