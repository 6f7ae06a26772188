"""Ray's nodes: which are alive, which are being drained, and drain one.

A drained node keeps what runs on it and gets nothing new, but what is pinned to it and needs no resources. Ray ends
it as soon as nothing runs there, at the deadline or not; while something does, it stays, past the deadline too.
"""

from __future__ import annotations

import logging
from typing import Any

import ray
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from ray.core.generated.gcs_pb2 import GcsNodeInfo
from ray.exceptions import RayError

logger = logging.getLogger(__name__)

_RPC_S = 1.0
"""Ray's public calls wait a minute for a GCS that is gone."""


def drain(node_id: str, deadline: float | None, reason: str) -> bool:
    """Tell Ray that a node will be lost: nothing new is placed on it, and all who ask learn of it.

    Args:
        node_id: Ray's, in hex.
        deadline: when it will be gone, unix seconds; None if not known.
        reason: for people, in Ray's logs.

    Returns:
        Whether Ray took it; False if it did not answer. Ray takes it for a node that it does not know as well.
    """
    # A preemption cannot be refused by the node, and a second one replaces the deadline.
    preemption = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = 0 if deadline is None else max(1, int(deadline * 1000))  # 0: none
    try:
        accepted, rejection = _gcs().drain_node(node_id, preemption, reason, deadline_ms, timeout=_RPC_S)
    except RayError as error:
        accepted, rejection = False, str(error)
    if not accepted:
        logger.warning("Ray did not drain node %s (%s): %s", node_id, reason, rejection)
    return bool(accepted)


def draining_nodes() -> dict[str, float | None]:
    """The nodes that are being drained now, by whomever: id in hex -> deadline in unix seconds, None without one.

    Empty if Ray does not answer. Half a millisecond on loopback.
    """
    try:
        deadlines: dict[str, int] = _gcs().get_draining_nodes(timeout=_RPC_S)
    except RayError as error:
        logger.warning("Ray did not say which nodes are draining: %s", error)
        return {}
    return {node_id: milliseconds / 1000 if milliseconds else None for node_id, milliseconds in deadlines.items()}


def alive_nodes() -> frozenset[str] | None:
    """Ids, in hex, of the nodes that are alive, drained ones too; None if Ray does not answer."""
    try:
        nodes = _gcs().get_all_node_info(timeout=_RPC_S, state_filter=GcsNodeInfo.GcsNodeState.Value("ALIVE"))
    except RayError as error:
        logger.warning("Ray did not say which nodes are alive: %s", error)
        return None
    return frozenset(node_id.hex() for node_id in nodes)


def _gcs() -> Any:
    # Ray's public API knows no drains; this client is what its own `ray drain-node`, autoscaler and shutdown call.
    worker: Any = ray._private.worker.global_worker
    return worker.gcs_client
