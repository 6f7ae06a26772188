"""Step records as columns: the same numbers as the records themselves."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
from test_metrics import record

from pipeline.store import Store
from trainer.metrics import MetricsWriter, read_metrics
from trainer.step_columns import latest_columns, read_columns

NAMES = ("step", "time", "step_s", "data_wait_s", "loss", "lr", "images_per_s")


def test_columns_hold_what_the_records_hold_to_the_last_bit(tmp_path: Path) -> None:
    run, chance = Store(str(tmp_path)), random.Random(3)
    for attempt, steps in ((1, range(1, 40)), (2, range(21, 30)), (10, range(25, 60))):
        writer = MetricsWriter(run.child(f"attempts/{attempt:04d}"), 3600.0)
        for step in steps:
            writer.add([record(step, math.nan if step % 7 == 0 else chance.lognormvariate(0, 300))])
            if chance.random() < 0.2:
                writer.flush()
        writer.close()
    attempts = read_columns(run)
    assert {attempt: columns.step.tolist() for attempt, columns in attempts.items()} == {
        1: list(range(1, 40)), 2: list(range(21, 30)), 10: list(range(25, 60))
    }  # fmt: skip
    latest, records = latest_columns(attempts), read_metrics(run)
    for name in NAMES:
        expected = np.array([dict(one)[name] for one in records])
        np.testing.assert_array_equal(getattr(latest, name), expected)


def test_a_run_without_steps_has_no_columns(tmp_path: Path) -> None:
    assert read_columns(Store(str(tmp_path))) == {}
    assert len(latest_columns({})) == 0


def test_fields_that_an_older_run_did_not_write_are_not_numbers(tmp_path: Path) -> None:
    part = tmp_path / "attempts/0001/metrics-000000.jsonl"
    part.parent.mkdir(parents=True)
    part.write_text('{"step": 1, "time": 2, "loss": 3}\n')
    columns = read_columns(Store(str(tmp_path)))[1]
    assert (columns.step.tolist(), columns.time.tolist(), columns.loss.tolist()) == ([1], [2.0], [3.0])
    assert np.isnan(columns.data_wait_s).all()
