"""Turns: of several processes one runs and all others are stopped, so that all are measured in the same weather.

A shared machine may be half again as fast in one minute as in the next. What takes turns within seconds is compared
within them.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from benchmarks.peers.step_models import Spec
from cluster.host_memory import keep_freed

_TIMEOUT_S = 600.0
_POLL_S = 1.0
_END_S = 60.0


@dataclass(frozen=True)
class Plan:
    """How much each process runs, after what warms it up."""

    num_turns: int
    num_steps: int
    """Of each turn."""


class Turns:
    """The end of a process that is measured.

    Args:
        address: of the parent's socket, in a folder that is the row's own; the parent removes it.
        plan: how often its turn comes.
    """

    def __init__(self, address: str, plan: Plan) -> None:
        self.plan, self.folder = plan, Path(address).parent
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(address)
        self._stream = self._socket.makefile("rw")

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for a turn; what the body takes is measured: seconds, and CPU seconds of this process's threads."""
        self.tell({})
        self._stream.readline()
        started, cpu_started = time.perf_counter(), time.process_time()
        yield
        self.tell({"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu_started})

    def take(self, one_step: Callable[[], object]) -> None:
        """Warm up with one step, and take all turns."""
        one_step()
        for _ in range(self.plan.num_turns):
            with self.turn():
                for _ in range(self.plan.num_steps):
                    one_step()

    def tell(self, found: dict[str, Any]) -> None:
        """Tell the parent."""
        self._stream.write(json.dumps(found) + "\n")
        self._stream.flush()


class RowError(Exception):
    """A row does not run, and why."""


class Contender:
    """The parent's end: a process tree that is stopped except when it is its turn. A context manager, which ends it.

    Args:
        spec: what it trains.
        plan: how often its turn comes.
        count: whether it is to count operations and memory in the end.
        log: gets what it says.

    Raises (all methods):
        RowError: it failed, or did not answer.
    """

    def __init__(self, spec: Spec, plan: Plan, count: bool, log: Path) -> None:
        self._spec, self._plan, self._count, self._log = spec, plan, count, log
        self._ends = ExitStack()  # closing it again does nothing
        self.said: dict[str, Any] = {}
        """After the last turn, what it has to say in the end; before that nothing."""

    def __enter__(self) -> Contender:
        """Nothing runs before `start`."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        self.end()

    def start(self) -> None:
        """Begin, and wait until it is warm."""
        folder = self._ends.enter_context(tempfile.TemporaryDirectory(prefix="tarmac-bench-step-"))
        server = self._ends.enter_context(socket.socket(socket.AF_UNIX))
        address = str(Path(folder, "turns"))
        server.bind(address)
        server.listen()
        server.settimeout(_POLL_S)
        arguments = [json.dumps(asdict(self._spec)), json.dumps(asdict(self._plan)), str(int(self._count)), address]
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.peers.step_runner", *arguments]
        errors = self._ends.enter_context(self._log.open("a"))
        environment = os.environ | (keep_freed() if self._spec.as_worker else {})
        self._process = subprocess.Popen(command, stdout=errors, stderr=errors, env=environment, start_new_session=True)
        self.pid = self._process.pid
        self._ends.callback(self._kill)
        connection = self._ends.enter_context(self._accept(server))
        connection.settimeout(_TIMEOUT_S)
        self._stream = self._ends.enter_context(connection.makefile("rw"))
        self._hear()
        self._signal(signal.SIGSTOP)

    def end(self) -> None:
        """Kill what is left of it."""
        self._ends.close()

    def turn(self) -> dict[str, float]:
        """Let it take one turn: what that took."""
        self._signal(signal.SIGCONT)
        self._stream.write("\n")
        self._stream.flush()
        found = self._hear()
        self.said = self._hear()
        self._signal(signal.SIGSTOP)
        return found

    def _accept(self, server: socket.socket) -> socket.socket:
        deadline = time.monotonic() + _TIMEOUT_S
        while time.monotonic() < deadline:
            with suppress(TimeoutError):
                return server.accept()[0]
            if self._process.poll() is not None:
                raise self._failed()
        raise RowError(f"not begun within {_TIMEOUT_S:.0f} s")

    def _hear(self) -> dict[str, Any]:
        try:
            line = self._stream.readline()
        except TimeoutError:
            raise RowError(f"no answer within {_TIMEOUT_S:.0f} s") from None
        if not line:
            raise self._failed()
        found: dict[str, Any] = json.loads(line)
        return found

    def _failed(self) -> RowError:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return RowError(lines[-1][:300] if lines else f"exit code {self._process.returncode}")

    def _signal(self, number: signal.Signals) -> None:
        """To all of the tree: under Ray there are many, in sessions of their own."""
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self._process.pid)
            for one in (process, *process.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    one.send_signal(number)

    def _kill(self) -> None:
        self._signal(signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
