"""What the driver and the workers tell each other while a run is on: one small actor that dies with the driver."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup

from cluster.processes import start_time
from trainer.wishes import Wish


@dataclass(frozen=True)
class Worker:
    """A worker's process."""

    node: str
    """Ray's id of its node."""
    pid: int
    started: int | None
    """The process's `processes.start_time`."""
    silent_s: float | None = None
    """Time since its last sign of life; None before the first."""


def this_worker() -> Worker:
    """The process that runs this, on a cluster."""
    pid = os.getpid()
    return Worker(ray.get_runtime_context().get_node_id(), pid, start_time(pid))


def this_environment() -> str:
    """The runtime environment of the process that runs this, as Ray passes it on."""
    environment: str = ray.get_runtime_context().get_runtime_env_string()  # type: ignore[no-untyped-call]
    return environment


@dataclass
class News:
    """What has come in since the driver last asked."""

    records: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    notices: list[dict[str, Any]] = field(default_factory=list)
    """From node agents: `node`, `source`, `deadline`."""
    workers: list[Worker] = field(default_factory=list)
    """Of the attempt, by rank, always; none before Ray has started them all."""
    environment: str = ""
    """Of these workers: Ray's runtime environment, as Ray passes it on."""
    fatal: str | None = None
    """Of the attempt, always: an error that a restart cannot mend."""
    error: str | None = None
    """Of the attempt, always: the first other error."""


class Relay:
    """Lives on the driver's node; made an actor by `start_relay`."""

    def __init__(self) -> None:
        self._news = News()
        self._notices: list[dict[str, Any]] = []
        self.begin(0)

    def begin(self, attempt: int) -> None:
        """From now on only what workers of this attempt say counts."""
        self._attempt = attempt
        self._wish = Wish.GO_ON
        self._workers: list[Worker] = []
        self._environment = ""
        self._place: PlacementGroup | None = None
        self._pulses: dict[int, float] = {}
        self._fatal: str | None = None
        self._error: str | None = None

    def push(self, attempt: int, record: dict[str, Any]) -> None:
        """Take a step record for the driver."""
        if attempt == self._attempt:
            self._news.records.append(record)

    def announce(self, attempt: int, event: dict[str, Any]) -> None:
        """Take an event for the driver."""
        if attempt == self._attempt:
            self._news.events.append(event)

    def note_error(self, attempt: int, error: str, fatal: bool) -> None:
        """A worker raised. A fatal error is one that a restart cannot mend. Of an attempt, the first one is told."""
        if attempt != self._attempt:
            return
        if fatal and self._fatal is None:
            self._fatal = error
        elif not fatal and self._error is None:
            self._error = error

    def note_workers(self, attempt: int, workers: list[Worker], environment: str) -> None:
        """Ray has started the workers; by rank."""
        if attempt == self._attempt:
            self._workers, self._environment = workers, environment

    def note_place(self, attempt: int, place: PlacementGroup) -> None:
        """What Ray has reserved for the workers."""
        if attempt == self._attempt:
            self._place = place

    def place(self, attempt: int) -> PlacementGroup | None:
        """What was reserved for an attempt's workers; None if they have not started, or the next one's have."""
        return self._place if attempt == self._attempt else None

    def note_pulse(self, attempt: int, rank: int) -> None:
        """A worker is alive."""
        if attempt == self._attempt:
            self._pulses[rank] = time.monotonic()

    def note_notice(self, notice: dict[str, Any]) -> None:
        """A node's agent has heard that the node will be taken away."""
        self._notices.append(notice)

    def take(self) -> News:
        """All that came in since the last call."""
        news, self._news = self._news, News()
        news.notices, self._notices = self._notices, []
        now = time.monotonic()
        news.workers = [
            replace(worker, silent_s=now - self._pulses[rank]) if rank in self._pulses else worker
            for rank, worker in enumerate(self._workers)
        ]
        news.environment, news.fatal, news.error = self._environment, self._fatal, self._error
        return news

    def wish(self, wish: Wish) -> None:
        """Ask the workers for something. A stop is never taken back."""
        self._wish = max(self._wish, wish)

    def take_wish(self, attempt: int) -> Wish:
        """What the workers are asked for; a save is asked for once."""
        if attempt != self._attempt:
            return Wish.GO_ON
        wish = self._wish
        if wish is Wish.SAVE:
            self._wish = Wish.GO_ON
        return wish


def start_relay(name: str) -> Any:
    """A Relay actor on the driver's node, which takes no CPU from the workers.

    Args:
        name: by which other actors of this driver find it.
    """
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    actor: Any = ray.remote(Relay)
    return actor.options(name=name, num_cpus=0, label_selector=here).remote()
