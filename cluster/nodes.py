"""The cluster's nodes as the driver sees them: which are up, which are about to go, how many workers they hold."""

from __future__ import annotations

import socket
import time
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray

from cluster.capacity import Refusals, num_fitting, num_within, worker_resources, world_within
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
        self._refusals, self._fitting = Refusals(), 0
        self.leaving: dict[str, float | None] = {}
        """Nodes that will be taken away, with the time in seconds since 1970, or None if it is not known."""

    def refresh(self) -> None:
        """Look again, if the last look is half a second old."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _REFRESH_S
        self._nodes = ray.nodes()  # type: ignore[no-untyped-call]
        alive = {node["NodeID"] for node in self._nodes if node["Alive"]}
        # The others Ray knows of by now, or they were only slow to answer.
        self._gone = _silent(node for node in self._nodes if node["Alive"] and node["NodeID"] in self._gone)
        noticed = {node: deadline for node, deadline in self.leaving.items() if node in alive}
        self.leaving = noticed | draining_nodes()

    def note_notices(self, notices: Iterable[dict[str, Any]]) -> None:
        """What agents have heard; Ray's own word comes a moment later."""
        self.leaving |= {notice["node"]: notice["deadline"] for notice in notices}

    def look_for_dead(self) -> None:
        """Leave out nodes whose raylet does not answer: Ray itself notices only after several health checks."""
        self._gone = _silent(node for node in self._nodes if node["Alive"])

    def room(self, running: Collection[str] = ()) -> int | None:
        """The world size that fits now on the nodes that stay, beside what else runs there; None if it is too few.

        Args:
            running: the node of each worker of ours. What they hold would be free for the next attempt.
        """
        fitting = num_fitting(self.staying(), _free_by_node(), running, self._need)
        if not running:
            self._fitting = fitting  # what the next attempt goes by
        return world_within(self._job, self._refusals.most(fitting, time.monotonic()))

    def note_place(self, num_workers: int, *, found: bool) -> None:
        """An attempt with so many workers was made, and Ray had a place for them or not."""
        self._refusals.note(num_workers, self._fitting, time.monotonic(), found=found)

    def spares(self, used: Collection[str]) -> list[dict[str, Any]]:
        """Some nodes beside those of `used` that hold a worker, and that the next attempt may be on."""
        others = [node for node in self.staying() if node["NodeID"] not in used]
        return [node for node in others if num_within(node["Resources"], self._need)][:_NUM_SPARES]

    def shortage(self) -> dict[str, Any]:
        """Why workers wait, by the last `room()`, as the fields of an event.

        Returns:
            `need`, what the fewest workers take; `have`, what the nodes that stay have in all, in use or not;
            `num_least`, the fewest workers; `num_fitting`, how many fit beside what else runs; `retry_s`, the time
            until Ray is asked again for workers that it found no place for, 0 if that is not what they wait for.
        """
        need = {kind: amount * self._job.least_workers for kind, amount in self._need.items()}
        nodes = [node["Resources"] for node in self.staying()]
        return {
            "need": need,
            "have": {kind: sum(float(node.get(kind, 0.0)) for node in nodes) for kind in need},
            "num_least": self._job.least_workers,
            "num_fitting": self._fitting,
            "retry_s": self._refusals.left_s(time.monotonic()),
        }

    def staying(self) -> list[dict[str, Any]]:
        """The nodes that are up and not about to go, as `ray.nodes()` has them."""
        return [node for node in self._nodes if node["Alive"] and node["NodeID"] not in self.avoided]

    @property
    def avoided(self) -> set[str]:
        """Nodes that are about to go, or do not answer while Ray still takes them for alive."""
        return self._gone | set(self.leaving)


def _free_by_node() -> dict[str, dict[str, float]]:
    """What nobody has reserved, by the node's id: Ray's public call adds all nodes up."""
    free: dict[str, dict[str, float]] = ray._private.state.available_resources_per_node()  # type: ignore[no-untyped-call]
    return free


def _silent(nodes: Iterable[dict[str, Any]]) -> set[str]:
    """Ids of those whose raylet does not answer."""
    if not (asked := list(nodes)):
        return set()
    with ThreadPoolExecutor(_NUM_CALLS) as pool:
        return {node["NodeID"] for node, up in zip(asked, pool.map(_answers, asked), strict=True) if not up}


def _answers(node: dict[str, Any]) -> bool:
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), _ANSWER_S).close()
    except OSError:
        return False
    return True
