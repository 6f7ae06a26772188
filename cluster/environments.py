"""Ray's runtime environments of an attempt's processes: by what they are started, and what they find imported."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.fork_server import command
from cluster.host_memory import keep_freed

_CONTROLLER = ("ray.train.torch", "cluster.roll_call")
_WORKER = ("ray.train.torch", "torch.distributed.fsdp", "torch._dynamo")
"""With a GPU, what does not touch CUDA: which one it has a worker learns with its work."""
_WORKER_ON_CPU = ("cluster.worker", "pipeline.decode")
_CHOSEN = ("py_executable", "container", "image_uri", "nsight", "rocprof-sys")
"""With one of these, whoever started the driver has said how processes are to be started."""


def of_controllers(of_driver: Mapping[str, Any], variables: Mapping[str, str]) -> dict[str, Any]:
    """For Ray Train's controllers, on the node of this process, and what they start beside them.

    Args:
        of_driver: as for `of_workers`.
        variables: environment that Ray Train wants them to have.
    """
    return {"env_vars": dict(variables)} | _forked(of_driver, _CONTROLLER, os.getpid())


def of_workers(of_driver: Mapping[str, Any], *, gpu: bool) -> dict[str, Any]:
    """For Ray Train.

    Args:
        of_driver: the environment of the job that the driver is, which theirs is added to.
        gpu: each worker has one.
    """
    imports = _WORKER if gpu else _WORKER + _WORKER_ON_CPU
    return {"env_vars": {} if gpu else keep_freed()} | _forked(of_driver, imports)


def _forked(of_driver: Mapping[str, Any], modules: Sequence[str], owner: int = 0) -> dict[str, Any]:
    chosen = any(of_driver.get(name) for name in _CHOSEN)
    return {} if chosen else {"py_executable": command(modules, owner=owner)}
