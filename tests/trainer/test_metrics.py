"""Step records and events: whole parts, nothing lost, the latest attempt's word."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import StoreError
from pipeline.store import Store
from trainer.metrics import (
    EventLog,
    MetricsWriter,
    RunLog,
    StepRecord,
    next_attempt,
    read_events,
    read_metrics,
)

NEVER_S = 3600.0


def record(step: int, loss: float = 1.0) -> StepRecord:
    return StepRecord(
        step=step,
        epoch=step / 7,
        samples_seen=step * 8,
        loss=loss,
        lr=1e-3 / 3,
        grad_norm=math.pi,
        images_per_s=100.0,
        data_wait_s=0.05,
        fetch_wait_s=0.02,
        decode_wait_s=0.03,
        copy_s=0.05,
        model_s=0.1,
        step_s=0.2,
        time=1.7e9,
        sample_ids_digest="00ff00ff00ff00ff",
    )


def write_attempt(run: Store, attempt: int, steps: range, loss: float) -> None:
    writer = MetricsWriter(run.child(f"attempts/{attempt:04d}"), NEVER_S)
    writer.add(record(step, loss) for step in steps)
    writer.close()


@pytest.fixture
def run(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


class FlakyStore(Store):
    """A real store whose writes fail while `down` is set."""

    down = False

    def write(self, path: str, data: bytes) -> None:
        if self.down:
            raise StoreError("the network is away")
        super().write(path, data)


def test_records_come_back_to_the_last_bit(run: Store) -> None:
    losses = [0.1 + 0.2, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 123456789.123456789]
    writer = MetricsWriter(run.child("attempts/0001"), NEVER_S)
    writer.add(record(step, loss) for step, loss in enumerate(losses, 1))
    writer.close()
    assert [r["loss"].hex() for r in read_metrics(run)] == [loss.hex() for loss in losses]
    assert read_metrics(run) == [record(step, loss) for step, loss in enumerate(losses, 1)]


def test_parts_are_numbered_and_hold_one_flat_record_a_line(run: Store) -> None:
    writer = MetricsWriter(run.child("attempts/0001"), NEVER_S)
    writer.add([record(1), record(2)])
    writer.flush()
    writer.flush()
    writer.add([record(3)])
    writer.close()
    assert [entry.path for entry in run.list()] == [
        "attempts/0001/metrics-000000.jsonl",
        "attempts/0001/metrics-000001.jsonl",
    ]
    lines = run.read("attempts/0001/metrics-000000.jsonl").decode().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert not any(isinstance(value, (dict, list)) for value in json.loads(lines[0]).values())


def test_the_clock_writes_without_being_asked(run: Store) -> None:
    writer = MetricsWriter(run.child("attempts/0001"), 0.02)
    writer.add([record(1)])
    deadline = time.monotonic() + 10
    while not read_metrics(run) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [r["step"] for r in read_metrics(run)] == [1]
    writer.close()


def test_the_latest_attempt_has_the_word_on_a_step(run: Store) -> None:
    write_attempt(run, 1, range(1, 8), loss=1.0)
    write_attempt(run, 2, range(5, 7), loss=2.0)
    write_attempt(run, 10, range(6, 9), loss=10.0)
    found = {r["step"]: r["loss"] for r in read_metrics(run)}
    assert found == {1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 2.0, 6: 10.0, 7: 10.0, 8: 10.0}
    assert list(found) == sorted(found)


def test_records_wait_for_a_store_that_is_away(tmp_path: Path) -> None:
    attempt = FlakyStore(f"{tmp_path}/attempts/0001")
    writer = MetricsWriter(attempt, NEVER_S)
    writer.add([record(1)])
    attempt.down = True
    with pytest.raises(StoreError):
        writer.flush()
    writer.add([record(2)])
    attempt.down = False
    writer.close()
    assert [r["step"] for r in read_metrics(Store(str(tmp_path)))] == [1, 2]


def test_events_wait_for_a_store_that_is_away(tmp_path: Path) -> None:
    attempt = FlakyStore(f"{tmp_path}/attempts/0001")
    events = EventLog(attempt)
    attempt.down = True
    events.add("start", step=0)
    with pytest.raises(StoreError):
        events.close()
    attempt.down = False
    events.add("stop", step=5)
    events.close()
    assert [event["event"] for event in read_events(Store(str(tmp_path)))] == ["start", "stop"]


def test_a_second_writer_of_an_attempt_goes_on_after_the_first(run: Store) -> None:
    attempt = run.child("attempts/0001")
    for step in (1, 2):
        write_attempt(run, 1, range(step, step + 1), loss=1.0)
        EventLog(attempt).add("save", step=step)
    assert [r["step"] for r in read_metrics(run)] == [1, 2]
    assert [event["step"] for event in read_events(run)] == [1, 2]


def test_events_of_all_attempts_in_their_order(run: Store) -> None:
    before = time.time()
    for attempt in (2, 10, 1):
        EventLog(run.child(f"attempts/{attempt:04d}")).add("start", step=attempt)
    events = read_events(run)
    assert [(event["attempt"], event["event"], event["step"]) for event in events] == [
        (1, "start", 1),
        (2, "start", 2),
        (10, "start", 10),
    ]
    assert all(before <= event["time"] <= time.time() for event in events)


def test_leaving_the_log_writes_everything_even_on_an_error(run: Store) -> None:
    told: list[Any] = []

    def fail() -> None:
        with RunLog(run.child("attempts/0001"), NEVER_S, told.append) as log:
            log.records([record(1), record(2)])
            log.event("start")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [r["step"] for r in told] == [r["step"] for r in read_metrics(run)] == [1, 2]
    assert len(read_events(run)) == 1


def test_attempts_are_counted(run: Store) -> None:
    assert next_attempt(run) == 1
    write_attempt(run, 9, range(1, 2), loss=1.0)
    EventLog(run.child("attempts/0010")).add("start")
    assert next_attempt(run) == 11


def test_an_empty_run_has_nothing_to_read(run: Store) -> None:
    assert read_metrics(run) == []
    assert read_events(run) == []
