"""Starts Ray's processes by forking one that has their imports behind it: half a second each instead of five.

Ray starts a process by the command that its runtime environment has as `py_executable`; `command` makes one for it. On
each node the first process of a job and environment does not do what it was started for: it imports, and stays as the
server. A process that comes later hands it its arguments, environment, folder and standard streams, and ends. The
server forks; what was forked goes on as if it had been started so. Where anything is in the way of that, the process
is started as Ray would have started it.

At the top only the standard library is imported: whoever finds a server needs nothing else.

Source:
    `multiprocessing.forkserver`, whose servers only the process that started them can use.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import hashlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

_KEEP_S = 60.0
"""How long a server without a process of its own waits for another one."""
_PATIENCE_S = 20.0
"""For imports: Ray kills what has not spoken to it a minute after its start."""
_BACKLOG = 1024
_FORKED = b"f"
_SURVIVE_FORKS = {"jemalloc_bg_thd"}
"""Threads of C libraries that stop them before a fork and begin them anew: jemalloc's is pyarrow's."""
_DEVICES = ("/dev/nvidia", "/dev/kfd", "/dev/dri")


def command(modules: Sequence[str], *, owner: int = 0) -> str:
    """For `py_executable`.

    Args:
        modules: what a server imports.
        owner: a process of the only node that has such servers, which end with it. Without one (0) a server ends when
            for a minute it has had no process that lives.
    """
    python = f"$(command -v {sys.executable} || command -v python3)"  # Ray gives it to bash, maybe on another image
    return f"{python} -m {__name__} {','.join(modules)} {owner}"


def main() -> None:
    """Be a process of Ray's: as the first one here the server and the parent of it, and else a child of that."""
    modules, owner, *arguments = sys.argv[1:]
    request = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    try:
        found = _meet(_address(arguments), int(owner))
    except (OSError, KeyError, ValueError, AttributeError) as error:  # too long a path; no raylet; not on Linux
        _tell_why(f"{type(error).__name__}: {error}")
        _start_as_ray_would(request)
    if isinstance(found, _Server):
        _be_it(found.serve(modules.split(","), request) or _start_as_ray_would(request))
    elif not _hand_over(found, request):
        _start_as_ray_would(request)


def _address(arguments: Sequence[str]) -> Path:
    """Of the server's socket, beside the raylet's: in a folder of Ray's own, and as short as the raylet's allow."""
    given = dict(argument[2:].split("=", 1) for argument in arguments if argument.startswith("--") and "=" in argument)
    # The job's number is what Ray's library reads once, when it is imported.
    key = [given["raylet-name"], given["runtime-env-hash"], os.environ["RAY_JOB_ID"], os.environ["RAY_RAYLET_PID"]]
    digest = hashlib.sha256("\n".join(key).encode()).hexdigest()
    return Path(given["raylet-name"]).with_name(f"fork_{digest[:8]}")


def _meet(address: Path, owner: int) -> _Server | socket.socket:
    """A connection to the server, or the one to be."""
    with open(address.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(address))
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            address.unlink(missing_ok=True)
            return _Server(address, owner)
        return connection


def _hand_over(connection: socket.socket, request: dict[str, Any]) -> bool:
    """Whether the server has forked for it."""
    body = json.dumps(request).encode()
    try:
        with connection:
            socket.send_fds(connection, [len(body).to_bytes(8, "big")], [0, 1, 2])
            connection.sendall(body)
            return connection.recv(1) == _FORKED
    except OSError:
        return False


def _tell_why(hindrance: str) -> None:
    sys.stderr.write(f"no fork server here: {hindrance}\n")


def _start_as_ray_would(request: dict[str, Any]) -> NoReturn:
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)  # who was to be a server has left the group that Ray gave it
    os.execve(sys.executable, [sys.executable, *request["arguments"]], request["environment"])


class _Server:
    """Listens from its making on, so that others may come while it imports."""

    def __init__(self, address: Path, owner: int) -> None:
        raylet = int(os.environ["RAY_RAYLET_PID"])
        self._group = os.getpgid(raylet)
        self._ends_with = [os.pidfd_open(one) for one in (raylet, owner) if one]
        self._keep_ms = None if owner else _KEEP_S * 1000
        self._children: dict[int, int] = {}
        self._listener = socket.socket(socket.AF_UNIX)
        before = os.umask(0o077)  # requests have the environment of a worker, and whoever asks has code run
        self._listener.bind(str(address))
        os.umask(before)
        self._listener.listen(_BACKLOG)

    def serve(self, modules: Sequence[str], first: dict[str, Any]) -> dict[str, Any] | None:
        """Fork until the raylet or the owner has ended, or nothing was asked for in a while.

        Returns:
            In each process that was forked, its request. In the server None, if it cannot fork: it listens no more.
        """
        signal.signal(signal.SIGALRM, lambda *_: _start_as_ray_would(first))
        signal.setitimer(signal.ITIMER_REAL, _PATIENCE_S)
        hindrance = self._prepare(modules)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        if hindrance is not None:
            _tell_why(hindrance)
            self._listener.close()
            return None
        request = self._fork(first)
        while request is None:
            ready = self._wait()
            if not ready or not ready.isdisjoint(self._ends_with):
                sys.exit(0)
            if self._listener.fileno() in ready:
                request = self._answer()
        return request

    def _prepare(self, modules: Sequence[str]) -> str | None:
        """Import, and tell what is in the way of forking."""
        os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's, which begins threads when it is imported
        gc.disable()  # thousands of modules make no garbage
        try:
            os.setpgid(0, self._group)  # out of the group that Ray ends with the worker it meant to start
            for module in modules:
                importlib.import_module(module)
            gc.freeze()  # or the first collection of every child copies all of its memory
            return _hindrance()
        except Exception as error:  # of a module it is any
            return f"{type(error).__name__}: {error}"
        finally:
            gc.enable()

    def _wait(self) -> set[int]:
        """What is ready, or has ended; children that have are seen to. Nothing, if nobody has come in time."""
        poll = select.poll()
        for one in (self._listener.fileno(), *self._ends_with, *self._children):
            poll.register(one, select.POLLIN)
        ready = {one for one, _ in poll.poll(None if self._children else self._keep_ms)}
        for one in self._children.keys() & ready:
            os.waitpid(self._children.pop(one), 0)
            os.close(one)
        return ready

    def _answer(self) -> dict[str, Any] | None:
        connection, _ = self._listener.accept()
        with connection:
            try:
                streams, request = _receive(connection)
            except (OSError, ValueError):  # it went away
                return None
            forked = self._fork(request, streams)
            if forked is None:
                with contextlib.suppress(OSError):
                    connection.sendall(_FORKED)
            for one in streams:
                os.close(one)
            return forked

    def _fork(self, request: dict[str, Any], streams: Sequence[int] = ()) -> dict[str, Any] | None:
        """Returns the request in the child."""
        child = os.fork()
        if child:
            self._children[os.pidfd_open(child)] = child
            return None
        os.setpgid(0, 0)  # as Ray has its workers
        for target, one in enumerate(streams):
            os.dup2(one, target)
        self._listener.close()
        for one in (*self._ends_with, *self._children):
            os.close(one)
        return request


def _hindrance() -> str | None:
    """What a forked process would not have, or not be able to use."""
    threads = {path.read_text().strip() for path in Path("/proc/self/task").glob("[0-9]*/comm") if _is_other(path)}
    if threads - _SURVIVE_FORKS:
        return f"imports began threads ({', '.join(sorted(threads))}), which do not live on in a forked process"
    opened = {os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}
    devices = sorted(path for path in opened if path.startswith(_DEVICES))
    if devices:
        return f"imports opened {', '.join(devices)}, which a forked process cannot use"
    return None


def _is_other(comm: Path) -> bool:
    return comm.parent.name != str(threading.get_native_id())


def _receive(connection: socket.socket) -> tuple[list[int], dict[str, Any]]:
    head, streams, _, _ = socket.recv_fds(connection, 8, 3)
    size, body = int.from_bytes(head, "big"), b""
    while len(body) < size:
        part = connection.recv(size - len(body))
        if not part:
            for one in streams:
                os.close(one)
            raise ConnectionResetError("it ended in the middle of its request")
        body += part
    return streams, json.loads(body)


def _be_it(request: dict[str, Any]) -> None:
    """What `python ARGUMENTS` does in the request's environment and folder."""
    for name in os.environ.keys() - request["environment"].keys():
        del os.environ[name]
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    script = next(number for number, one in enumerate(request["arguments"]) if not one.startswith("-"))
    sys.argv[:] = request["arguments"][script:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
