"""What the driver sees of the cluster, from what Ray would say of its nodes. No Ray is started."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import nodes as module
from cluster.config import JobConfig
from cluster.nodes import Nodes
from pipeline.config import DataConfig
from trainer.config import TrainConfig


def job(num_workers: int = 4, min_workers: int | None = 1, cpus: float = 4.0) -> JobConfig:
    train = TrainConfig(data=DataConfig(global_batch_size=64, num_lanes=16))
    workers = {"num_workers": num_workers, "min_workers": min_workers, "cpus_per_worker": cpus}
    return JobConfig(train=train, data="d", run="r", **workers)  # type: ignore[arg-type]


def node(name: str, cpus: float = 8.0, *, alive: bool = True, port: int = 1) -> dict[str, Any]:
    address = {"NodeManagerAddress": "127.0.0.1", "NodeManagerPort": port}
    return {"NodeID": name, "Alive": alive, "Resources": {"CPU": cpus}, **address}


class Ray:
    """Stands where Ray does."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.draining: dict[str, float | None] = {}
        self.free: dict[str, float] = {}
        self.now = 1000.0

    def look(self, nodes: Nodes) -> Nodes:
        """Refresh, half a second and more after the last time."""
        self.now += 1.0
        nodes.refresh()
        return nodes


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    ray = Ray()
    monkeypatch.setattr(module, "ray", SimpleNamespace(nodes=lambda: ray.nodes))
    monkeypatch.setattr(module, "draining_nodes", lambda: dict(ray.draining))
    monkeypatch.setattr(module, "_free_by_node", lambda: {name: {"CPU": cpus} for name, cpus in ray.free.items()})
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: ray.now))
    return ray


@pytest.fixture
def two_nodes(ray: Ray) -> Ray:
    """Eight CPUs each, nothing on them."""
    ray.nodes, ray.free = [node("a"), node("b")], {"a": 8.0, "b": 8.0}
    return ray


@contextmanager
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def closed_port() -> int:
    with listening() as port:
        return port


def ids(nodes: list[dict[str, Any]]) -> list[str]:
    return [node["NodeID"] for node in nodes]


def test_room_is_what_is_free_on_each_node_and_not_the_sum(two_nodes: Ray) -> None:
    nodes = two_nodes.look(Nodes(job()))
    assert nodes.room() == 4
    two_nodes.free = {"a": 6.0, "b": 6.0}  # another run has two CPUs of each: twelve are free, and two workers fit
    assert nodes.room() == 2
    two_nodes.free = {"a": 2.0, "b": 2.0}
    assert nodes.room() is None
    assert nodes.room(["a", "b"]) == 2


def test_room_without_a_node_that_leaves_is_what_is_free_elsewhere(two_nodes: Ray) -> None:
    two_nodes.free = {"a": 4.0, "b": 0.0}  # one of ours on each, another run beside it on b
    nodes = two_nodes.look(Nodes(job(num_workers=2)))
    assert nodes.room(["a", "b"]) == 2
    two_nodes.draining = {"a": None}
    assert two_nodes.look(nodes).room(["a", "b"]) == 1
    assert two_nodes.look(Nodes(job(num_workers=2, min_workers=None))).room(["a", "b"]) is None


def test_a_dead_node_has_no_room(two_nodes: Ray) -> None:
    two_nodes.nodes[0]["Alive"] = False
    assert two_nodes.look(Nodes(job())).room() == 2


def test_after_a_refusal_fewer_workers_are_tried(two_nodes: Ray) -> None:
    nodes = two_nodes.look(Nodes(job()))
    assert nodes.room() == 4
    nodes.note_place(4, found=False)
    assert nodes.room() == 3
    assert nodes.room(["a", "a", "b"]) == 3  # and a run with three is not stopped for a fourth
    nodes.note_place(3, found=True)
    assert nodes.room(["a", "a", "b"]) == 3
    two_nodes.now += 30.0
    assert nodes.room(["a", "a", "b"]) == 4


def test_after_a_refusal_of_the_fewest_the_run_waits_and_says_for_what(two_nodes: Ray) -> None:
    nodes = two_nodes.look(Nodes(job(min_workers=None)))
    assert nodes.room() == 4
    nodes.note_place(4, found=False)
    assert nodes.room() is None
    two_nodes.now += 10.0
    need, have = {"CPU": 16.0}, {"CPU": 16.0}
    assert nodes.shortage() == {"need": need, "have": have, "num_least": 4, "num_fitting": 4, "retry_s": 20.0}
    two_nodes.nodes.append(node("c"))
    two_nodes.free["c"] = 8.0
    assert two_nodes.look(nodes).room() == 4  # a node has come: no need to wait


def test_a_shortage_tells_what_is_needed_what_there_is_and_how_many_fit(two_nodes: Ray) -> None:
    two_nodes.free = {"a": 6.0, "b": 6.0}
    two_nodes.draining = {"b": None}
    nodes = two_nodes.look(Nodes(job(num_workers=4, min_workers=3)))
    assert nodes.room() is None
    need, have = {"CPU": 12.0}, {"CPU": 8.0}
    assert nodes.shortage() == {"need": need, "have": have, "num_least": 3, "num_fitting": 1, "retry_s": 0.0}


def test_spares_are_four_nodes_at_most_that_stay_and_hold_a_worker(ray: Ray) -> None:
    ray.nodes = [node("small", 2.0)] + [node(name) for name in "abcdefghi"]
    ray.draining = {"b": None, "d": None}
    nodes = ray.look(Nodes(job()))
    assert ids(nodes.spares({"a", "b", "h"})) == ["c", "e", "f", "g"]
    assert ids(nodes.spares({"a", "c", "e", "f"})) == ["g", "h", "i"]


def test_nodes_that_stay_are_up_and_have_no_notice(ray: Ray) -> None:
    ray.nodes = [node("a"), node("b"), node("c", alive=False), node("d")]
    ray.draining = {"b": 2000.0}
    nodes = ray.look(Nodes(job()))
    nodes.note_notices([{"node": "d", "source": "ec2", "deadline": 3000.0}])
    assert ids(nodes.staying()) == ["a"]
    assert nodes.leaving == {"b": 2000.0, "d": 3000.0}


def test_a_notice_holds_until_the_node_is_gone_and_rays_own_word_counts_more(ray: Ray) -> None:
    ray.nodes = [node("a"), node("b")]
    nodes = ray.look(Nodes(job()))
    nodes.note_notices([{"node": "a", "source": "ec2", "deadline": 3000.0}])
    assert ray.look(nodes).leaving == {"a": 3000.0}
    ray.draining = {"a": 2500.0}
    assert ray.look(nodes).leaving == {"a": 2500.0}
    ray.draining = {}  # no answer from Ray: a drain is never taken back
    assert ray.look(nodes).leaving == {"a": 2500.0}
    ray.nodes[0]["Alive"] = False
    assert ray.look(nodes).leaving == {}


def test_ray_is_asked_twice_a_second_at_most(ray: Ray) -> None:
    ray.nodes = [node("a")]
    nodes = ray.look(Nodes(job()))
    ray.nodes = [node("a"), node("b")]
    ray.now += 0.4
    nodes.refresh()
    assert ids(nodes.staying()) == ["a"]
    ray.now += 0.1
    nodes.refresh()
    assert ids(nodes.staying()) == ["a", "b"]


def test_a_node_whose_raylet_does_not_answer_is_left_out_until_ray_knows(ray: Ray) -> None:
    with listening() as port:
        ray.nodes = [node("a", port=port), node("b", port=closed_port()), node("c", port=port, alive=False)]
        ray.free = {"a": 8.0, "b": 8.0}  # Ray still counts it
        nodes = ray.look(Nodes(job()))
        assert nodes.room() == 4
        nodes.look_for_dead()
    assert ids(nodes.staying()) == ["a"]
    assert nodes.room() == 2
    assert ids(ray.look(nodes).staying()) == ["a"]
    ray.nodes[1]["Alive"] = False
    ray.look(nodes)
    ray.nodes[1] = node("b")
    assert ids(ray.look(nodes).staying()) == ["a", "b"]


def test_a_node_whose_raylet_was_only_slow_to_answer_counts_again(ray: Ray) -> None:
    port = closed_port()
    ray.nodes = [node("a", port=port)]
    nodes = ray.look(Nodes(job()))
    nodes.look_for_dead()
    assert nodes.avoided == {"a"}
    with socket.create_server(("127.0.0.1", port)):
        assert ids(ray.look(nodes).staying()) == ["a"]
    assert nodes.avoided == set()
