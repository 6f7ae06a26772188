"""A light watcher on every node: turns the cloud's notice into a drain of its node, and kills frozen workers."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Collection
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.cloud_notices import Notice, NoticeSource, detect
from cluster.draining import alive_nodes, drain
from cluster.processes import start_time

logger = logging.getLogger(__name__)

_DETECT_TRIES = 3
_DETECT_AGAIN_S = 20.0
"""A pod may start before its metadata server does."""


class NodeAgent:
    """Lives on one node; made an actor by `NodeAgents`."""

    def __init__(self, relay: Any) -> None:
        self._relay = relay
        self._node = ray.get_runtime_context().get_node_id()
        threading.Thread(target=self._watch, daemon=True, name="cloud-notices").start()

    def kill(self, pid: int, started: int) -> bool:
        """SIGKILL a process of this node, if it is still the one that was meant.

        Args:
            pid: the process.
            started: its `start_time`.
        """
        found = start_time(pid)
        if found is None or found != started:
            return False
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:  # it ended by itself just now
            return False
        return True

    def _watch(self) -> None:
        source, told = _find_cloud(), None
        while source is not None and (told is None or told.deadline is None):
            notice = source.poll()
            if notice is not None and notice != told:
                self._pass_on(notice, source.poll_s)
                told = notice
            time.sleep(source.poll_s)

    def _pass_on(self, notice: Notice, retry_s: float) -> None:
        logger.warning("%s: %s, deadline %s", notice.source, notice.what, notice.deadline)
        while not drain(self._node, notice.deadline, f"{notice.source}: {notice.what}"):
            time.sleep(retry_s)
        if self._relay is not None:
            told = {"node": self._node, "source": notice.source, "deadline": notice.deadline}
            self._relay.note_notice.remote(told)


def _find_cloud() -> NoticeSource | None:
    for left in reversed(range(_DETECT_TRIES)):
        source = detect()
        if source is not None or not left:
            return source
        time.sleep(_DETECT_AGAIN_S)
    return None


class NodeAgents:
    """The driver's agents: one on every node that is alive. They end with the driver.

    Args:
        relay: actor whose `note_notice` is given each notice, `{"node": ..., "source": ..., "deadline": ...}`, once
            the node is being drained; None for none.
    """

    def __init__(self, relay: Any = None) -> None:
        self._relay = relay
        self._actor: Any = ray.remote(NodeAgent)
        self._agents: dict[str, Any] = {}
        self._starting: dict[Any, str] = {}

    def refresh(self, without: Collection[str] = ()) -> None:
        """Start agents on nodes that are new, forget those of nodes that are gone. Call it each second or so.

        It waits for no agent: asking Ray for its nodes takes about a millisecond, and so does each start. Without an
        answer from Ray nothing changes.

        Args:
            without: ids of nodes that shall have none. An agent keeps its node from being idle, so that Ray does not
                end it when it is drained, and its autoscaler does not take it away.
        """
        alive = alive_nodes()
        if alive is None:
            return
        wanted = alive.difference(without)
        for node_id in self._agents.keys() - wanted:
            ray.kill(self._agents.pop(node_id))
        for node_id in wanted - self._agents.keys():
            self._start(node_id)
        self._look_at_starts()

    def kill(self, node_id: str, pid: int, started: int) -> None:
        """SIGKILL a process on a node, without waiting; nothing happens if it is gone, or the node is.

        Args:
            node_id: Ray's, in hex.
            pid: the process.
            started: its `start_time`, so that another process that got its number is left alone.
        """
        agent = self._agents.get(node_id)
        if agent is not None:
            agent.kill.remote(pid, started)

    def _start(self, node_id: str) -> None:
        here = NodeAffinitySchedulingStrategy(node_id, soft=False)
        agent = self._actor.options(num_cpus=0, scheduling_strategy=here, max_restarts=-1).remote(self._relay)
        self._agents[node_id] = agent
        self._starting[agent.__ray_ready__.remote()] = node_id

    def _look_at_starts(self) -> None:
        """Tell of agents that did not start: else one would be missed only when its notice does not come."""
        refs = list(self._starting)
        for ready in ray.wait(refs, num_returns=len(refs), timeout=0)[0] if refs else ():
            node_id = self._starting.pop(ready)
            try:
                ray.get(ready)
            except ray.exceptions.RayError as error:
                if node_id in self._agents:
                    logger.warning("no notices from node %s: its agent did not start: %s", node_id, error)
