"""What a run leaves to read: one flat record a step and the events of each attempt, as JSON lines."""

from __future__ import annotations

import json
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypedDict, cast

from pipeline.errors import StoreError
from pipeline.store import Store

log = logging.getLogger(__name__)

ATTEMPTS = "attempts"
EVENTS = "events.jsonl"
DRIVER_EVENTS = "driver.jsonl"
"""What an attempt's driver tells, beside what its rank 0 does: one writer a file."""
NUM_READS = 16

_PART = re.compile(rf"{ATTEMPTS}/(\d+)/metrics-(\d+)\.jsonl")
_EVENTS = re.compile(rf"{ATTEMPTS}/(\d+)/(?:{re.escape(EVENTS)}|{re.escape(DRIVER_EVENTS)})")


class StepRecord(TypedDict):
    """The numbers of one optimizer step. Floats survive JSON to the last bit."""

    step: int
    """Completed optimizer updates, this one included: the first record's is 1."""
    epoch: float
    """Passes over the dataset so far."""
    samples_seen: int
    loss: float
    """Mean over the step's images, before the update. Not a number in some skipped steps; JSON has null there."""
    lr: float
    grad_norm: float
    """2-norm of the gradient over all parameters, before it is clipped; as `loss` where it is not finite."""
    skipped: bool
    """The update was not made: loss or gradient were not finite, or a spike. An event says which samples it had."""
    images_per_s: float
    data_wait_s: float
    """Time that the model waited for its images: `fetch_wait_s + decode_wait_s`.

    This and the times below are those of the rank that waited longest in this step: the others wait for it in the
    collectives, and would show its wait as their model's time.
    """
    fetch_wait_s: float
    """The part of `data_wait_s` before the bytes had arrived."""
    decode_wait_s: float
    """The rest of it: the bytes were there, the pixels were not."""
    copy_s: float
    """Host time to hand the batches to the device. On a GPU the copies themselves go on while the host does not wait,
    and what they cost is part of `model_s`."""
    model_s: float
    """The rest of the step: forward, backward, the collectives with their waits for other ranks, the update."""
    step_s: float
    """`data_wait_s + copy_s + model_s`."""
    time: float
    """When the step ended, in seconds since 1970."""
    sample_ids_digest: str
    """Of the images trained on, whatever their order and the world size: see `trainer.step_numbers`."""


Event = dict[str, Any]
"""Has `event` (its kind), `time` (seconds since 1970) and whatever belongs to the kind."""


def attempt_directory(attempt: int) -> str:
    """Directory of an attempt, from the run's URL."""
    return f"{ATTEMPTS}/{attempt:04d}"


def next_attempt(run: Store) -> int:
    """The number of the run's next attempt, from 1."""
    numbers = (re.match(rf"{ATTEMPTS}/(\d+)/", entry.path) for entry in run.list(ATTEMPTS))
    return 1 + max((int(number[1]) for number in numbers if number), default=0)


class MetricsWriter:
    """Writes an attempt's step records as numbered parts, every `flush_s` seconds and on `flush` and `close`.

    An object store cannot append. A part is written whole by a thread of its own, so a slow store does not slow
    training; records that it refuses are kept and tried again.
    """

    def __init__(self, attempt: Store, flush_s: float) -> None:
        self._attempt = attempt
        self._waiting: list[str] = []
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._num_parts = sum(entry.path.startswith("metrics-") for entry in attempt.list())
        self._closed = threading.Event()
        self._clock = threading.Thread(target=self._tick, args=(flush_s,), name="metrics", daemon=True)
        self._clock.start()

    def add(self, records: Iterable[StepRecord]) -> None:
        """Queue records."""
        lines = [_to_json(record) for record in records]
        with self._lock:
            self._waiting += lines

    def flush(self) -> None:
        """Write what is queued. Raises StoreError; the records then stay queued."""
        with self._writing:
            with self._lock:
                lines = list(self._waiting)
            if not lines:
                return
            name = f"metrics-{self._num_parts:06d}.jsonl"
            self._attempt.write(name, _join(lines))
            self._num_parts += 1
            with self._lock:
                del self._waiting[: len(lines)]

    def close(self) -> None:
        """Stop the clock and write the rest. Raises StoreError."""
        self._closed.set()
        self._clock.join()
        self.flush()

    def _tick(self, flush_s: float) -> None:
        while not self._closed.wait(flush_s):
            try:
                self.flush()
            except StoreError as error:
                log.warning("step records wait for the store: %s", error)


class EventLog:
    """An attempt's events, in one file that is written anew with each of them: they are few.

    One log at a time may write a file; a new one goes on after the last.
    """

    def __init__(self, attempt: Store, name: str = EVENTS) -> None:
        self._attempt, self._name = attempt, name
        self._lines = attempt.read(name).decode().splitlines() if attempt.exists(name) else []
        self._num_written = len(self._lines)

    def add(self, kind: str, **fields: Any) -> None:
        """Write an event; if the store does not take it, it goes with the next one or at `close`."""
        self.add_all([{"event": kind, **fields}])

    def add_all(self, events: Iterable[Event]) -> None:
        """Write several events at once, each with its `event` and fields."""
        now = time.time()
        self._lines += [_to_json({"event": event["event"], "time": now, **event}) for event in events]
        try:
            self._write()
        except StoreError as error:
            log.warning("events wait for the store: %s", error)

    def close(self) -> None:
        """Write what the store refused before. Raises StoreError."""
        self._write()

    def _write(self) -> None:
        if self._num_written < len(self._lines):
            self._attempt.write(self._name, _join(self._lines))
            self._num_written = len(self._lines)


class RunLog:
    """Everything that one attempt tells: step records to the run and to `on_metrics`, events likewise.

    A context manager; leaving it writes what is queued. Only rank 0 has one that writes.
    """

    def __init__(
        self,
        attempt: Store,
        flush_s: float,
        on_metrics: Callable[[StepRecord], None],
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> None:
        self._metrics = MetricsWriter(attempt, flush_s)
        self._events = EventLog(attempt)
        self._on_metrics, self._on_event = on_metrics, on_event

    def records(self, records: Iterable[StepRecord]) -> None:
        """Step records, oldest first."""
        records = list(records)
        self._metrics.add(records)
        for record in records:
            self._on_metrics(record)

    def event(self, kind: str, **fields: Any) -> None:
        """One event."""
        self.events([{"event": kind, **fields}])

    def events(self, events: Iterable[Event]) -> None:
        """Several events."""
        if events := list(events):
            self._events.add_all(events)
            for event in events:
                self._on_event(event)

    def flush(self) -> None:
        """Write the queued step records now. Raises StoreError."""
        self._metrics.flush()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            try:
                self._metrics.close()
            finally:
                self._events.close()
        except StoreError as lost:
            if error is None:
                raise
            log.warning("the last records of this attempt are lost: %s", lost)


class SilentLog(RunLog):
    """The log of every rank but 0: writes nothing."""

    def __init__(self) -> None:
        pass

    def records(self, records: Iterable[StepRecord]) -> None:
        """Drop them."""

    def event(self, kind: str, **fields: Any) -> None:
        """Drop it."""

    def events(self, events: Iterable[Event]) -> None:
        """Drop them."""

    def flush(self) -> None:
        """Nothing to do."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


def read_metrics(run: Store) -> list[StepRecord]:
    """The step records of a run in the order of their steps; of a step done twice, the latest attempt's."""
    by_step: dict[int, StepRecord] = {}
    for _, records in _read_lines(run, _PART):
        by_step.update({record["step"]: with_nan(record) for record in records})
    return [by_step[step] for step in sorted(by_step)]


def read_events(run: Store) -> list[Event]:
    """The events of all attempts, each with its `attempt`: by attempt, and within one in the order of their times."""
    found = [{**event, "attempt": attempt} for (attempt, *_), events in _read_lines(run, _EVENTS) for event in events]
    return sorted(found, key=lambda event: (event["attempt"], event["time"]))


def _to_json(record: Mapping[str, Any]) -> str:
    """JSON has no word for what is not finite."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }
    return json.dumps(finite)


def with_nan(record: dict[str, Any]) -> StepRecord:
    """A step record as it was before JSON, which has null for what is not finite."""
    return cast(StepRecord, {name: math.nan if value is None else value for name, value in record.items()})


def list_parts(run: Store) -> list[tuple[int, str]]:
    """Attempt and path of every part of the step records, in the order in which they were written."""
    return [(attempt, path) for (attempt, *_), path in _find(run, _PART)]


def _find(run: Store, name: re.Pattern[str]) -> list[tuple[tuple[int, ...], str]]:
    """The numbers in the name, and the path, of every file of the attempts that is called so, in number order."""
    matches = {entry.path: match for entry in run.list(ATTEMPTS) if (match := name.fullmatch(entry.path))}
    return sorted((tuple(int(group) for group in match.groups()), path) for path, match in matches.items())


def _read_lines(run: Store, name: re.Pattern[str]) -> list[tuple[tuple[int, ...], list[Any]]]:
    """The numbers in the name, and the lines, of every file of the attempts that is called so, in number order."""
    found = _find(run, name)
    with ThreadPoolExecutor(NUM_READS) as pool:
        texts = pool.map(run.read, [path for _, path in found])
        return [
            (key, [json.loads(line) for line in text.splitlines()]) for (key, _), text in zip(found, texts, strict=True)
        ]


def _join(lines: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()
