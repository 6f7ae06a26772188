"""The driver of a run: it makes attempts, watches each, and decides what comes after it."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources

from cluster.capacity import worker_resources
from cluster.config import JobConfig
from cluster.driver_log import DriverLog
from cluster.failures import Failures, count_without_progress
from cluster.fit import Fit
from cluster.lease import Lease
from cluster.node_agent import NodeAgents
from cluster.nodes import Nodes
from cluster.options import amounts
from cluster.relay import News, start_relay
from cluster.run_metrics import RunMetrics
from cluster.standby import Standby
from cluster.stops import Stops
from cluster.watch import Watch
from pipeline.errors import StoreError
from pipeline.store import Store
from trainer.checkpoint import newest_step
from trainer.loop import StopReason
from trainer.metrics import next_attempt

logger = logging.getLogger(__name__)

_POLL_S = 0.25
_SETTLE_S = 4.0
"""For how long more workers than there is room for are hoped for: those of an attempt that ended free theirs late."""
_WAIT_TOLD_S = 30.0


class RunFailedError(Exception):
    """The run ended by an error that a restart cannot mend."""


@dataclass(frozen=True)
class _Outcome:
    """How an attempt ended. `reason` ends the run; without one, another attempt is made, and `then` says why."""

    name: str
    reason: StopReason | None = None
    then: str = ""


_ENDS = {
    "stop": _Outcome("stopped", StopReason.STOPPED),
    "move": _Outcome("moved", then="move"),
    "resize": _Outcome("resized", then="resize"),
}


class Driver:
    """Drives one run from its newest checkpoint on, on the Ray that this process is connected to.

    Args:
        job: what to train, where, with how many workers.
        run: the run's store.
        lease: held on it.
        stops: requests to stop.
        local: Ray is this machine's own.
        on_news: called a few times a second with what came in.
    """

    def __init__(
        self,
        job: JobConfig,
        run: Store,
        lease: Lease,
        stops: Stops,
        *,
        local: bool,
        on_news: Callable[[News], None],
    ) -> None:
        self._job, self._run, self._lease, self._stops, self._local = job, run, lease, stops, local
        self._on_news = on_news
        name = f"tarmac-{lease.record.driver}"
        self._relay = start_relay(name)
        self._standby = Standby()
        self._agents, self._nodes, self._metrics = NodeAgents(name), Nodes(job), RunMetrics(str(run))
        self._here: str = ray.get_runtime_context().get_node_id()
        self._number = next_attempt(run) - 1
        most = job.max_attempts_without_progress
        self._failures = Failures(most, newest_step(run) or 0, count_without_progress(run, most))
        self._told: list[dict[str, Any]] = []
        self._used: set[str] = set()

    def drive(self) -> StopReason:
        """Make attempts until the run is finished or asked to stop.

        Raises:
            RunFailedError: an error that a restart cannot mend, a crash loop, or another driver took over.
        """
        with self._wanted_of_autoscaler():
            return self._drive()

    def _drive(self) -> StopReason:
        outcome = _Outcome("", then="resume" if self._number else "first")
        while outcome.reason is None:
            self._number += 1
            self._log = DriverLog(self._run, self._number, self._lease.check)
            try:
                outcome = self._attempt(outcome.then)
                self._tell("ended", outcome=outcome.name)
            except RunFailedError:
                self._tell("ended", outcome="lost")
                raise
            finally:
                self._hear()
                self._log.close()
        self._stops.done()
        return outcome.reason

    def _attempt(self, because: str) -> _Outcome:
        who = {"host": socket.gethostname(), "pid": os.getpid(), "driver": self._lease.record.driver}
        self._tell("asked", num_workers=self._job.num_workers, reason=because, **who)
        num_workers = self._await_room()
        if num_workers is None:
            return _ENDS["stop"]
        self._tell("placed", num_workers=num_workers)
        ray.get(self._relay.begin.remote(self._number))
        payload = {"relay": self._relay, "attempt": self._number, "lease": self._lease.record}
        fit = Fit(self._job, num_workers, payload, local=self._local, avoided=self._nodes.avoided)
        fit.start()
        watch = Watch(
            self._job,
            num_workers,
            nodes=self._nodes,
            killer=self._agents,
            ask=self._relay.wish.remote,
            tell=self._tell,
            driver_node=self._here,
        )
        return self._outcome(fit, watch, self._watch(fit, watch))

    def _await_room(self) -> int | None:
        """Wait for room for the workers; returns their number, or None if a stop is asked for first."""
        began = told = time.monotonic()
        began += self._failures.pause_s
        while not self._stops.asked_by:
            self._look()
            now = time.monotonic()
            room = self._nodes.room() if now >= began else None
            if room == self._job.num_workers or (room is not None and now - began > _SETTLE_S):
                return room
            if now - told > _WAIT_TOLD_S:
                told = now
                self._tell("waiting", **self._nodes.shortage())
            self._hear()
            self._check_lease()
            time.sleep(_POLL_S)
        self._tell("stopping", signal=self._stops.asked_by)
        return None

    def _watch(self, fit: Fit, watch: Watch) -> News:
        """Look until the attempt has ended; returns the last news, with its errors."""
        while True:
            fit.join(_POLL_S)
            running = fit.is_alive()
            self._look()
            news = self._hear()
            if not running:
                return news
            if self._lease.lost is not None:
                watch.kill_all(news.workers)
            if self._stops.asked_by and watch.aim != "stop":
                self._tell("stopping", signal=self._stops.asked_by)
                watch.stop("stop")
            watch.look(news)
            if self._job.standby and watch.aim is None and news.environment:
                self._standby.fill(self._used, self._nodes.spares(self._used), news.environment)

    def _outcome(self, fit: Fit, watch: Watch, news: News) -> _Outcome:
        if fit.reason is StopReason.FINISHED:
            return _Outcome("finished", StopReason.FINISHED)
        if fit.reason is StopReason.STOPPED:
            return _ENDS[watch.aim or "stop"]
        self._nodes.note_place(fit.num_workers, found=not fit.found_no_place)
        error = news.fatal or self._broken(watch, fit, news)
        self._tell("lost", error=error, detected=watch.broken or "error")
        self._check_lease()
        if news.fatal is not None:
            raise RunFailedError(news.fatal)
        if watch.aim == "stop":
            return _Outcome("lost", StopReason.STOPPED)
        self._nodes.look_for_dead()
        # Without a place for them nothing failed: it is waited for.
        given_up = None if fit.found_no_place else self._failures.add(_committed_step(self._run), error)
        if given_up is not None:
            raise RunFailedError(given_up)
        return _Outcome("lost", then="restart")

    @contextmanager
    def _wanted_of_autoscaler(self) -> Iterator[None]:
        """A cluster that grows on demand is told what the run wants: nothing waits in Ray that would tell it."""
        if self._local:
            yield
            return
        request_resources(bundles=[worker_resources(self._job)] * self._job.num_workers)
        try:
            yield
        finally:
            request_resources(bundles=[])

    def _check_lease(self) -> None:
        if self._lease.lost is not None:
            raise RunFailedError(f"{self._lease.lost}; this driver stops")

    def _look(self) -> None:
        self._nodes.refresh()
        # An agent keeps its node from being idle, and a node that is being drained ends once it is.
        self._agents.refresh(without=self._nodes.leaving.keys() - self._used)

    def _hear(self) -> News:
        """What the workers and this driver told since the last call; passed on to whoever looks on."""
        news: News = ray.get(self._relay.take.remote())
        self._nodes.note_notices(news.notices)
        self._used = {worker.node for worker in news.workers}
        news.events += self._told
        self._told = []
        self._metrics.take(news)
        self._on_news(news)
        return news

    def _broken(self, watch: Watch, fit: Fit, news: News) -> str:
        """Why the workers are gone."""
        if watch.broken is not None:
            # What the others said then is mostly that they miss those that were killed.
            return watch.broken_by + (f"; then: {news.error}" if news.error else "")
        if fit.found_no_place:
            each = amounts(worker_resources(self._job))
            what = f"Ray found no place for {fit.num_workers} workers with {each} each"
            return f"{what}, although they seemed to fit; fewer are tried, or these again later"
        return news.error or fit.error or "the worker processes were killed"

    def _tell(self, kind: str, **fields: Any) -> None:
        """An event of the driver, for the run and for whoever looks on."""
        event = {"event": kind, "time": time.time(), **fields}
        self._log.add(event)
        self._told.append(event)


def _committed_step(run: Store) -> int | None:
    """Of the newest checkpoint; None where the store does not answer, which is found out again, and told, later."""
    try:
        return newest_step(run) or 0
    except StoreError:
        return None
