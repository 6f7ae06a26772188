"""Processes for the next attempt's workers that wait on the nodes with their imports behind them.

Ray gives an actor an idle process of its runtime environment, if there is one that has not worked yet. No call of its
Python has one started; its raylets have that call, which Ray's own `PrestartWorkers` in C++ makes.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR
from ray.core.generated.common_pb2 import Language
from ray.core.generated.node_manager_pb2 import PrestartWorkersRequest
from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub

from cluster.capacity import num_within

logger = logging.getLogger(__name__)

_ANY_DEVICE = ("ray.train.torch", "torch.distributed.fsdp", "torch._dynamo")
_CPU = ("cluster.worker", "pipeline.decode")
_KEEP_S = 30 * 86_400
"""Ray ends idle processes after a second otherwise, where there are more of them than CPUs."""
_ANSWER_S = 2.0
_NUM_CALLS = 32
_NICER = 10


def imports_first(*, gpu: bool) -> dict[str, str]:
    """Environment in which a process of Ray's imports what a worker needs before it is given any work."""
    hook = import_for_gpu if gpu else import_for_cpu
    return {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: f"{__name__}.{hook.__name__}"}


def imports(*, gpu: bool) -> tuple[str, ...]:
    """All that a worker needs; with a GPU what does not touch CUDA: which one it has it learns with its work."""
    return _ANY_DEVICE if gpu else _ANY_DEVICE + _CPU


def import_for_cpu() -> None:
    """What a worker without a GPU needs."""
    _import(imports(gpu=False))


def import_for_gpu() -> None:
    """What a worker with a GPU needs."""
    _import(imports(gpu=True))


def _import(modules: Iterable[str]) -> None:
    # In a thread of its own, as a thread cannot take back what it has let others have.
    with ThreadPoolExecutor(1, "import") as pool:
        pool.submit(_import_behind_others, modules).result()


def _import_behind_others(modules: Iterable[str]) -> None:
    """Whoever trains on this node goes first; and nothing is garbage that thousands of modules have just made."""
    if sys.platform == "linux":  # where a thread is as nice as it says itself
        os.nice(_NICER)
    gc.disable()
    for module in modules:
        importlib.import_module(module)
    gc.freeze()
    gc.enable()


class Standby:
    """The processes that wait.

    Args:
        need: resources of one worker, which a process that waits does not take.
    """

    def __init__(self, need: Mapping[str, float]) -> None:
        self._need = need
        self._waiting: dict[str, int] = {}

    def take(self, nodes: Iterable[str]) -> None:
        """Workers have been started, one for each mention of a node: where a process waited, it was taken."""
        for node in nodes:
            self._waiting[node] = max(0, self._waiting.get(node, 0) - 1)

    def fill(self, nodes: Sequence[Mapping[str, Any]], num_workers: int, environment: str) -> None:
        """Have as many wait on each node as it may be given workers. A raylet that does not answer is not asked again.

        Args:
            nodes: which the next attempt may be on, from `ray.nodes()`.
            num_workers: of the next attempt.
            environment: of the workers, as Ray passes it on.
        """
        calls = []
        for node in nodes:
            wanted = min(num_workers, num_within(node["Resources"], self._need))
            waiting = self._waiting.get(node["NodeID"], 0)
            if wanted > waiting:
                self._waiting[node["NodeID"]] = wanted
                calls.append((node, wanted - waiting, environment))
        if calls:
            with ThreadPoolExecutor(_NUM_CALLS) as pool:
                list(pool.map(_start, *zip(*calls, strict=True)))


def _start(node: Mapping[str, Any], num_processes: int, environment: str) -> None:
    job = bytes.fromhex(ray.get_runtime_context().get_job_id())
    request = PrestartWorkersRequest(
        language=Language.PYTHON, job_id=job, num_workers=num_processes, keep_alive_duration_secs=_KEEP_S
    )
    request.runtime_env_info.serialized_runtime_env = environment
    address = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
    try:
        with init_grpc_channel(address) as channel:
            NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=_ANSWER_S)
    except grpc.RpcError as error:  # the next attempt starts its own, which takes longer
        logger.info("no workers wait on %s: %s", address, error)
