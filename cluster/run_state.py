"""What a run is doing, from its bucket alone: but for its goodput, from a few small objects, whatever its length."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from cluster.lease import LeaseRecord, is_stale, read_lease
from cluster.options import shortage
from cluster.stop_request import stop_state
from pipeline.errors import StoreError, StoreNotFoundError
from pipeline.store import Store
from trainer.config import LoopConfig, num_steps
from trainer.errors import RunError
from trainer.metrics import ATTEMPTS, DRIVER_EVENTS, EVENTS, NUM_READS, Event
from trainer.run_files import RUN, read_any_run

StateName = Literal[
    "new", "starting", "waiting", "running", "stopping", "stopped", "finished", "failed", "lost", "unreadable"
]
"""`new`: no attempt yet; `waiting`: for workers; `lost`: its driver is gone, and left no reason; `unreadable`: what is
in its bucket cannot be read."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """One run, as `tarmac status` and `tarmac runs` show it."""

    run: str
    state: StateName
    reason: str | None = None
    """Why it failed, what it waits for, since when the driver is gone, what cannot be read."""
    step: int = 0
    """Of the newest record."""
    num_steps: int | None = None
    """Of the whole run; None until the first record tells how long the dataset is."""
    epoch: float = 0.0
    loss: float | None = None
    images_per_s: float | None = None
    attempts: int = 0
    goodput: float | None = None
    """Share of the time since the run began that trained for good; None if it was not asked for."""
    age_s: float | None = None
    """Time since the newest record or event."""
    told_to_stop: bool = False
    """By `tarmac stop`, and nobody has taken it back: nothing should begin the run again by itself."""
    driver: str | None = None
    """Host and process id of who drives it, or drove it last."""
    workers: tuple[str, ...] = ()
    """Host of each worker of the newest attempt, by rank."""


@dataclass(frozen=True, kw_only=True)
class _Newest:
    """What the newest attempts left."""

    num_attempts: int
    events: list[Event]
    """Of the newest attempt, in the order of their times."""
    record: dict[str, Any] | None
    """The newest of all attempts."""

    def last(self, *kinds: str) -> Event | None:
        """The newest event of one of these kinds."""
        return next((event for event in reversed(self.events) if event["event"] in kinds), None)


def read_state(run: Store, *, with_goodput: bool = False) -> RunState:
    """What the run at this URL is doing, as far as this machine's clock can tell whether it is driven.

    Args:
        run: the run's store.
        with_goodput: reads every record there is, where the rest takes a few requests.

    Raises:
        RunError: there is no run.
        StoreError: the bucket does not answer.
    """
    config, newest, lease = read_any_run(run).loop, _read_newest(run), read_lease(run)
    held, request = lease is not None and not is_stale(lease), stop_state(run)
    state, reason = _judge(newest, lease if held else None, held and request == "asked")
    if state == "lost" and lease is not None:
        reason = f"its driver was last heard of {time.time() - lease.renewed:.0f} s ago"
    record = newest.record or {}
    times = [item["time"] for item in (newest.record, newest.events[-1] if newest.events else None) if item]
    start = newest.last("start")
    return RunState(
        run=str(run),
        state=state,
        reason=reason,
        step=record.get("step", 0),
        num_steps=_total(config, newest.record),
        epoch=record.get("epoch", 0.0),
        loss=record.get("loss"),
        images_per_s=record.get("images_per_s"),
        attempts=newest.num_attempts,
        goodput=_goodput(run) if with_goodput and newest.num_attempts else None,
        age_s=time.time() - max(times) if times else None,
        told_to_stop=request != "none",
        driver=f"{lease.host}:{lease.pid}" if lease else None,
        workers=tuple(start.get("hosts", ())) if start else (),
    )


def read_states(root: Store, max_depth: int, *, with_goodput: bool = False) -> list[RunState]:
    """The state of every run at or below a URL, in the order of their URLs. Raises StoreError if that cannot be listed.

    Args:
        root: where to look.
        max_depth: levels of folders that are looked through; nothing below a run is.
        with_goodput: as of `read_state`.
    """
    with ThreadPoolExecutor(NUM_READS) as pool:
        states = pool.map(partial(tell_state, with_goodput=with_goodput), _find_runs(root, max_depth, pool))
        return sorted(states, key=lambda state: state.run)


def tell_state(run: Store, *, with_goodput: bool = False) -> RunState:
    """As `read_state`, but a run that cannot be read is a state too."""
    try:
        return read_state(run, with_goodput=with_goodput)
    except (RunError, StoreError, KeyError, TypeError, ValueError) as error:
        return RunState(run=str(run), state="unreadable", reason=str(error))


def _find_runs(root: Store, max_depth: int, pool: ThreadPoolExecutor) -> list[Store]:
    level, found = [root], []
    for _ in range(max_depth + 1):
        are_runs = list(pool.map(lambda store: store.exists(RUN), level))
        found += [store for store, is_run in zip(level, are_runs, strict=True) if is_run]
        others = [store for store, is_run in zip(level, are_runs, strict=True) if not is_run]
        names = pool.map(lambda store: store.folders(), others)
        level = [store.child(name) for store, below in zip(others, names, strict=True) for name in below]
    return found


def _read_newest(run: Store) -> _Newest:
    """The newest attempt's events, and the newest record, which may be an earlier attempt's."""
    attempts = sorted((name for name in run.folders(ATTEMPTS) if name.isdecimal()), key=int)
    events: list[Event] = []
    record: dict[str, Any] | None = None
    for attempt in reversed(attempts):
        directory = f"{ATTEMPTS}/{attempt}"
        names = [entry.path for entry in run.list(directory)]
        if attempt == attempts[-1]:
            events = [event for name in (EVENTS, DRIVER_EVENTS) for event in _lines(run, f"{directory}/{name}", names)]
        parts = [name for name in names if name.startswith(f"{directory}/metrics-")]
        if parts:
            record = _lines(run, parts[-1], parts)[-1]
            break
    return _Newest(num_attempts=len(attempts), events=sorted(events, key=lambda item: item["time"]), record=record)


def _lines(run: Store, path: str, names: Iterable[str]) -> list[dict[str, Any]]:
    """The JSON lines of an object that is among `names`; none if it has gone since."""
    if path not in names:
        return []
    try:
        return [json.loads(line) for line in run.read(path).splitlines()]
    except StoreNotFoundError:
        return []


def _judge(newest: _Newest, lease: LeaseRecord | None, stopping: bool) -> tuple[StateName, str | None]:
    """State and reason. `lease` is None if nobody holds the run now."""
    ended, stop = newest.last("asked", "ended"), newest.last("stop")
    outcome = ended.get("outcome") if ended else None
    if outcome == "finished" or (stop is not None and stop["reason"] == "finished"):
        return "finished", None
    if outcome == "stopped" or (ended is None and stop is not None and stop["reason"] == "stopped"):
        return "stopped", "asked to; submit it again to go on"
    return _judge_driven(newest, stopping) if lease is not None else _judge_left(newest, outcome)


def _judge_left(newest: _Newest, outcome: str | None) -> tuple[StateName, str | None]:
    stop, lost = newest.last("stop"), newest.last("lost")
    if outcome == "lost":
        return "failed", str(lost["error"]).partition("\n")[0] if lost else None
    if stop is not None and stop["reason"] not in ("finished", "stopped"):
        return "failed", f"{stop['reason']} at step {stop['step']}"
    if newest.num_attempts == 0:
        return "new", "no driver has begun it"
    return "lost", "nobody drives it"


def _judge_driven(newest: _Newest, stopping: bool) -> tuple[StateName, str | None]:
    now = newest.last("asked", "waiting", "placed", "start", "lost", "ended")
    if stopping:
        return "stopping", "asked to; saves a checkpoint first"
    if now is not None and now["event"] == "waiting":
        return "waiting", shortage(now)
    if now is not None and now["event"] == "start":
        return "running", None
    return "starting", None


def _goodput(run: Store) -> float:
    from cluster.ledger import read_ledger  # numpy

    return read_ledger(run).goodput


def _total(config: LoopConfig, record: dict[str, Any] | None) -> int | None:
    """Steps of the whole run. A record tells how many images the dataset has."""
    if config.optim.num_steps is not None:
        return config.optim.num_steps
    if record is None:
        return None
    return num_steps(config, round(record["samples_seen"] / record["epoch"]))
