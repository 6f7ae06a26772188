"""Processes of a raylet that are forked: a `sleep` stands in for the raylet, and scripts for Ray's worker."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.fork_server import command

SCRIPT = """
import json, os, random, sys, threading, uuid
out, wait = sys.argv[1], sys.argv[-1]
about = {
    "name": __name__, "file": __file__, "argv": sys.argv, "path": sys.path[0], "folder": os.getcwd(),
    "environment": dict(os.environ), "pid": os.getpid(), "parent": os.getppid(), "group": os.getpgrp(),
    "imported": "decimal" in sys.modules, "random": random.random(), "uuid": str(uuid.uuid4()),
}
if "ray._raylet" in sys.modules:
    about["ray"] = sys.modules["ray._raylet"].ObjectID.from_random().hex()
print("to stdout", flush=True)
print("to stderr", file=sys.stderr, flush=True)
with open(out + ".new", "w") as file:
    json.dump(about, file)
os.rename(out + ".new", out)
if wait == "--wait":
    sys.stdin.read()
"""


class Node:
    """What a raylet gives its processes, and where these tell of themselves."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.raylet = subprocess.Popen(["sleep", "600"], process_group=0)
        self.script = folder / "worker.py"
        self.script.write_text(SCRIPT)
        self.started: list[subprocess.Popen[bytes]] = []

    def start(
        self,
        name: str,
        modules: str = "decimal",
        *,
        job: str = "01",
        owner: int = 0,
        wait: bool = True,
        **variables: str,
    ) -> dict[str, Any]:
        """Start a process as Ray does, and return what it says of itself. With `wait` it lives until the test ends."""
        out = self.folder / name
        arguments = [str(self.script), str(out), f"--raylet-name={self.folder}/raylet", "--runtime-env-hash=7"]
        line = f"exec {command([modules], owner=owner)} {' '.join(arguments)} {'--wait' if wait else '--end'}"
        environment = os.environ | {"RAY_RAYLET_PID": str(self.raylet.pid), "RAY_JOB_ID": job} | variables
        where = self.folder / f"{name}.folder"
        where.mkdir()
        with open(self.folder / f"{name}.out", "wb") as stdout, open(self.folder / f"{name}.err", "wb") as stderr:
            started = subprocess.Popen(
                ["bash", "-c", line],
                env=environment,
                cwd=where,
                stdin=subprocess.PIPE,
                stdout=stdout,
                stderr=stderr,
                process_group=0,
            )
        self.started.append(started)
        wait_for(out.exists, f"{name} to begin: {(self.folder / f'{name}.err').read_text()}")
        return dict(json.loads(out.read_text()))

    def said(self, name: str) -> tuple[str, str]:
        """Its stdout and stderr."""
        return (self.folder / f"{name}.out").read_text(), (self.folder / f"{name}.err").read_text()

    def close(self) -> None:
        """End what may be left."""
        self.raylet.kill()
        self.raylet.wait()
        for one in self.started:
            assert one.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                one.stdin.close()
            one.wait(30)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    found = Node(tmp_path)
    yield found
    found.close()


def wait_for(condition: Any, what: str) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, f"waited for {what}"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Neither gone nor a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_every_process_is_forked_from_the_first_and_is_as_if_it_had_been_started(node: Node) -> None:
    first, second = node.start("first", MINE="1"), node.start("second", MINE="2")
    server = node.started[0].pid
    assert (first["parent"], second["parent"]) == (server, server)
    assert node.started[1].wait(30) == 0, "who has handed its request over ends"
    for name, mine, found in (("first", "1", first), ("second", "2", second)):
        assert found["imported"]
        assert (found["name"], found["file"], found["path"]) == ("__main__", str(node.script), str(node.folder))
        assert found["argv"][:2] == [str(node.script), str(node.folder / name)]
        assert found["folder"] == str(node.folder / f"{name}.folder")
        assert found["environment"]["MINE"] == mine
        assert "OPENBLAS_NUM_THREADS" not in found["environment"].keys() - os.environ.keys()
        assert found["group"] == found["pid"]
        assert node.said(name) == ("to stdout\n", "to stderr\n")


def test_forked_processes_do_not_draw_the_same_random_numbers(node: Node) -> None:
    found = [node.start(name, "ray._raylet,decimal") for name in ("first", "second", "third")]
    for what in ("random", "uuid", "ray"):
        assert len({one[what] for one in found}) == 3, what


def test_only_its_user_may_ask_a_server(node: Node) -> None:
    before = os.umask(0)
    try:
        node.start("first")
    finally:
        os.umask(before)
    (address,) = (path for path in node.folder.iterdir() if path.is_socket())
    assert address.stat().st_mode & 0o077 == 0
    assert (node.folder / "first").stat().st_mode & 0o077 == 0o066, "its worker has the mask that it was given"


def test_the_end_of_a_worker_and_of_its_group_is_not_the_servers(node: Node) -> None:
    """Ray ends a worker's group with it: that of the process that it started, too."""
    first = node.start("first")
    server = node.started[0].pid
    os.kill(first["pid"], signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server, signal.SIGKILL)
    wait_for(lambda: not Path(f"/proc/{first['pid']}").exists(), "the server to see to its child")
    assert node.start("second")["parent"] == server


def test_a_server_ends_with_its_raylet(node: Node) -> None:
    node.start("first")
    node.raylet.kill()
    assert node.started[0].wait(30) == 0


def quick(monkeypatch: pytest.MonkeyPatch, modules: str, **constants: float) -> None:
    """Servers of these modules that have other constants."""
    changes = "".join(f"server.{name} = {value}; " for name, value in constants.items())
    program = f"import cluster.fork_server as server; {changes}server.main()"
    monkeypatch.setattr(f"{__name__}.command", lambda _, owner: f"{sys.executable} -c '{program}' {modules} {owner}")


def test_a_server_without_children_ends_after_a_while(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch, "decimal", _KEEP_S=0.5)
    node.start("first", wait=False)
    assert node.started[0].wait(30) == 0


def test_a_server_with_an_owner_ends_with_it_alone(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of its children may live for as long as the cluster: Ray Train's controllers start such an actor."""
    quick(monkeypatch, "decimal", _KEEP_S=0.2)
    with subprocess.Popen(["sleep", "600"]) as owner:
        child = node.start("first", owner=owner.pid)
        node.start("second", owner=owner.pid, wait=False)
        time.sleep(1)
        assert node.start("third", owner=owner.pid, wait=False)["parent"] == node.started[0].pid
        owner.kill()
    assert node.started[0].wait(30) == 0
    assert alive(child["pid"])


def test_imports_that_take_long_are_not_waited_for(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would kill the process; as it starts one, imports come later."""
    (node.folder / "slow.py").write_text("import time\ntime.sleep(600)")
    quick(monkeypatch, "slow", _PATIENCE_S=0.5)
    for number, name in enumerate(("first", "second")):
        assert node.start(name, PYTHONPATH=str(node.folder))["pid"] == node.started[number].pid


def test_where_a_server_was_killed_the_next_process_is_one(node: Node) -> None:
    node.start("first")
    os.kill(node.started[0].pid, signal.SIGKILL)
    node.started[0].wait(30)
    assert node.start("second")["parent"] == node.started[1].pid


def test_jobs_do_not_share_a_server(node: Node) -> None:
    """Ray's library has read the job's number when it was imported."""
    node.start("first")
    assert node.start("second", job="02")["parent"] == node.started[1].pid


THREAD = """
import threading, time
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
"""
DEVICE = """
import sys
sys.modules["__main__"]._DEVICES = ("/dev/zero",)
opened = open("/dev/zero")
"""


@pytest.mark.parametrize(
    ("module", "why"),
    [(THREAD, "began threads"), ("raise ValueError('not here')", "ValueError: not here"), (DEVICE, "/dev/zero")],
)
def test_what_cannot_be_forked_is_started_as_ray_would(node: Node, module: str, why: str) -> None:
    (node.folder / "hindering.py").write_text(module)
    for number, name in enumerate(("first", "second")):
        found = node.start(name, "hindering", PYTHONPATH=str(node.folder))
        assert (found["pid"], found["imported"]) == (node.started[number].pid, False)
        assert found["group"] == found["pid"], "Ray ends a worker's group with it, and the raylet's is another"
        assert found["argv"][0] == str(node.script)
        assert why in node.said(name)[1]
        assert "OPENBLAS_NUM_THREADS" not in found["environment"].keys() - os.environ.keys()


def test_what_is_not_started_by_a_raylet_is_started_as_it_is(node: Node) -> None:
    found = node.start("first", RAY_RAYLET_PID="none")
    assert found["pid"] == node.started[0].pid
    assert "no fork server here: ValueError" in node.said("first")[1]
