"""Spare nodes that are ready for workers: each has a process whose imports all that come later are forked from.

No call of Ray's Python has a process started that no work is given to; its raylets have that call, which Ray's own
`PrestartWorkers` in C++ makes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated.common_pb2 import Language
from ray.core.generated.node_manager_pb2 import PrestartWorkersRequest
from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub

logger = logging.getLogger(__name__)

_KEEP_S = 30 * 86_400
"""Ray ends idle processes after a second otherwise, where there are more of them than CPUs."""
_ANSWER_S = 2.0
_NUM_CALLS = 32


class Standby:
    """The nodes where a process waits. It holds nothing of what a node has for workers, and ends with the run."""

    def __init__(self) -> None:
        self._ready: set[str] = set()

    def fill(self, used: Iterable[str], spares: Iterable[Mapping[str, Any]], environment: str) -> None:
        """Have a process wait on each spare node that has none. A raylet that does not answer is not asked again.

        Args:
            used: ids of the nodes with workers, which take the process that waits.
            spares: from `ray.nodes()`.
            environment: of the workers, as Ray passes it on.
        """
        self._ready -= set(used)
        calls = [(node, environment) for node in spares if node["NodeID"] not in self._ready]
        self._ready |= {node["NodeID"] for node, _ in calls}
        if calls:
            with ThreadPoolExecutor(_NUM_CALLS) as pool:
                list(pool.map(_start, *zip(*calls, strict=True)))


def _start(node: Mapping[str, Any], environment: str) -> None:
    job = bytes.fromhex(ray.get_runtime_context().get_job_id())
    request = PrestartWorkersRequest(
        language=Language.PYTHON, job_id=job, num_workers=1, keep_alive_duration_secs=_KEEP_S
    )
    request.runtime_env_info.serialized_runtime_env = environment
    address = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
    try:
        with init_grpc_channel(address) as channel:
            NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=_ANSWER_S)
    except grpc.RpcError as error:  # the next attempt imports, which takes longer
        logger.info("no process waits on %s: %s", address, error)
