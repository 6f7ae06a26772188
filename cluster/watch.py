"""What the driver looks for while an attempt runs: frozen workers, standstill, nodes that leave, nodes that come."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal, Protocol

from cluster.config import JobConfig
from cluster.nodes import Nodes
from cluster.relay import News, Worker
from trainer.wishes import Wish

Aim = Literal["stop", "move", "resize"]
"""Why the workers were asked to stop."""

_RESIZE_AFTER_S = 20.0
"""An attempt is left alone this long before more workers are tried."""
_STABLE_S = 5.0
"""New nodes have been there this long before they are used."""
_LAST_SAVE_S = 5.0
"""Least time before a node's end at which the last checkpoint is asked for."""
_AGAIN_S = 10.0


class Killer(Protocol):
    """Kills a process on a node."""

    def kill(self, node_id: str, pid: int, started: int) -> None:
        """SIGKILL, if it is still the process that started then."""


class Watch:
    """Watches one attempt.

    Args:
        job: its limits.
        num_workers: of the attempt.
        nodes: the cluster's; refreshed by the caller.
        killer: for workers that do not answer.
        ask: hands the workers a wish.
        tell: takes the driver's events, each its kind and its fields.
        driver_node: Ray's id of the node that the driver is on.
    """

    def __init__(
        self,
        job: JobConfig,
        num_workers: int,
        *,
        nodes: Nodes,
        killer: Killer,
        ask: Callable[[Wish], object],
        tell: Callable[..., None],
        driver_node: str,
    ) -> None:
        self._job, self._num_workers, self._nodes, self._killer = job, num_workers, nodes, killer
        self._ask, self._tell, self._driver_node = ask, tell, driver_node
        self._began = self._progressed = time.monotonic()
        self._has_trained = False
        self._killed = -_AGAIN_S
        self._known: set[str] = set()
        self._more_since: float | None = None
        self._save_s = 0.0
        self.aim: Aim | None = None
        """Set once the workers are asked to stop."""
        self.broken: Literal["silence", "stall"] | None = None
        """Why workers were killed."""
        self.broken_by = ""
        """The same in words: who, for how long, and which option sets the limit."""

    def look(self, news: News) -> None:
        """Take the news, look at the nodes, and act."""
        if news.records:
            self._progressed, self._has_trained = time.monotonic(), True
        self._save_s = max([self._save_s, *(event["seconds"] for event in news.events if event["event"] == "save")])
        self._look_for_silence(news.workers)
        self._look_for_stall(news.workers)
        if self.aim is None:
            self._look_for_notices(news)
        if self.aim is None:
            self._look_for_more(news.workers)

    def stop(self, aim: Aim) -> None:
        """Ask the workers to save and return."""
        self.aim = aim
        self._ask(Wish.STOP)

    def kill_all(self, workers: list[Worker]) -> None:
        """End the attempt at once."""
        self._kill(workers)

    def _look_for_silence(self, workers: list[Worker]) -> None:
        limit_s = self._job.silence_timeout_s
        silent = {rank: worker for rank, worker in enumerate(workers) if (worker.silent_s or 0.0) > limit_s}
        if silent and self._kill(list(silent.values())):
            longest_s = max(worker.silent_s or 0.0 for worker in silent.values())
            who = ("rank " if len(silent) == 1 else "ranks ") + ", ".join(map(str, silent))
            self._break("silence", f"{who} gave no sign of life for {longest_s:.0f} s", limit_s)

    def _look_for_stall(self, workers: list[Worker]) -> None:
        stood_s, limit_s = time.monotonic() - self._progressed, self._job.stall_timeout_s
        if workers and stood_s > limit_s and self._kill(workers):
            ranks = "rank 0" if len(workers) == 1 else f"ranks 0 to {len(workers) - 1}"
            self._break("stall", f"{ranks} completed no step for {stood_s:.0f} s", limit_s)

    def _break(self, kind: Literal["silence", "stall"], what: str, limit_s: float) -> None:
        """Note why workers were killed; of several reasons the first one counts."""
        if self.broken is None:
            remedy = f"where that can be in order, give more than --{kind}-timeout-s {limit_s:g}"
            self.broken, self.broken_by = kind, f"killed: {what}; {remedy}"

    def _kill(self, workers: list[Worker]) -> bool:
        """Kill workers; Ray Train then ends the others. Not again for a while: one that is being killed is silent."""
        if time.monotonic() - self._killed < _AGAIN_S:
            return False
        self._killed = time.monotonic()
        for worker in workers:
            if worker.started is not None:
                self._killer.kill(worker.node, worker.pid, worker.started)
        return True

    def _look_for_notices(self, news: News) -> None:
        """A node that leaves: move at once if there is room without it, else stay until shortly before its end."""
        workers = [worker.node for worker in news.workers]
        used = {*workers, self._driver_node}
        leaving = {node: deadline for node, deadline in self._nodes.leaving.items() if node in used}
        new = leaving.keys() - self._known
        self._known |= new
        sources = {notice["node"]: notice["source"] for notice in news.notices}
        if not leaving:
            return
        action = self._answer_to(leaving, workers)
        for node in new:
            source = sources.get(node, "drain")
            self._tell("notice", node=node, source=source, deadline=leaving[node], action=action)
        if action != "save":
            self.stop(action)
        elif new:
            self._ask(Wish.SAVE)

    def _answer_to(self, leaving: dict[str, float | None], workers: list[str]) -> Literal["stop", "move", "save"]:
        """What to do: `stop` ends the run, for its driver goes too; `move` makes another attempt; `save` stays."""
        if self._driver_node in leaving:
            return "stop"
        if self._nodes.room(workers) is not None:
            return "move"
        ends = [deadline for deadline in leaving.values() if deadline is not None]
        return "move" if ends and min(ends) - time.time() < max(_LAST_SAVE_S, 3 * self._save_s) else "save"

    def _look_for_more(self, workers: list[Worker]) -> None:
        """More workers than now fit, and have for a while."""
        if (
            not self._has_trained
            or time.monotonic() - self._began < _RESIZE_AFTER_S
            or self._num_workers == self._job.num_workers
        ):
            return
        if (self._nodes.room([worker.node for worker in workers]) or 0) <= self._num_workers:
            self._more_since = None
        elif self._more_since is None:
            self._more_since = time.monotonic()
        elif time.monotonic() - self._more_since >= _STABLE_S:
            self.stop("resize")
