"""How many workers fit: on nodes, within the job's limits, in sizes that the job may have."""

import pytest

from cluster.capacity import Refusals, num_fitting, num_within, worker_resources, world_within
from cluster.config import JobConfig
from pipeline.config import DataConfig
from trainer.config import ParallelConfig, TrainConfig


def job(num_workers=8, min_workers=2, shard_size=None, **fields):
    data = DataConfig(global_batch_size=64, num_lanes=16)
    train = TrainConfig(data=data, parallel=ParallelConfig(shard_size=shard_size))
    return JobConfig(train=train, data="d", run="r", num_workers=num_workers, min_workers=min_workers, **fields)


def node(name, alive=True, **resources):
    return {"NodeID": name, "Alive": alive, "Resources": resources}


TWO_NODES = [node("a", CPU=8.0), node("b", CPU=8.0, GPU=2.0)]


@pytest.mark.parametrize(
    ("free", "running", "need", "num"),
    [
        pytest.param({"a": 8.0, "b": 8.0}, [], 4.0, 4, id="nothing else is there"),
        pytest.param({"a": 6.0, "b": 6.0}, [], 4.0, 2, id="halves on two nodes are no worker"),
        pytest.param({"a": 4.0, "b": 8.0}, [], 3.0, 3, id="one and two"),
        pytest.param({"b": 8.0}, [], 4.0, 2, id="nothing is free: Ray does not name it"),
        pytest.param({"a": 2.0, "b": 6.0}, ["a", "b"], 4.0, 3, id="ours, and what is free beside them"),
        pytest.param({}, ["a", "a", "b"], 4.0, 3, id="ours, where others have the rest"),
        pytest.param({"a": 8.0, "b": 8.0}, ["a", "a"], 4.0, 4, id="ours, which Ray does not count yet"),
        pytest.param({"a": 8.0}, ["gone", "gone"], 4.0, 2, id="ours on a node that leaves do not count"),
        pytest.param({"a": 8.0, "gone": 8.0}, [], 4.0, 2, id="nor does what is free there"),
    ],
)
def test_workers_are_counted_node_by_node_beside_what_else_runs(free, running, need, num):
    assert num_fitting(TWO_NODES, {name: {"CPU": cpus} for name, cpus in free.items()}, running, {"CPU": need}) == num


def test_every_resource_of_a_worker_has_to_be_on_its_node():
    free = {"a": {"CPU": 8.0}, "b": {"CPU": 8.0, "GPU": 1.0}}
    assert num_fitting(TWO_NODES, free, [], {"CPU": 1.0, "GPU": 1.0}) == 1


def test_sums_of_fractions_lose_no_worker():
    assert num_within({"CPU": 0.1 + 0.2}, {"CPU": 0.1}) == 3


def test_a_worker_needs_no_gpu_unless_it_is_given_one():
    assert worker_resources(job()) == {"CPU": 1.0}
    assert worker_resources(job(gpus_per_worker=1.0, cpus_per_worker=4.0)) == {"CPU": 4.0, "GPU": 1.0}


@pytest.mark.parametrize(("room", "size"), [(0, None), (1, None), (2, 2), (7, 7), (8, 8), (100, 8)])
def test_the_world_is_as_large_as_there_is_room_within_the_limits(room, size):
    assert world_within(job(), room) == size


@pytest.mark.parametrize(("room", "size"), [(7, None), (8, 8)])
def test_without_a_minimum_all_workers_are_needed(room, size):
    assert world_within(job(min_workers=None), room) == size


@pytest.mark.parametrize(("room", "size"), [(3, None), (5, 4), (7, 4), (8, 8)])
def test_copies_of_the_model_stay_whole(room, size):
    assert world_within(job(shard_size=4), room) == size


def test_a_size_without_a_place_is_held_back_longer_and_longer():
    refusals, now, waited = Refusals(), 1000.0, []
    assert refusals.most(5, now) == 5
    for _ in range(7):
        refusals.note(3, 5, now, found=False)
        assert refusals.most(5, now) == 2
        waited.append(refusals.left_s(now))
        now += waited[-1]
        assert refusals.most(5, now - 0.1) == 2
        assert refusals.most(5, now) == 5
    assert waited == [30, 60, 120, 240, 480, 600, 600]


@pytest.mark.parametrize("fitting", [4, 6])
def test_a_size_without_a_place_is_tried_at_once_when_something_has_changed(fitting):
    refusals = Refusals()
    refusals.note(3, 5, 1000.0, found=False)
    assert refusals.most(fitting, 1001.0) == fitting
    assert refusals.most(5, 1002.0) == 5
    assert refusals.left_s(1002.0) == 0


def test_a_place_for_fewer_workers_says_nothing_of_more_and_one_for_as_many_does():
    refusals = Refusals()
    refusals.note(3, 5, 1000.0, found=False)
    refusals.note(2, 5, 1001.0, found=True)
    assert refusals.most(5, 1002.0) == 2
    refusals.note(3, 5, 1003.0, found=True)
    assert refusals.most(5, 1003.0) == 5
    refusals.note(3, 5, 1004.0, found=False)
    assert refusals.left_s(1004.0) == 30  # it begins anew
