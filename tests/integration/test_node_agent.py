"""Agents on a real two-node cluster: a cloud's notice becomes a drain and reaches the relay; kill() kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from cluster.draining import alive_nodes, draining_nodes
from cluster.node_agent import NodeAgents
from cluster.processes import start_time
from tests.cluster.metadata_server import MetadataServer, serve_metadata

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

DRIVER = """
import sys, time, ray
from cluster.node_agent import NodeAgents
ray.init(sys.argv[1], log_to_driver=False)
agents = NodeAgents()
while True:
    agents.refresh()
    time.sleep(0.2)
"""


def start_relay(node: str) -> Any:
    """Stands where the driver's relay does."""

    class Notices:  # in a function, so that Ray sends it by value: workers cannot import this file
        def __init__(self) -> None:
            self.notices: list[dict[str, Any]] = []

        def note_notice(self, notice: dict[str, Any]) -> None:
            self.notices.append(notice)

        def noted(self) -> list[dict[str, Any]]:
            return self.notices

    return ray.remote(Notices).options(num_cpus=0, label_selector={"ray.io/node-id": node}).remote()


@pytest.fixture(scope="module")
def metadata() -> Iterator[MetadataServer]:
    with serve_metadata("gcp") as server:
        yield server


@pytest.fixture(scope="module")
def cluster(metadata: MetadataServer) -> Iterator[Cluster]:
    """A head, and a node that takes itself for a Spot VM of Compute Engine."""
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.add_node(num_cpus=1, env_vars=metadata.environment())
    cluster.wait_for_nodes()
    ray.init(cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def spot_node(cluster: Cluster) -> str:
    return str(next(iter(cluster.worker_nodes)).node_id)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def agent_pids(cluster: Cluster) -> set[int]:
    """Of this cluster: others may run on this machine."""
    raylets = {node.all_processes["raylet"][0].process.pid for node in cluster.list_all_nodes()}
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            title, stat = (path / "cmdline").read_text(), (path / "stat").read_text()
        except OSError:
            continue
        if title.startswith("ray::NodeAgent") and int(stat.rpartition(")")[2].split()[1]) in raylets:
            found.add(int(path.name))
    return found


def test_agents_end_with_a_driver_that_is_killed(cluster: Cluster) -> None:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, cluster.address])
    wait_for(lambda: len(agent_pids(cluster)) == 2)
    driver.kill()
    driver.wait()
    wait_for(lambda: not agent_pids(cluster))


def test_a_notice_drains_its_node_and_reaches_the_relay(cluster: Cluster, metadata: MetadataServer) -> None:
    spot = spot_node(cluster)
    relay = start_relay(cluster.head_node.node_id)
    agents = NodeAgents(relay)
    agents.refresh()
    wait_for(lambda: len(agent_pids(cluster)) == 2)

    frozen = subprocess.Popen(["sleep", "600"])
    os.kill(frozen.pid, signal.SIGSTOP)
    started = start_time(frozen.pid)
    assert started is not None
    agents.kill(spot, frozen.pid, started + 1)  # what was meant has ended, and another has its pid
    agents.kill("00" * 28, frozen.pid, started)  # no such node
    bystander = subprocess.Popen(["sleep", "600"])
    agents.kill(spot, bystander.pid, start_time(bystander.pid) or 0)
    assert bystander.wait(60) == -signal.SIGKILL
    assert frozen.poll() is None  # calls of one actor are in order
    agents.kill(spot, frozen.pid, started)
    assert frozen.wait(60) == -signal.SIGKILL
    assert start_time(frozen.pid) is None

    assert draining_nodes() == {}
    metadata.maintenance = "TERMINATE_ON_HOST_MAINTENANCE"
    wait_for(lambda: bool(draining_nodes()))
    assert draining_nodes() == {spot: None}
    earliest = time.time() + 20
    metadata.preempted = "TRUE"
    wait_for(lambda: draining_nodes() != {spot: None})
    deadline = draining_nodes()[spot]
    assert deadline is not None
    assert earliest <= deadline <= time.time() + 30
    wait_for(lambda: len(ray.get(relay.noted.remote())) == 2)
    notices = ray.get(relay.noted.remote())
    assert [(notice["node"], notice["source"]) for notice in notices] == [(spot, "gcp")] * 2
    assert [notice["deadline"] for notice in notices] == [None, pytest.approx(deadline, abs=0.001)]

    agents.refresh()
    assert spot in (alive_nodes() or ())  # the agent keeps it up
    agents.refresh(without={spot})
    wait_for(lambda: spot not in (alive_nodes() or ()))
    agents.refresh()
    wait_for(lambda: len(agent_pids(cluster)) == 1)
