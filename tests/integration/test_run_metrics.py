"""What Ray exports for Prometheus on a real, local Ray, and whether the Grafana dashboard asks for just that."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "docs/grafana/tarmac.json").read_text())
RUN = 's3://bucket/runs/b "quoted"'

# A driver with what it hears: two looks at a run of two steps. It tells where Ray exports, and stays until it is told.
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
    print(ray.nodes()[0]["MetricsExportPort"], flush=True)
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


def scrape(port: int) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Samples by name, as Prometheus would read them."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        found: dict[str, list[tuple[dict[str, str], float]]] = {}
        for sample in (sample for family in families for sample in family.samples):
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
        return found


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
            assert driver.stdout is not None
            port = int(driver.stdout.readline())
            wanted, found = names_in(DASHBOARD), scrape(port)
            deadline = time.monotonic() + 30
            while not wanted <= set(found) and time.monotonic() < deadline:
                time.sleep(0.5)
                found = scrape(port)
        finally:
            driver.communicate(timeout=30)
    assert driver.returncode == 0
    assert wanted == {f"ray_tarmac_{name}" for name in EXPECTED}
    for name, value in EXPECTED.items():
        ((labels, exported),) = found[f"ray_tarmac_{name}"]
        assert (labels["run"], exported) == (RUN, value), name


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
