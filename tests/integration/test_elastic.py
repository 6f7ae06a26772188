"""One run with one to two workers on a real cluster: a node is lost, a node comes, a cloud gives notice of another."""

from __future__ import annotations

import io
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.cli import main
from cluster.demo_run import Terminal
from tests.chaos import measure
from tests.chaos.nodes import Cluster, send
from tests.chaos.scene import Job, Scene
from tests.cluster.metadata_server import MetadataServer, serve_metadata

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

NUM_STEPS, CADENCE = 200, 10
RESIZE_S, STABLE_S, SPARE_S = 20.0, 5.0, 3.0
"""An attempt is left alone for so long, and new nodes have been there for so long."""
NOTICE_S = 120.0


@pytest.fixture(scope="module")
def terminal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    with Terminal(tmp_path_factory.mktemp("elastic") / "log", Console(file=io.StringIO())) as terminal:
        yield terminal


@pytest.fixture(scope="module")
def job(photos: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Job:
    url = str(tmp_path_factory.mktemp("elastic") / "dataset")
    assert main(["shard", str(photos[0].parents[1]), url, "--num-workers", "1", "--shard-bytes", "300000"]) == 0
    # Workers are frozen here without being killed for it. What waits for the next attempt would only take CPUs.
    return Job(url, NUM_STEPS, CADENCE, ("--parallel.precision", "fp32", "--silence-timeout-s", "120", "--no-standby"))


@pytest.fixture(scope="module")
def cloud() -> Iterator[MetadataServer]:
    """What the third node takes for its machine's metadata service."""
    with serve_metadata("ec2") as cloud:
        yield cloud


@pytest.fixture(scope="module")
def cluster(cloud: MetadataServer) -> Iterator[Cluster]:
    """A head, and two nodes that hold a worker each."""
    with Cluster({}, {"node-3": cloud.environment()}) as cluster:
        cluster.start()
        cluster.add_nodes(2)
        yield cluster


@contextmanager
def frozen(scene: Scene) -> Iterator[None]:
    """The newest attempt's workers stand still, so that what takes time takes no steps."""
    pids = scene.last_event("start")["pids"]
    for pid in pids:
        send(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            send(pid, signal.SIGCONT)


def wait_until(unix_s: float) -> None:
    time.sleep(max(0.0, unix_s - time.time()))


def noticed(scene: Scene) -> bool:
    return any(event["event"] == "notice" for event in scene.watcher.events)


def disturb(scene: Scene, cloud: MetadataServer) -> str:
    """Lose a node, add one, and give notice of that; returns its id."""
    scene.wait_for_step(CADENCE + 2)
    lost = scene.rank_node(1)
    scene.strike(f"SIGKILL to {lost.name}", lambda: scene.cluster.lose(lost))

    scene.wait_for_attempt(2)
    with frozen(scene):
        scene.cluster.add_nodes(1)
        wait_until(max(scene.last_event("placed")["time"] + RESIZE_S, time.time()) + STABLE_S + SPARE_S)

    scene.wait_for_attempt(3)
    leaving = scene.cluster.nodes[-1]
    assert leaving.name == "node-3"
    name = leaving.ray_id()
    with frozen(scene):
        scene.strike(f"spot notice to {leaving.name}", lambda: cloud.notify(time.time() + NOTICE_S))
        scene.wait("the notice", lambda: noticed(scene))
    scene.finish()
    return name


def steps(history: measure.History, start: dict[str, Any]) -> list[int]:
    """All that the attempt of this `start` has done, in order."""
    return [record["step"] for attempt, record in history.records if attempt == start["attempt"]]


def test_a_run_of_one_to_two_workers_goes_through_a_loss_a_new_node_and_a_notice(
    terminal: Terminal, job: Job, cloud: MetadataServer, cluster: Cluster, tmp_path: Path
) -> None:
    with Scene(terminal, job, str(tmp_path / "fixed"), "2", cluster, tmp_path) as scene:
        scene.finish()
    fixed = measure.read_history(scene.run)
    with Scene(terminal, job, str(tmp_path / "elastic"), "1:2", cluster, tmp_path) as scene:
        leaving = disturb(scene, cloud)
    history = measure.read_history(scene.run)

    starts = [dict(event) for event in history.events if event["event"] == "start"]
    assert [start["world_size"] for start in starts] == [2, 1, 2, 1], scene.driver.words()
    outcomes = [event["outcome"] for event in history.events if event["event"] == "ended"]
    assert outcomes[-3:] == ["resized", "moved", "finished"]
    assert set(outcomes[:-3]) == {"lost"}  # twice, where Ray still took the lost node for a place
    (notice,) = [event for event in history.events if event["event"] == "notice"]
    assert (notice["node"], notice["action"]) == (leaving, "move")
    assert notice["deadline"] == pytest.approx(scene.faults[-1] + NOTICE_S, abs=5)

    # The lost attempt goes back to a checkpoint. Who is asked to stop goes on where it stopped: no step is done twice.
    assert starts[1]["step"] % CADENCE == 0
    assert starts[1]["step"] >= CADENCE
    first, second, third, last = (steps(history, start) for start in starts)
    assert second == list(range(starts[1]["step"] + 1, starts[2]["step"] + 1))
    assert third == list(range(starts[2]["step"] + 1, starts[3]["step"] + 1))
    assert last == list(range(starts[3]["step"] + 1, NUM_STEPS + 1))
    times = Counter([*first, *second, *third, *last])
    assert all(num == 1 or step in first for step, num in times.items())

    assert measure.samples_wrong(history, job.dataset, NUM_STEPS) == 0
    assert measure.loss_difference(history, fixed) < 1e-4
