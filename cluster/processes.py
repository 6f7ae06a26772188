"""Which process a process id means, on Linux."""

from __future__ import annotations

import os
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NAMESPACE = "/proc/self/ns/pid"


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot: with the pid, its identity. None if it is not alive.

    Source: proc_pid_stat(5), fields 3 and 22.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()  # the second field, in brackets, may hold anything
    return None if state in ("Z", "X") else int(fields[18])


def kernel() -> str | None:
    """The boot and the namespace in which this process's ids mean something."""
    try:
        return f"{_BOOT_ID.read_text().strip()} {os.readlink(_NAMESPACE)}"
    except OSError:
        return None
