"""The ledger of real training: one attempt that fails after a checkpoint, and one that finishes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from cluster.ledger import read_ledger
from pipeline.loader import Batch
from pipeline.store import Store
from tests.trainer.tiny_runs import tiny_config, train_attempt

NAP_S = 0.02


def late(batch: Batch) -> Batch:
    time.sleep(NAP_S)
    return batch


def broken(batch: Batch) -> Batch:
    if batch.step == 13:
        raise ZeroDivisionError
    return batch


def test_the_ledger_of_a_run_that_fails_and_goes_on(tmp_path: Path) -> None:
    config = tiny_config(num_steps=24, every_steps=8, log_every_steps=1)
    before = time.time()
    with pytest.raises(ZeroDivisionError):
        train_attempt(str(tmp_path), config, attempt=1, change=broken)
    train_attempt(str(tmp_path), config, attempt=2, change=late)
    after = time.time()

    ledger = read_ledger(Store(str(tmp_path)))
    first, second = ledger.rows
    assert before <= first.edges[0] < second.edges[-1] <= after
    assert sum(ledger.seconds.values()) == pytest.approx(ledger.wall_s, abs=1e-6)
    parts = sorted((tmp_path / "attempts/0001").glob("metrics-*.jsonl"))
    times = [json.loads(line)["time"] for part in parts for line in part.read_text().splitlines()]
    events = (tmp_path / "attempts/0001/events.jsonl").read_text().splitlines()
    end = max(times[-1], json.loads(events[-1])["time"])  # a save of before may be told after the last step
    assert first.seconds["lost_work"] == pytest.approx(end - times[7], abs=1e-5)  # steps 9 to 13 are done again
    assert second.seconds["lost_work"] == 0
    assert first.seconds["training"] > 0
    assert second.seconds["data_wait"] >= 16 * NAP_S
    assert second.seconds["saving"] > 0
    assert (first.facts.outcome, second.facts.outcome) == (None, "finished")
    assert (first.facts.last_step, second.facts.last_step) == (13, 24)
