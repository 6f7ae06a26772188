"""One run on a cluster of its own, and the hands that disturb it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.demo_run import RunWatcher, StepError, Terminal, stop
from pipeline.store import Store
from tests.chaos.nodes import ROOT, Cluster, Node, NodeError, ray_environment, send
from tests.cluster.metadata_server import MetadataServer
from tests.pipeline.faulty_proxy import Faults
from trainer.metrics import Event

POLL_S = 0.3
OTHERS_S = 60.0
"""Other drivers of a run that has ended have to end in this time."""
PATIENCE_S = 300.0
"""Nothing that is waited for in a row takes longer when all is well, on a busy machine; training is waited for as long
as it goes on."""

# One rank's step takes about 0.1 s on a core: long enough to be struck in between, short enough for many rows.
SMALL = (
    *("--data.global-batch-size", "16", "--data.num-lanes", "8", "--data.augment.image-size", "96", "96"),
    *("--model.embed-dim", "96", "--model.depth", "4", "--model.num-heads", "3"),
    *("--model.decoder-embed-dim", "64", "--model.decoder-depth", "1", "--model.decoder-num-heads", "2"),
    *("--optim.base-lr", "1e-2"),
)
"""What makes the demo's recipe smaller."""
RECORDED = ("--log.every-steps", "1", "--log.flush-s", "0.3")
"""So that a step is seen when it is over. It costs questions between ranks and writes to the store at each."""


@dataclass(frozen=True)
class Job:
    """What every row trains."""

    dataset: str
    num_steps: int
    cadence: int
    """Steps between checkpoints."""
    model: tuple[str, ...] = SMALL
    """Model and batch, as options of the demo's recipe; none for the demo's own."""
    recorded: tuple[str, ...] = RECORDED
    """How often its numbers are read and written, as options."""
    more: tuple[str, ...] = ()
    """Further options of the recipe."""

    def words(self, run: str, num_workers: str) -> list[str]:
        """The command line after `tarmac`."""
        steps = ("--optim.num-steps", str(self.num_steps), "--checkpoint.every-steps", str(self.cadence))
        where = ("--data", self.dataset, "--run", run, "--num-workers", num_workers)
        return ["pretrain", "demo", *self.model, *self.recorded, *steps, *self.more, *where]


class Driver:
    """A `tarmac pretrain` in a process of its own, attached to a cluster."""

    def __init__(self, words: list[str], environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cluster.cli", *words],
                cwd=ROOT,
                env=os.environ | ray_environment() | dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self.process.poll()

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def words(self, num_lines: int = 25) -> str:
        """Its last lines."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-num_lines:])


@dataclass
class Scene:
    """A run, its cluster and its drivers. A context manager; leaving it ends the drivers, not the cluster."""

    terminal: Terminal
    job: Job
    run: str
    num_workers: str
    cluster: Cluster
    folder: Path
    """For the drivers' logs."""
    proxy: Faults | None = None
    """The proxy in front of the store, in the rows that watch requests."""
    endpoint: Mapping[str, str] = field(default_factory=dict)
    """Environment with which drivers and workers find the store."""
    metadata: Mapping[str, MetadataServer] = field(default_factory=dict)
    """The cloud's metadata service of each node, in the rows that have a cloud."""
    store_down: Callable[[float], None] | None = None
    """Takes the store away for some seconds."""
    faults: list[float] = field(default_factory=list)
    """When something was done to the run, in seconds since 1970."""
    drivers: list[Driver] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.watcher = RunWatcher(self.run)
        self.store = Store(self.run)

    def __enter__(self) -> Scene:
        self.start_driver()
        return self

    def __exit__(self, *_: object) -> None:
        for driver in self.drivers:
            send(driver.process.pid, signal.SIGCONT)
            stop(driver.process)

    def start_driver(self) -> Driver:
        """Give the command: the first time, or once more."""
        environment = {**self.endpoint, "RAY_ADDRESS": self.cluster.address}
        log = self.folder / f"{self.run.rpartition('/')[2]}-{len(self.drivers)}.log"
        self.drivers.append(Driver(self.job.words(self.run, self.num_workers), environment, log))
        return self.drivers[-1]

    @property
    def driver(self) -> Driver:
        """The newest."""
        return self.drivers[-1]

    def strike(self, what: str, fault: Callable[[], Any]) -> None:
        """Do it, and note when."""
        self.terminal.say(f"{what} at step {self.watcher.last_step}")
        self.faults.append(time.time())
        fault()

    def wait_for_step(self, step: int) -> None:
        """Until its record is in the bucket."""
        self.wait(f"step {step}", lambda: self.watcher.last_step >= step)

    def wait_for_attempt(self, number: int, num_steps: int = 1) -> None:
        """Until the run's `number`th attempt, from 1, has done some steps."""

        def is_on() -> bool:
            starts = self.watcher.starts
            if len(starts) < number:
                return False
            begun = [row for row in self.watcher.records if row["time"] > starts[number - 1]["time"]]
            return len(begun) >= num_steps

        self.wait(f"{num_steps} steps of attempt {number}", is_on)

    def wait(self, what: str, condition: Callable[[], bool]) -> None:
        """Until `condition`; StepError if the driver ends, or if so long no step is done."""
        step, deadline = -1, 0.0
        while True:
            self.watcher.refresh()
            if condition():
                return
            if self.driver.code is not None:
                raise StepError(f"waiting for {what}, the driver ended with {self.driver.code}:\n{self.driver.words()}")
            if self.watcher.last_step > step:
                step, deadline = self.watcher.last_step, time.monotonic() + PATIENCE_S
            if time.monotonic() > deadline:
                raise StepError(
                    f"waiting for {what}, no step after {step} in {PATIENCE_S:g} s; the driver's last words:\n"
                    f"{self.driver.words()}"
                )
            time.sleep(POLL_S)

    def finish(self) -> None:
        """Until the newest driver has ended well. StepError if it ends otherwise, or the run stands still."""
        self.wait("the end", self._has_ended)
        if self.driver.code != 0:
            raise StepError(f"the driver ended with {self.driver.code}:\n{self.driver.words()}")
        for other in self.drivers[:-1]:
            try:
                other.process.wait(OTHERS_S)
            except subprocess.TimeoutExpired as error:
                raise StepError(f"the run has ended and another driver has not:\n{other.words()}") from error

    def _has_ended(self) -> bool:
        return self.driver.code is not None

    def rank_pid(self, rank: int) -> int:
        """The process of a rank of the newest attempt that has begun to train."""
        return int(self.last_event("start")["pids"][rank])

    def rank_node(self, rank: int) -> Node:
        """The node that it is on."""
        return self.cluster.node_of(self.rank_pid(rank))

    def any_worker(self) -> int:
        """A process of the newest attempt, which need not have begun to train."""
        pids = [pid for node in self.cluster.nodes for pid in node.worker_pids()]
        if not pids:
            raise NodeError("no node has a Ray Train worker")
        return max(pids)

    def last_event(self, kind: str) -> Event:
        """The newest of its kind."""
        found = next((event for event in reversed(self.watcher.events) if event["event"] == kind), None)
        if found is None:
            raise StepError(f"{self.run} has no event {kind!r}")
        return found
