"""What is done about notices, new nodes, silence and standstill, by a clock that the tests turn. No Ray is started."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster import watch as module
from cluster.config import JobConfig
from cluster.nodes import Nodes
from cluster.relay import News, Worker
from cluster.watch import Watch
from trainer.wishes import Wish

EPOCH = 1_800_000_000.0
"""Seconds since 1970 when the clock stands at zero."""
STEP = {"step": 1}


class Cluster:
    """Stands where Nodes does: which nodes leave, and the world size that fits without them."""

    def __init__(self) -> None:
        self.leaving: dict[str, float | None] = {}
        self.size: int | None = 2
        self.asked_with: list[str] = []

    def room(self, running: Collection[str] = ()) -> int | None:
        self.asked_with = list(running)
        return self.size


class Scene:
    """An attempt with a worker on node `a` and one on `b`, its driver on `head`, and what its watch did."""

    def __init__(self, num_workers: int = 2, **limits: Any) -> None:
        self.now = 1000.0
        self.cluster = Cluster()
        self.workers = [Worker(name, 100 + rank, 7 + rank, 0.5) for rank, name in enumerate("ab"[:num_workers])]
        self.wishes: list[Wish] = []
        self.killed: list[tuple[str, int, int]] = []
        self.told: list[dict[str, Any]] = []
        self._job = JobConfig(data="d", run="r", **({"num_workers": 2, "min_workers": 1} | limits))
        self._num_workers = num_workers

    def begin(self) -> None:
        self.watch = Watch(
            self._job,
            self._num_workers,
            nodes=cast(Nodes, self.cluster),
            killer=self,
            ask=self.wishes.append,
            tell=lambda kind, **fields: self.told.append({"event": kind, **fields}),
            driver_node="head",
        )

    def kill(self, node_id: str, pid: int, started: int) -> None:
        self.killed.append((node_id, pid, started))

    def look(self, after_s: float = 0.25, **news: Any) -> None:
        """What the driver does a few times a second."""
        self.now += after_s
        self.watch.look(News(**({"workers": self.workers} | news)))

    def train(self, seconds: float) -> None:
        """A step a second, and a look at each."""
        for _ in range(round(seconds)):
            self.look(1.0, records=[STEP])

    def leave(self, name: str, after_s: float | None = None) -> None:
        """A node will be taken away: so long from now, or nobody knows when."""
        self.cluster.leaving[name] = None if after_s is None else EPOCH + self.now + after_s


@pytest.fixture
def begin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Begins a scene: its clock is the module's."""

    def begin(scene: Scene) -> Scene:
        clock = SimpleNamespace(monotonic=lambda: scene.now, time=lambda: EPOCH + scene.now)
        monkeypatch.setattr(module, "time", clock)
        scene.begin()
        return scene

    return begin


@pytest.fixture
def scene(begin: Any) -> Scene:
    scene: Scene = begin(Scene())
    return scene


def test_nothing_is_done_while_all_is_well(scene: Scene) -> None:
    scene.train(100)
    assert (scene.wishes, scene.killed, scene.told, scene.watch.aim) == ([], [], [], None)


@pytest.mark.parametrize(
    ("name", "size", "action", "aim", "wish"),
    [
        pytest.param("a", 2, "move", "move", Wish.STOP, id="there is room elsewhere"),
        pytest.param("a", 1, "move", "move", Wish.STOP, id="there is room for fewer"),
        pytest.param("a", None, "save", None, Wish.SAVE, id="there is no room"),
        pytest.param("head", 2, "stop", "stop", Wish.STOP, id="the driver is there"),
        pytest.param("head", None, "stop", "stop", Wish.STOP, id="the driver is there, and there is no room"),
    ],
)
def test_a_notice(scene: Scene, name: str, size: int | None, action: str, aim: str | None, wish: Wish) -> None:
    scene.train(3)
    scene.cluster.size = size
    scene.leave(name, 120.0)
    deadline = scene.cluster.leaving[name]
    for _ in range(3):
        scene.look()
    assert scene.watch.aim == aim
    assert scene.wishes == [wish]
    notice = {"event": "notice", "node": name, "source": "drain", "deadline": deadline, "action": action}
    assert scene.told == [notice]


def test_room_is_asked_for_with_what_our_own_workers_hold(scene: Scene) -> None:
    scene.leave("a")
    scene.look()
    assert scene.cluster.asked_with == ["a", "b"]


def test_a_notice_for_a_node_without_workers_is_none_of_this_runs(scene: Scene) -> None:
    scene.leave("c", 10.0)
    scene.train(20)
    assert (scene.wishes, scene.told) == ([], [])


def test_a_notice_names_the_cloud_that_gave_it(scene: Scene) -> None:
    scene.leave("a")
    scene.look(notices=[{"node": "a", "source": "ec2", "deadline": None}])
    assert [(event["source"], event["deadline"]) for event in scene.told] == [("ec2", None)]


def test_each_node_that_leaves_is_told_and_saved_for_once(scene: Scene) -> None:
    scene.cluster.size = None
    scene.leave("a", 100.0)
    scene.train(5)
    scene.leave("b", 100.0)
    scene.train(5)
    assert [event["node"] for event in scene.told] == ["a", "b"]
    assert scene.wishes == [Wish.SAVE, Wish.SAVE]


@pytest.mark.parametrize(
    ("saves", "left_s"),
    [
        pytest.param([], 5.0, id="nothing is known of saves"),
        pytest.param([1.0], 5.0, id="saves are fast"),
        pytest.param([2.0, 6.0, 4.0], 18.0, id="three times the slowest"),
    ],
)
def test_without_room_the_last_save_is_shortly_before_the_end(scene: Scene, saves: list[float], left_s: float) -> None:
    for seconds in saves:
        scene.look(events=[{"event": "save", "seconds": seconds}, {"event": "start"}])
    scene.cluster.size = None
    scene.leave("a", 60.0)
    scene.look(0.0)
    scene.look(60.0 - left_s, records=[STEP])
    assert (scene.watch.aim, scene.wishes) == (None, [Wish.SAVE])
    scene.look(0.5)
    assert (scene.watch.aim, scene.wishes) == ("move", [Wish.SAVE, Wish.STOP])
    assert len(scene.told) == 1


def test_without_room_and_without_a_deadline_it_stays(scene: Scene) -> None:
    scene.cluster.size = None
    scene.leave("a")
    scene.train(1000)
    assert (scene.watch.aim, scene.wishes) == (None, [Wish.SAVE])


def test_room_that_comes_after_the_notice_is_used(scene: Scene) -> None:
    scene.cluster.size = None
    scene.leave("a", 100.0)
    scene.train(5)
    scene.cluster.size = 2
    scene.look()
    assert (scene.watch.aim, scene.wishes) == ("move", [Wish.SAVE, Wish.STOP])


def test_workers_that_were_asked_to_stop_are_not_asked_again(scene: Scene) -> None:
    scene.watch.stop("stop")
    scene.leave("a", 1.0)
    scene.leave("head", 1.0)
    scene.train(5)
    assert (scene.watch.aim, scene.wishes, scene.told) == ("stop", [Wish.STOP], [])


@pytest.fixture
def small(begin: Any) -> Scene:
    """One worker of at most two."""
    scene: Scene = begin(Scene(num_workers=1))
    scene.cluster.size = 1
    return scene


def test_new_nodes_are_used_when_they_have_been_there_for_a_while(small: Scene) -> None:
    small.train(30)
    small.cluster.size = 2
    small.train(5)
    assert small.watch.aim is None
    small.train(1)
    assert (small.watch.aim, small.wishes) == ("resize", [Wish.STOP])
    assert small.cluster.asked_with == ["a"]
    assert small.told == []


def test_an_attempt_is_left_alone_at_first(small: Scene) -> None:
    small.cluster.size = 2
    small.train(24)  # twenty, and the nodes have been there for five
    assert small.watch.aim is None
    small.train(1)
    assert small.watch.aim == "resize"


def test_nodes_that_go_again_are_not_used(small: Scene) -> None:
    small.train(30)
    for _ in range(5):
        small.cluster.size = 2
        small.train(4)
        small.cluster.size = None  # too few even for those that run, as while Ray sees a node go
        small.look()
    assert (small.watch.aim, small.wishes) == (None, [])


def test_nodes_that_go_between_two_steps_are_seen_to_go(small: Scene) -> None:
    small.train(30)
    small.cluster.size = 2
    small.look(1.0)
    small.cluster.size = 1
    small.look(3.0)  # no step has ended
    small.cluster.size = 2
    small.look(3.0, records=[STEP])
    assert small.watch.aim is None


def test_before_the_first_step_no_more_workers_are_tried(small: Scene) -> None:
    small.cluster.size = 2
    for _ in range(50):
        small.look(1.0)
    assert small.watch.aim is None


def test_a_run_with_all_its_workers_asks_for_no_room(scene: Scene) -> None:
    scene.cluster.size = 8
    scene.train(60)
    assert (scene.watch.aim, scene.cluster.asked_with) == (None, [])


def silent(scene: Scene, *silent_s: float | None) -> list[Worker]:
    return [replace(worker, silent_s=seconds) for worker, seconds in zip(scene.workers, silent_s, strict=True)]


def test_only_the_silent_worker_is_killed_and_not_at_every_look(scene: Scene) -> None:
    scene.look(workers=silent(scene, 0.5, 20.0))
    assert scene.killed == []
    scene.look(workers=silent(scene, 0.5, 20.4))
    assert scene.killed == [("b", 101, 8)]
    for seconds in (22.4, 24.4, 26.4, 28.4):
        scene.look(2.0, workers=silent(scene, 0.5, seconds))
    assert scene.killed == [("b", 101, 8)]
    scene.look(2.0, workers=silent(scene, 0.5, 30.4))  # ten seconds later it is still there
    assert scene.killed == [("b", 101, 8)] * 2
    assert scene.watch.broken == "silence"
    assert "rank 1 gave no sign of life for 20 s" in scene.watch.broken_by
    assert "--silence-timeout-s 20" in scene.watch.broken_by
    assert scene.wishes == []


def test_all_that_are_silent_are_killed(scene: Scene) -> None:
    scene.look(workers=silent(scene, 31.0, 25.0))
    assert scene.killed == [("a", 100, 7), ("b", 101, 8)]
    assert "ranks 0, 1 gave no sign of life for 31 s" in scene.watch.broken_by


def test_a_worker_that_has_not_begun_is_not_silent(scene: Scene) -> None:
    scene.look(300.0, workers=silent(scene, None, None))
    assert (scene.killed, scene.watch.broken) == ([], None)


def test_a_worker_whose_start_is_not_known_is_left_alone(scene: Scene) -> None:
    unknown = [replace(worker, started=None) for worker in silent(scene, 0.5, 99.0)]
    scene.look(workers=unknown)
    assert scene.killed == []


def test_workers_that_stand_still_are_all_killed(begin: Any) -> None:
    scene = begin(Scene(stall_timeout_s=60.0))
    scene.train(30)
    scene.look(60.0)
    assert scene.killed == []
    scene.look(1.0)
    assert scene.killed == [("a", 100, 7), ("b", 101, 8)]
    assert scene.watch.broken == "stall"
    assert "ranks 0 to 1 completed no step for 61 s" in scene.watch.broken_by
    assert "--stall-timeout-s 60" in scene.watch.broken_by


def test_workers_that_are_not_there_yet_do_not_stand_still(begin: Any) -> None:
    scene = begin(Scene(stall_timeout_s=60.0))
    scene.look(61.0, workers=[])
    assert (scene.killed, scene.watch.broken) == ([], None)


def test_the_first_reason_to_kill_is_told(begin: Any) -> None:
    scene = begin(Scene(stall_timeout_s=60.0))
    scene.look(55.0, workers=silent(scene, 0.5, 21.0))
    scene.look(11.0)
    assert scene.killed == [("b", 101, 8), ("a", 100, 7), ("b", 101, 8)]
    assert scene.watch.broken == "silence"
    assert "rank 1" in scene.watch.broken_by
