"""Room for workers on a real Ray: what others have reserved is none, what our own workers hold is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from cluster.config import JobConfig
from cluster.nodes import Nodes

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(120)]


@pytest.fixture
def two_cpus() -> Iterator[str]:
    """Ray's id of the one node."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray.get_runtime_context().get_node_id()
    ray.shutdown()


def wait_for(condition: Callable[[], bool]) -> None:
    """Ray tells of what is free a moment later."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_what_is_reserved_is_no_room_until_it_is_given_back(two_cpus: str) -> None:
    nodes = Nodes(JobConfig(data="d", run="r", num_workers=2, min_workers=1))
    nodes.refresh()
    wait_for(lambda: nodes.room() == 2)
    taken = placement_group([{"CPU": 1.0}])
    assert taken.wait(60)
    wait_for(lambda: nodes.room() == 1)
    assert nodes.room([two_cpus]) == 2
    more = placement_group([{"CPU": 1.0}])
    assert more.wait(60)
    wait_for(lambda: nodes.room() is None)
    assert nodes.room([two_cpus]) == 1
    for group in (taken, more):
        remove_placement_group(group)
    wait_for(lambda: nodes.room() == 2)
