"""The cluster's nodes as the driver sees them: which are up, which are about to go, how many workers they hold."""

from __future__ import annotations

import socket
import time
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray

from cluster.capacity import num_after_loss, num_fitting, num_within, worker_resources, world_within
from cluster.config import JobConfig
from cluster.draining import draining_nodes

_REFRESH_S = 0.5
_ANSWER_S = 0.5
_NUM_CALLS = 32
_NUM_SPARES = 4
"""A run does not start processes on all nodes of a large cluster that others share."""


class Nodes:
    """Looks at Ray's nodes twice a second.

    Args:
        job: what one worker needs, and how many there may be.
    """

    def __init__(self, job: JobConfig) -> None:
        self._job, self._need = job, worker_resources(job)
        self._next = 0.0
        self._nodes: list[dict[str, Any]] = []
        self._gone: set[str] = set()
        self.leaving: dict[str, float | None] = {}
        """Nodes that will be taken away, with the time in seconds since 1970, or None if it is not known."""

    def refresh(self) -> None:
        """Look again, if the last look is half a second old."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _REFRESH_S
        self._nodes = ray.nodes()  # type: ignore[no-untyped-call]
        alive = {node["NodeID"] for node in self._nodes if node["Alive"]}
        self._gone &= alive  # Ray knows it by now
        noticed = {node: deadline for node, deadline in self.leaving.items() if node in alive}
        self.leaving = noticed | draining_nodes()

    def note_notices(self, notices: Iterable[dict[str, Any]]) -> None:
        """What agents have heard; Ray's own word comes a moment later."""
        self.leaving |= {notice["node"]: notice["deadline"] for notice in notices}

    def look_for_dead(self) -> None:
        """Leave out nodes whose raylet does not answer: Ray itself notices only after several health checks."""
        alive = [node for node in self._nodes if node["Alive"]]
        with ThreadPoolExecutor(_NUM_CALLS) as pool:
            answers = pool.map(_answers, alive)
            self._gone = {node["NodeID"] for node, up in zip(alive, answers, strict=True) if not up}

    def capacity(self) -> int | None:
        """The world size that the nodes that stay could hold, were nothing else on them; None if it is too few."""
        return world_within(self._job, num_fitting(self._nodes, self._avoided(), self._need))

    def room(self, num_running: int = 0) -> int | None:
        """The world size that fits now, beside what else runs, if `num_running` workers of ours do already."""
        fitting = num_fitting(self._nodes, self._avoided(), self._need)
        free = num_within(ray.available_resources(), self._need)  # type: ignore[no-untyped-call]
        return world_within(self._job, min(fitting, free + num_running))

    def next_sizes(self, num_running: int) -> list[int]:
        """World sizes that may come after `num_running`: the same, what is left without a node, what has come."""
        fewer = world_within(self._job, num_after_loss(self.staying(), self._need))
        # Asking Ray what is free is for those that may grow.
        more = self.room(num_running) if num_running < self._job.num_workers else None
        return list(dict.fromkeys(size for size in (num_running, fewer, more) if size is not None))

    def candidates(self, used: Collection[str]) -> list[dict[str, Any]]:
        """Nodes that the next attempt may be on: those of `used` that stay, and some others that hold a worker."""
        able = [node for node in self.staying() if num_within(node["Resources"], self._need)]
        others = [node for node in able if node["NodeID"] not in used]
        return [node for node in able if node["NodeID"] in used] + others[:_NUM_SPARES]

    def amounts(self) -> tuple[dict[str, float], dict[str, float]]:
        """What the fewest workers need, and what the nodes that stay have in all, in use or not."""
        need = {kind: amount * self._job.least_workers for kind, amount in self._need.items()}
        have = [node["Resources"] for node in self.staying()]
        return need, {kind: sum(float(node.get(kind, 0.0)) for node in have) for kind in need}

    def staying(self) -> list[dict[str, Any]]:
        """The nodes that are up and not about to go, as `ray.nodes()` has them."""
        return [node for node in self._nodes if node["Alive"] and node["NodeID"] not in self._avoided()]

    def _avoided(self) -> Collection[str]:
        return self._gone | set(self.leaving)


def _answers(node: dict[str, Any]) -> bool:
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), _ANSWER_S).close()
    except OSError:
        return False
    return True
