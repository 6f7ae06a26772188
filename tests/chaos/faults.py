"""The rows of `make chaos`: what is done to a run, on what cluster, and what it must show.

Each function is given a run that trains, and returns when everything has been done to it; the run then has to end by
itself.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from cluster.cloud_notices import Cloud
from cluster.demo_run import StepError
from tests.chaos.measure import History, summary
from tests.chaos.nodes import send
from tests.chaos.scene import Scene
from tests.pipeline.faulty_proxy import Action
from trainer.checkpoint import newest_step
from trainer.checkpoint_commit import step_directory

NOTICE_S = 30.0
EC2_NOTICE_S = 120.0
SHORT_NOTICE_S = 15.0
OUTAGE_S = 60.0
NEW_DRIVER = "the next driver is started by somebody else"
KILL, STOP = signal.SIGKILL, signal.SIGSTOP


@dataclass(frozen=True)
class Row:
    """A fault."""

    name: str
    what: str
    """For the table."""
    disturb: Callable[[Scene], None]
    num_nodes: int = 3
    """Each holds one worker; what is more than the workers is spare."""
    num_workers: str = "2"
    notice: bool = False
    """It is told beforehand: no step may be lost."""
    resized: bool = False
    """The number of workers changes on the way: the losses agree, the weights' last bits need not."""
    timed: bool = False
    """A kill with a spare, or a step down: training has to go on within `goals.BACK_WITHIN_S`."""
    timed_from_last: bool = False
    """Training does not go on between its faults: the time is that from the last."""
    exempt: str = ""
    """Why it has no goal for that time though something died or hung; the time is shown all the same."""
    demo_model: bool = False
    """It trains the demo's recipe, not a smaller one; no undisturbed run is there to compare losses and weights to."""
    is_long: bool = False
    """What it is about takes longer than the steps of the others."""
    max_cadences_lost: int = 1
    in_save: bool = False
    """It ends in a save, beside which it trains on: those steps are beyond the cadence."""
    check: Callable[[Scene, History], None] = lambda scene, history: None
    """Called when the run has ended; StepError if something else is not as it should be."""
    cloud: Cloud | None = None
    """The nodes have its metadata service."""
    proxied: bool = False
    """The store is behind a proxy that lets the row see the requests."""


def strike_step(scene: Scene) -> int:
    """Past the second checkpoint, and well before the next: there is something to lose."""
    return 2 * scene.job.cadence + scene.job.cadence * 2 // 5


def worker_killed(scene: Scene) -> None:
    scene.wait_for_step(strike_step(scene))
    scene.strike("SIGKILL to rank 1", lambda: os.kill(scene.rank_pid(1), KILL))


def worker_frozen(scene: Scene) -> None:
    scene.wait_for_step(strike_step(scene))
    scene.strike("SIGSTOP to rank 1", lambda: os.kill(scene.rank_pid(1), STOP))


def found_by_silence(scene: Scene, history: History) -> None:
    """StepError unless it was the watchdog that found it, once."""
    lost_by = summary(history)["lost_by"]
    if lost_by != ["silence"]:
        raise StepError(f"the frozen worker had to be found by its silence; attempts were lost by {lost_by}")


def raylet_killed(scene: Scene) -> None:
    scene.wait_for_step(strike_step(scene))
    node = scene.rank_node(1)
    scene.strike(f"SIGKILL to the raylet of {node.name}", lambda: os.kill(node.raylet_pid(), KILL))


def node_terminated(scene: Scene) -> None:
    """As a pod is deleted: SIGTERM, and SIGKILL when its grace period is over."""
    scene.wait_for_step(strike_step(scene))
    node = scene.rank_node(1)
    scene.strike(f"SIGTERM to {node.name}", node.terminate)
    scene.wait_for_attempt(2)
    scene.cluster.lose(node)


def node_drained(scene: Scene) -> None:
    """A notice of 30 s, and the node is gone."""
    scene.wait_for_step(strike_step(scene))
    node, deadline = scene.rank_node(0), time.monotonic() + NOTICE_S
    scene.strike(f"drain of {node.name}, {NOTICE_S:g} s", lambda: scene.cluster.drain(node, NOTICE_S))
    while time.monotonic() < deadline and scene.driver.code is None:
        time.sleep(0.5)
    scene.cluster.lose(node)


def cloud_notice(scene: Scene) -> None:
    """EC2's metadata service says that the instance goes in two minutes."""
    scene.wait_for_step(strike_step(scene))
    node = scene.rank_node(1)
    scene.strike(f"spot notice to {node.name}", lambda: scene.metadata[node.name].notify(time.time() + EC2_NOTICE_S))
    scene.wait_for_attempt(2)
    scene.cluster.lose(node)


def driver_killed(scene: Scene) -> None:
    scene.wait_for_step(strike_step(scene))
    scene.strike("SIGKILL to the driver", scene.driver.kill)
    scene.start_driver()


def cluster_killed(scene: Scene) -> None:
    """Head, nodes and the driver, which runs on the head; another cluster, and the same command."""
    scene.wait_for_step(strike_step(scene))

    def kill() -> None:
        scene.cluster.kill()
        scene.driver.kill()

    scene.strike("SIGKILL to the whole cluster and the driver", kill)
    scene.cluster.start()
    scene.cluster.add_nodes(2)
    scene.start_driver()


def killed_during_save(scene: Scene) -> None:
    kill_at_request(scene, "PUT", ".distcp", rank=1)


def killed_at_commit(scene: Scene) -> None:
    kill_at_request(scene, "PUT", "/commit.json", rank=0)


def killed_during_load(scene: Scene) -> None:
    """A worker is killed, and when its successors read the checkpoint, one of them."""
    scene.wait_for_step(strike_step(scene))
    seen = threading.Event()

    def on_request(request: str) -> Action | None:
        if not seen.is_set() and request.startswith("GET") and ".distcp" in request:
            seen.set()
            scene.strike("SIGKILL to a worker that reads the checkpoint", lambda: send(scene.any_worker(), KILL))
        return None

    scene.strike("SIGKILL to rank 1", lambda: os.kill(scene.rank_pid(1), KILL))
    watch_requests(scene, on_request)
    scene.wait("read of a checkpoint", seen.is_set)


def kill_at_request(scene: Scene, method: str, part: str, rank: int) -> None:
    """SIGKILL a rank when a file of the third checkpoint is sent; the file does not arrive."""
    scene.wait_for_step(strike_step(scene))
    pid, seen = scene.rank_pid(rank), threading.Event()

    def on_request(request: str) -> Action | None:
        if seen.is_set() or not request.startswith(method) or "/checkpoints/" not in request or part not in request:
            return None
        seen.set()
        scene.strike(f"SIGKILL to rank {rank} at {method} {request.rpartition('/')[2][:40]}", lambda: send(pid, KILL))
        return "reset"

    watch_requests(scene, on_request)
    scene.wait(f"{method} of {part}", seen.is_set)


def watch_requests(scene: Scene, on_request: Callable[[str], Action | None]) -> None:
    assert scene.proxy is not None
    scene.proxy.on_request = on_request


def store_down(scene: Scene) -> None:
    scene.wait_for_step(strike_step(scene))
    take_down = scene.store_down
    if take_down is None:
        raise StepError("the store keeps nothing on disk here (juicefs does not run), so it cannot go and come back")
    scene.strike(f"the store is down for {OUTAGE_S:g} s", lambda: take_down(OUTAGE_S))


def two_drivers(scene: Scene) -> None:
    """The command is given a second time while the first one trains; the first one has to finish undisturbed."""
    scene.wait_for_step(strike_step(scene))
    first = scene.driver
    scene.strike("the same command a second time", scene.start_driver)
    second = scene.drivers.pop()
    scene.drivers.insert(0, second)  # the run is the first one's
    assert scene.driver is first


def frozen_driver(scene: Scene) -> None:
    """A driver that stands still loses its lease; when it wakes, it must not touch the run.

    It is struck early: its workers train on until they would save under a lease that is no longer theirs.
    """
    scene.wait_for_step(scene.job.cadence * 2 // 5)
    first = scene.driver
    scene.strike("SIGSTOP to the driver, and the same command again", lambda: os.kill(first.process.pid, STOP))
    scene.start_driver()
    scene.wait("attempt of the second driver", lambda: scene.watcher.num_attempts > 1)
    os.kill(first.process.pid, signal.SIGCONT)


def other_refused(scene: Scene, history: History) -> None:
    """StepError unless the driver that has not the run failed, named the one that has, and began nothing any more."""
    other, holder = scene.drivers[0], scene.driver
    if other.code is None or other.code <= 0:
        raise StepError(f"the driver that has not the run ended with {other.code}, which says that nothing was wrong")
    if f"process {holder.process.pid} on " not in other.log.read_text(errors="replace"):
        raise StepError(f"the driver that has not the run does not name process {holder.process.pid}:\n{other.words()}")
    asked = [event for event in history.events if event["event"] == "asked" and event["time"] > scene.faults[0]]
    if any(event["pid"] == other.process.pid for event in asked):
        raise StepError("the driver that has not the run began an attempt")


def node_lost(scene: Scene) -> None:
    """None is there to replace it."""
    scene.wait_for_step(strike_step(scene))
    node = scene.rank_node(1)
    scene.strike(f"SIGKILL to {node.name}", lambda: scene.cluster.lose(node))


def node_added(scene: Scene) -> None:
    scene.wait_for_step(strike_step(scene))
    scene.strike("a node is added", lambda: scene.cluster.add_nodes(1))


def three_preemptions(scene: Scene) -> None:
    """As soon as it trains again, the next one; a new node comes when one goes."""
    scene.wait_for_step(strike_step(scene))
    for number in range(3):
        node = scene.rank_node(number % 2)
        scene.strike(f"drain of {node.name}", lambda node=node: scene.cluster.drain(node, SHORT_NOTICE_S))
        scene.wait_for_attempt(number + 2, num_steps=5)
        scene.cluster.lose(node)
        scene.cluster.add_nodes(1)


def newest_damaged(scene: Scene) -> None:
    """A byte of the newest checkpoint is changed, and a worker killed: the one before it has to serve."""
    scene.wait_for_step(strike_step(scene))
    directory = step_directory(newest_step(scene.store) or 0)
    name = next(entry.path for entry in scene.store.list(directory) if entry.path.endswith(".distcp"))
    data = bytearray(scene.store.read(name))
    data[len(data) // 2] ^= 1

    def damage() -> None:
        scene.store.write(name, bytes(data))
        os.kill(scene.rank_pid(1), KILL)

    scene.strike(f"a bit of {name} is changed, SIGKILL to rank 1", damage)


ROWS = (
    Row("worker-killed", "SIGKILL a worker", worker_killed, timed=True),
    Row(
        "worker-frozen",
        "SIGSTOP a worker",
        worker_frozen,
        check=found_by_silence,
        exempt="no kill: it is found by its silence, silence_timeout_s (20 s) after its last sign of life",
    ),
    Row("raylet-killed", "SIGKILL a raylet", raylet_killed, timed=True),
    Row("node-terminated", "SIGTERM a node", node_terminated, notice=True),
    Row("node-drained", "drain, notice of 30 s", node_drained, notice=True),
    Row("demo-drained", "drain, notice of 30 s, the demo's model", node_drained, notice=True, demo_model=True),
    Row("cloud-notice", "cloud metadata notice (EC2)", cloud_notice, notice=True, cloud="ec2"),
    Row("driver-killed", "SIGKILL the driver", driver_killed, exempt=NEW_DRIVER),
    Row(
        "cluster-killed",
        "SIGKILL the whole cluster, start another",
        cluster_killed,
        exempt=f"{NEW_DRIVER}, and so is the cluster",
    ),
    Row("save-killed", "SIGKILL during a save", killed_during_save, timed=True, in_save=True, proxied=True),
    Row("commit-killed", "SIGKILL at the commit", killed_at_commit, timed=True, in_save=True, proxied=True),
    Row("load-killed", "SIGKILL during a load", killed_during_load, timed=True, timed_from_last=True, proxied=True),
    Row("store-down", "the store is down for 60 s", store_down),
    Row("two-drivers", "two drivers at once", two_drivers, max_cadences_lost=0, check=other_refused),
    Row(
        "driver-frozen",
        "a driver sleeps past its lease, and wakes",
        frozen_driver,
        is_long=True,
        in_save=True,  # the first one that its workers would begin, and may not
        check=other_refused,
        exempt=NEW_DRIVER,
    ),
    Row("node-lost", "a node lost, none to replace it", node_lost, 2, "1:2", resized=True, timed=True),
    Row("node-added", "a node added", node_added, 1, "1:2", notice=True, resized=True, is_long=True),
    Row("three-preemptions", "three preemptions in a row", three_preemptions, notice=True, is_long=True),
    Row("newest-damaged", "the newest checkpoint damaged", newest_damaged, timed=True, max_cadences_lost=2),
)
