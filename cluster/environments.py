"""Ray's runtime environments of an attempt's processes: by what they are started, and what they find imported."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.fork_server import command
from cluster.host_memory import keep_freed
from cluster.standby import imports, imports_first

_CONTROLLER = ("ray.train.torch", "cluster.turns")
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
    """For Ray Train. The hook in it is for processes that are not forked: it imports what they do not find.

    Args:
        of_driver: the environment of the job that the driver is, which theirs is added to.
        gpu: each worker has one.
    """
    variables = imports_first(gpu=gpu) | ({} if gpu else keep_freed())
    return {"env_vars": variables} | _forked(of_driver, imports(gpu=gpu))


def _forked(of_driver: Mapping[str, Any], modules: Sequence[str], owner: int = 0) -> dict[str, Any]:
    chosen = any(of_driver.get(name) for name in _CHOSEN)
    return {} if chosen else {"py_executable": command(modules, owner=owner)}
