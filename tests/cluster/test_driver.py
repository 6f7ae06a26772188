"""What comes after an attempt, by made-up worker groups and a clock that the waiting turns. No Ray is started."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster import driver as module
from cluster import nodes
from cluster.config import JobConfig
from cluster.driver import Driver
from cluster.lease import acquire
from cluster.relay import News, Worker
from pipeline.store import Store
from trainer.loop import StopReason
from trainer.metrics import read_events

NODES = ("a", "b")
FINISHED = {"reason": StopReason.FINISHED}
NO_PLACE = {"found_no_place": True, "error": "WorkerGroupStartupTimeoutError: timed out after 30.0 seconds"}


class MadeUpFit:
    """A worker group that has ended in some way, after so many looks at it."""

    def __init__(self, num_looks: int = 0, **end: Any) -> None:
        self.num_workers, self._num_looks = 0, num_looks
        self.reason: StopReason | None = None
        self.error, self.found_no_place = "", False
        for name, value in end.items():
            setattr(self, name, value)

    def start(self) -> None:
        pass

    def join(self, timeout_s: float) -> None:
        pass

    def is_alive(self) -> bool:
        self._num_looks -= 1
        return self._num_looks >= 0


class Scene:
    """A cluster of two nodes with a CPU each, and attempts that end as they are told to."""

    def __init__(self, run: Store, *fits: MadeUpFit) -> None:
        self.run, self.fits = run, list(fits)
        self.now = 1000.0
        self.begun: list[tuple[float, int]] = []
        """When attempts were begun, and with how many workers."""
        self.news = News()
        self.free = dict.fromkeys(NODES, 1.0)

    def fit(self, job: JobConfig, num_workers: int, payload: dict[str, Any], **where: Any) -> MadeUpFit:
        self.begun.append((self.now, num_workers))
        fit = self.fits.pop(0)
        fit.num_workers = num_workers
        return fit

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def take(self) -> News:
        return News(workers=list(self.news.workers), error=self.news.error)

    def drive(self, **limits: Any) -> StopReason:
        job = JobConfig(data="d", run=self.run.url, **limits)
        stops = cast(Any, SimpleNamespace(asked_by="", done=lambda: None))
        with acquire(self.run) as lease:
            return Driver(job, self.run, lease, stops, local=True, on_news=lambda news: None).drive()

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [dict(event) for event in read_events(self.run) if event["event"] == kind]


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a scene where Ray would be."""

    def stage(*fits: MadeUpFit) -> Scene:
        scene = Scene(Store(str(tmp_path / "run")), *fits)
        nothing = SimpleNamespace(refresh=lambda **kwargs: None, kill=lambda *args: None, take=lambda news: None)
        calls = {"begin": int, "take": scene.take, "wish": print}
        relay = SimpleNamespace(**{name: SimpleNamespace(remote=call) for name, call in calls.items()})
        clock = SimpleNamespace(monotonic=lambda: scene.now, sleep=scene.sleep, time=lambda: scene.now)
        context = SimpleNamespace(get_node_id=lambda: "head")
        monkeypatch.setattr(module, "ray", SimpleNamespace(get=lambda it: it, get_runtime_context=lambda: context))
        monkeypatch.setattr(module, "start_relay", lambda name: relay)
        monkeypatch.setattr(module, "Fit", scene.fit)
        monkeypatch.setattr(module, "NodeAgents", lambda name: nothing)
        monkeypatch.setattr(module, "RunMetrics", lambda run: nothing)
        monkeypatch.setattr(module, "time", clock)
        found = [{"NodeID": name, "Alive": True, "Resources": {"CPU": 1.0}} for name in NODES]
        monkeypatch.setattr(nodes, "ray", SimpleNamespace(nodes=lambda: found))
        monkeypatch.setattr(nodes, "time", clock)
        monkeypatch.setattr(nodes, "draining_nodes", dict)
        monkeypatch.setattr(nodes, "_answers", lambda node: True)
        monkeypatch.setattr(nodes, "_free_by_node", lambda: {name: {"CPU": cpus} for name, cpus in scene.free.items()})
        return scene

    return stage


def test_workers_without_a_place_are_followed_by_fewer(stage: Any) -> None:
    scene = stage(MadeUpFit(**NO_PLACE), MadeUpFit(**FINISHED))
    assert scene.drive(num_workers=2, min_workers=1) is StopReason.FINISHED
    assert [size for _, size in scene.begun] == [2, 1]
    (lost,) = scene.events("lost")
    assert "no place for 2 workers with 1 CPU each" in lost["error"]


def test_the_fewest_workers_without_a_place_are_tried_again_later_and_later_and_it_is_told(stage: Any) -> None:
    scene = stage(*[MadeUpFit(**NO_PLACE)] * 5, MadeUpFit(**FINISHED))
    assert scene.drive(num_workers=2, max_attempts_without_progress=1) is StopReason.FINISHED
    times, sizes = zip(*scene.begun, strict=True)
    assert sizes == (2,) * 6
    pauses = [after - before for before, after in itertools.pairwise(times)]
    assert pauses == pytest.approx([30, 60, 120, 240, 480], abs=1)
    told = scene.events("waiting")
    assert len(told) > 10
    assert all(0 < event["retry_s"] <= 480 and event["num_fitting"] == event["num_least"] == 2 for event in told)


def test_workers_wait_while_others_have_the_nodes(stage: Any) -> None:
    scene = stage(MadeUpFit(**FINISHED))
    scene.free = {"a": 1.0}

    def free_later(seconds: float) -> None:
        scene.now += seconds
        if scene.now > 1100:
            scene.free = {"a": 1.0, "b": 1.0}

    module.time.sleep = free_later  # type: ignore[assignment]  # a namespace here
    assert scene.drive(num_workers=2) is StopReason.FINISHED
    assert len(scene.begun) == 1
    assert scene.begun[0][0] > 1100
    told = scene.events("waiting")
    assert len(told) == 3
    assert all((event["num_fitting"], event["num_least"], event["retry_s"]) == (1, 2, 0) for event in told)


def test_a_silent_worker_is_named_with_its_limit_and_what_the_others_said_after_it(stage: Any) -> None:
    scene = stage(MadeUpFit(num_looks=2, error="RayActorError: died"), MadeUpFit(**FINISHED))
    scene.news = News(workers=[Worker("a", 1, 1, 0.5), Worker("b", 2, 2, 31.0)], error="RuntimeError: closed by peer")
    assert scene.drive(num_workers=2, silence_timeout_s=30.0) is StopReason.FINISHED
    (lost,) = scene.events("lost")
    assert lost["detected"] == "silence"
    for part in ("rank 1 gave no sign of life for 31 s", "--silence-timeout-s 30", "closed by peer"):
        assert part in lost["error"]


@pytest.mark.parametrize(
    ("said", "fit_error", "told"),
    [
        pytest.param("RuntimeError: bad", "RayActorError: died", "RuntimeError: bad", id="a worker said why"),
        pytest.param(None, "RayActorError: died", "RayActorError: died", id="Ray did"),
        pytest.param(None, "", "the worker processes were killed", id="nobody did"),
    ],
)
def test_why_workers_were_lost(stage: Any, said: str | None, fit_error: str, told: str) -> None:
    scene = stage(MadeUpFit(num_looks=1, error=fit_error), MadeUpFit(**FINISHED))
    scene.news = News(workers=[Worker("a", 1, 1, 0.5), Worker("b", 2, 2, 0.5)], error=said)
    assert scene.drive(num_workers=2) is StopReason.FINISHED
    assert [(event["detected"], event["error"]) for event in scene.events("lost")] == [("error", told)]
