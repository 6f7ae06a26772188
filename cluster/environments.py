"""Ray's runtime environment of the workers: by what they are started, and what they find imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.fork_server import command
from cluster.host_memory import keep_freed
from cluster.standby import imports, imports_first

_CHOSEN = ("py_executable", "container", "image_uri", "nsight", "rocprof-sys")
"""With one of these, whoever started the driver has said how processes are to be started."""


def of_workers(of_driver: Mapping[str, Any], *, gpu: bool) -> dict[str, Any]:
    """For Ray Train. The hook in it is for processes that are not forked: it imports what they do not find.

    Args:
        of_driver: the environment of the job that the driver is, which theirs is added to.
        gpu: each worker has one.
    """
    environment: dict[str, Any] = {"env_vars": imports_first(gpu=gpu) | ({} if gpu else keep_freed())}
    if not any(of_driver.get(name) for name in _CHOSEN):
        environment["py_executable"] = command(imports(gpu=gpu))
    return environment
