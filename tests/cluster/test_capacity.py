"""How many workers fit: on nodes, within the job's limits, in sizes that the job may have."""

import pytest

from cluster.capacity import num_after_loss, num_fitting, num_within, worker_resources, world_within
from cluster.config import JobConfig
from pipeline.config import DataConfig
from trainer.config import ParallelConfig, TrainConfig


def job(num_workers=8, min_workers=2, shard_size=None, **fields):
    data = DataConfig(global_batch_size=64, num_lanes=16)
    train = TrainConfig(data=data, parallel=ParallelConfig(shard_size=shard_size))
    return JobConfig(train=train, data="d", run="r", num_workers=num_workers, min_workers=min_workers, **fields)


def node(name, alive=True, **resources):
    return {"NodeID": name, "Alive": alive, "Resources": resources}


def test_workers_are_counted_node_by_node():
    nodes = [node("a", CPU=4.0), node("b", CPU=3.0), node("c", CPU=9.0, alive=False), node("d", CPU=8.0)]
    assert num_fitting(nodes, {"d"}, {"CPU": 2.0}) == 3  # 2 and 1: a worker is on one node
    assert num_fitting(nodes, set(), {"CPU": 2.0}) == 7
    assert num_fitting(nodes, set(), {"CPU": 2.0, "GPU": 1.0}) == 0


def test_the_node_that_is_lost_is_the_one_with_the_most_workers():
    nodes = [node("a", CPU=4.0), node("b", CPU=3.0), node("c", CPU=8.0)]
    assert num_after_loss(nodes, {"CPU": 2.0}) == 3
    assert num_after_loss([], {"CPU": 2.0}) == 0


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
