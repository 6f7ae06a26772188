"""What a disturbed run has to show: from its records, its events and its weights, read from the bucket.

The order of the samples is computed here from the dataset and the config alone, and their digest by other code than the
trainer's.
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.demo_run import StepError
from cluster.ledger import TRAINING, Ledger
from pipeline import open_dataset
from pipeline.config import DataConfig
from pipeline.store import Store
from trainer.metrics import Event, StepRecord, read_events
from trainer.run_files import read_run

_PART = re.compile(r"attempts/(\d+)/metrics-\d+\.jsonl")
_FOUND = ("lost", "notice", "asked")
"""Events of the driver that say that it has seen what happened."""


@dataclass(frozen=True)
class History:
    """All that a run has written, nothing merged: a step done twice is there twice."""

    records: list[tuple[int, StepRecord]]
    """Attempt and record, in the order of time."""
    events: list[Event]
    data: DataConfig

    @property
    def by_step(self) -> dict[int, StepRecord]:
        """Of each step the record of the latest attempt: the one that the weights come from."""
        return {record["step"]: record for _, record in sorted(self.records, key=lambda pair: pair[0])}

    @property
    def times(self) -> list[float]:
        """When each step ended, those done again included."""
        return [record["time"] for _, record in self.records]


def read_history(run: str) -> History:
    """Read it."""
    store, records = Store(run), list[tuple[int, StepRecord]]()
    for entry in store.list("attempts"):
        if match := _PART.fullmatch(entry.path):
            records += [(int(match[1]), json.loads(line)) for line in store.read(entry.path).splitlines()]
    records.sort(key=lambda pair: pair[1]["time"])
    return History(records, read_events(store), read_run(store).config.data)


def detected_s(history: History, faults: Sequence[float]) -> float | None:
    """From a fault to the first event of the driver that tells of it; the longest. None if nothing tells of one."""
    told = [event["time"] for event in history.events if event["event"] in _FOUND]
    return _longest(_first_after(told, fault, end) for fault, end in _spans(faults))


def again_s(history: History, faults: Sequence[float]) -> float | None:
    """From a fault to the end of the first step of an attempt that began after it; the longest.

    None if no attempt began after one of them: where none was lost, or training did not go on before the next fault.
    """
    waits = []
    for fault, end in _spans(faults):
        struck = max((attempt for attempt, record in history.records if record["time"] <= fault), default=0)
        later = [record["time"] for attempt, record in history.records if attempt > struck]
        waits.append(_first_after(later, fault, end))
    return _longest(waits)


def paused_s(history: History, faults: Sequence[float]) -> float | None:
    """The longest time between the ends of two steps, from the first fault on."""
    times = [time for time in history.times if not faults or time >= faults[0]]
    before = [time for time in history.times if faults and time < faults[0]][-1:]
    times = before + times
    return max((after - time for time, after in itertools.pairwise(times)), default=None)


def saved_s(history: History, faults: Sequence[float]) -> float | None:
    """From a notice to the checkpoint that the next attempt began from; the longest. None if one led to none."""
    starts = {event["step"] for event in history.events if event["event"] == "start"}
    saves = [event["time"] for event in history.events if event["event"] == "save" and event["step"] in starts]
    return _longest(_first_after(saves, fault, end) for fault, end in _spans(faults))


def steps_lost(history: History) -> int:
    """Steps that were done again.

    A step whose record was not yet in the bucket when rank 0 was killed is not seen: at most those of `log.flush_s`.
    """
    return len(history.records) - len({record["step"] for _, record in history.records})


def steps_beside_save(history: History, fault: float, cadence: int) -> int:
    """Steps that were trained beside the save that a fault struck: a save begins after each `cadence` steps."""
    struck = max(attempt for attempt, record in history.records if record["time"] <= fault)
    return max(record["step"] for attempt, record in history.records if attempt == struck) % cadence


def samples_wrong(history: History, dataset: str, num_steps: int) -> int:
    """Samples of steps that trained on other ones than the order says, or on none: lost or repeated, or both."""
    expected, found, opened = 0, history.by_step, open_dataset(dataset)
    for step in range(1, num_steps + 1):
        digest = mix_digest(opened.step_sample_ids(history.data, step - 1).tolist())
        expected += step not in found or found[step]["sample_ids_digest"] != digest
    beyond = sum(step > num_steps for step in found)
    return (expected + beyond) * history.data.global_batch_size


def mix_digest(sample_ids: Iterable[int]) -> str:
    """The sum modulo 2**64 of SplitMix64 of each id, in plain integers.

    Source:
        Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators".
    """
    total, mask = 0, 2**64 - 1
    for sample_id in sample_ids:
        mixed = (sample_id + 0x9E3779B97F4A7C15) & mask
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
        total += mixed ^ (mixed >> 31)
    return f"{total & mask:016x}"


def loss_difference(history: History, undisturbed: History) -> float:
    """The largest difference of a step's losses; infinite where a step is missing."""
    ours, theirs = history.by_step, undisturbed.by_step
    if ours.keys() != theirs.keys():
        return float("inf")
    return max(abs(ours[step]["loss"] - theirs[step]["loss"]) for step in theirs)


def median_step_s(steps: Sequence[tuple[int, float]]) -> float:
    """The median time from the end of a step to the end of the next, in seconds.

    Args:
        steps: number and end of every step, those done again included.

    Raises:
        StepError: fewer than two steps.
    """
    ends = sorted(time for _, time in steps)
    if len(ends) < 2:
        raise StepError(f"{len(ends)} steps are too few to tell what one takes")
    return statistics.median(after - time for time, after in itertools.pairwise(ends))


def goodput(steps: Sequence[tuple[int, float]], begin: float, end: float, step_s: float) -> float:
    """The share of the time that went into steps that count: each step once.

    Args:
        steps: number and end of every step, those done again included.
        begin: seconds since 1970.
        end: likewise.
        step_s: what a step may take, in seconds.
    """
    return len({step for step, time in steps if begin <= time <= end}) * step_s / (end - begin)


def ledger_goodput(ledger: Ledger, begin: float, end: float) -> float:
    """The share of the time, in seconds since 1970, that the run's own ledger has as training that is still of use."""
    useful = (np.diff(row.edges.clip(begin, end))[row.kinds == TRAINING].sum() for row in ledger.rows)
    return float(sum(useful)) / (end - begin)


def summary(history: History) -> dict[str, Any]:
    """How many workers each attempt had, and what told of those that were lost."""
    lost = [event["detected"] for event in history.events if event["event"] == "lost"]
    worlds = [event["world_size"] for event in history.events if event["event"] == "start"]
    return {"world_sizes": worlds, "lost_by": lost}


def _spans(faults: Sequence[float]) -> list[tuple[float, float]]:
    """Each fault, and when the next one came."""
    return list(zip(faults, [*faults[1:], float("inf")], strict=True))


def _first_after(times: Iterable[float], fault: float, end: float) -> float | None:
    return min((time - fault for time in times if fault < time < end), default=None)


def _longest(waits: Iterable[float | None]) -> float | None:
    """None if one is missing: the others say nothing about it."""
    found = list(waits)
    known = [wait for wait in found if wait is not None]
    return max(known) if known and len(known) == len(found) else None
