"""What Prometheus would read from a node of Ray."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable

from prometheus_client.parser import text_string_to_metric_families

_TIMEOUT_S = 60.0
_POLL_S = 0.5


def scrape(port: int, run: str) -> dict[str, float]:
    """The numbers of a run, by metric, which must be there once each.

    Args:
        port: on which the node exports, on this machine.
        run: the label of the metrics.
    """
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        samples = [sample for family in families for sample in family.samples if sample.labels.get("run") == run]
    found = {sample.name: sample.value for sample in samples}
    assert len(found) == len(samples), samples
    return found


def scrape_until(port: int, run: str, is_it: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    """Scrape until it is what is waited for, or a minute has passed; the last answer."""
    deadline = time.monotonic() + _TIMEOUT_S
    while not is_it(found := scrape(port, run)) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return found
