"""A Ray cluster on loopback whose nodes can be lost one by one, as machines are.

Each node is a `ray start --block` in a session of its own and has a loopback address of its own. A process belongs to
the node in whose session it is, so nothing but the cluster's own processes is ever signalled.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[2]
HEAD = "127.0.0.2"  # Ray would put the machine's own address in 127.0.0.1's place
AGENTS = ("dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent", "metrics-export")
START_TRIES = 4
KILL_TIMEOUT_S = 10.0
STARTED = "Ray runtime started"
WORKER = "ray::RayTrainWorker"
"""How Ray titles the processes of a Ray Train worker group."""
PREEMPTION = 2  # DRAIN_NODE_REASON_PREEMPTION of Ray's autoscaler protocol


class NodeError(Exception):
    """A node did not start, or has not the process that was asked for."""


@dataclass(frozen=True)
class Node:
    """A `ray start --block`, with all that it started."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def pids(self) -> list[int]:
        """Its processes that are not dead."""
        return sorted(pid for pid, session in _sessions() if session == self.process.pid)

    def worker_pids(self) -> list[int]:
        """Its Ray Train workers."""
        return [pid for pid in self.pids() if _command(pid).startswith(WORKER)]

    def raylet_pid(self) -> int:
        """Its raylet. NodeError if there is none."""
        return self._raylet()[0]

    def ray_id(self) -> str:
        """Ray's id of it, as its raylet was told. NodeError if there is none."""
        _, words = self._raylet()
        return next(word.partition("=")[2] for word in words if word.startswith("--node_id="))

    def is_up(self) -> bool:
        """Whether `ray start` said so. NodeError if it ended."""
        if STARTED in self.log.read_text(errors="replace"):
            return True
        if self.process.poll() is not None:
            raise NodeError(f"node {self.name} did not start:\n{self.log.read_text(errors='replace')[-2000:]}")
        return False

    def terminate(self) -> None:
        """SIGTERM to `ray start`, as Kubernetes and systemd send it before they kill."""
        self.process.terminate()

    def kill(self) -> None:
        """SIGKILL to everything on it, as if the power went off."""
        deadline = time.monotonic() + KILL_TIMEOUT_S
        while pids := self.pids():
            if time.monotonic() > deadline:
                raise NodeError(f"node {self.name}: processes {pids} survive SIGKILL for {KILL_TIMEOUT_S:g} s")
            for pid in pids:
                send(pid, signal.SIGKILL)
            self.process.poll()  # reaps it
            time.sleep(0.02)
        self.process.wait()

    def _raylet(self) -> tuple[int, list[str]]:
        for pid in self.pids():
            words = _command(pid).split("\0")
            if words[0].endswith("/raylet"):
                return pid, words
        raise NodeError(f"node {self.name} has no raylet; is it dead already?")


@dataclass
class Cluster:
    """A head without CPUs, for the driver, and nodes with one logical CPU each: a worker needs a node of its own.

    A context manager; leaving it kills every process of it.
    """

    environment: Mapping[str, str]
    """Added to ours, for every node: what workers need to find the store."""
    by_node: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Added for single nodes, by name."""
    nodes: list[Node] = field(default_factory=list)
    """Those that are not lost, the head first."""

    def __post_init__(self) -> None:
        # Ray's sockets lie below it, and the path of a socket has at most 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="chaos-"))
        self.address = f"{HEAD}:{_free_port()}"
        self._num_nodes = self._num_addresses = 0

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self) -> None:
        """Start the head."""
        port = self.address.rpartition(":")[2]
        options = ("--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false", "--no-monitor")
        self._start("head", *options, f"--temp-dir={self.folder / 'ray'}")

    def add_nodes(self, num_nodes: int) -> None:
        """Start more nodes, and wait until they are part of the cluster."""
        for _ in range(num_nodes):
            self._num_nodes += 1
            self._start(f"node-{self._num_nodes}", f"--address={self.address}", "--num-cpus=1")

    def make_whole(self, num_nodes: int) -> None:
        """Have that many nodes beside the head: dead ones are forgotten, newer ones lost, missing ones started."""
        for node in [node for node in self.nodes if node.process.poll() is not None]:
            self.lose(node)
        for node in self.nodes[1 + num_nodes :]:
            self.lose(node)
        self.add_nodes(1 + num_nodes - len(self.nodes))

    def node_of(self, pid: int) -> Node:
        """The node that a process is on."""
        session = os.getsid(pid)
        return next(node for node in self.nodes if node.process.pid == session)

    def working(self) -> list[Node]:
        """The nodes that have a Ray Train worker, in the order of their start."""
        return [node for node in self.nodes if node.worker_pids()]

    def lose(self, node: Node) -> None:
        """SIGKILL everything on a node and forget it."""
        node.kill()
        self.nodes.remove(node)

    def drain(self, node: Node, seconds: float) -> None:
        """Tell Ray that a node will be preempted, as an autoscaler or a watcher of the cloud's notices does."""
        from ray._raylet import GcsClient

        deadline_ms = int((time.time() + seconds) * 1000)
        client = GcsClient(address=self.address)
        accepted, reason = client.drain_node(node.ray_id(), PREEMPTION, "chaos: a spot notice", deadline_ms)
        if not accepted:
            raise NodeError(f"Ray does not drain {node.name}: {reason}")

    def kill(self) -> None:
        """SIGKILL all of it."""
        while self.nodes:
            self.lose(self.nodes[-1])

    def _launch(self, name: str, *options: str) -> Node:
        self._num_addresses += 1
        ray = Path(sys.executable).with_name("ray")
        common = (
            "--block",
            "--disable-usage-stats",
            "--include-log-monitor=false",
            "--object-store-memory=100000000",
            f"--node-name={name}",
        )
        # Its own address: Ray takes two raylets on one address for two of the same machine.
        address = f"--node-ip-address={HEAD if name == 'head' else f'127.0.0.{3 + self._num_addresses % 250}'}"
        # Ray chooses them itself too, but then a node waits for them, and gives up after 15 s.
        ports = [f"--{agent}-port={_free_port()}" for agent in AGENTS]
        log, own = self.folder / f"{name}.log", self.by_node.get(name, {})
        with log.open("wb") as output:
            process = subprocess.Popen(
                [str(ray), "start", *options, *common, address, *ports, "--min-worker-port=0", "--max-worker-port=0"],
                env={**os.environ, **ray_environment(), **self.environment, **own, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        node = Node(name, process, log)
        self.nodes.append(node)
        return node

    def _start(self, name: str, *options: str) -> None:
        """Until it is up. Ray gives a node half a minute, which on a busy machine may need another try."""
        for left in reversed(range(START_TRIES)):
            node = self._launch(name, *options)
            try:
                while not node.is_up():
                    time.sleep(0.1)
                return
            except NodeError:
                self.lose(node)
                if not left:
                    raise


def ray_environment() -> dict[str, str]:
    """For nodes and drivers: this checkout's modules, and Ray as it is for loopback."""
    path = os.environ.get("PYTHONPATH")
    return {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{path}" if path else str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_worker_niceness": "0",  # Ray's 15 starves workers on a machine that does anything else
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


def send(pid: int, number: signal.Signals) -> bool:
    """Send a signal; whether the process was there."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _sessions() -> list[tuple[int, int]]:
    """Process id and session of every process that is not dead."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # The program's name is in parentheses and may hold anything.
            state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it ended meanwhile
            continue
        if state not in "ZX":
            found.append((int(folder.name), int(session)))
    return found


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HEAD, 0))
        return int(probe.getsockname()[1])
