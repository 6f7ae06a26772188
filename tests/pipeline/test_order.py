"""The order's promises, for random datasets, batches, lanes and world sizes."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import DataConfig
from pipeline.order import Order, num_micro_steps


@st.composite
def orders(draw):
    lanes = draw(st.integers(1, 12))
    config = DataConfig(
        num_lanes=lanes,
        global_batch_size=lanes * draw(st.integers(1, 5)),
        seed=draw(st.integers(0, 2**40)),
        shuffle_window_samples=draw(st.integers(1, 40)),
    )
    sizes = np.array(draw(st.lists(st.integers(1, 60), min_size=1, max_size=8)))
    return Order(sizes, config), config, sizes


@given(orders(), st.integers(0, 10**9), st.data())
@settings(max_examples=150, deadline=None)
def test_the_union_over_ranks_is_the_global_batch_at_any_world_size(built, step, data):
    order, config, _ = built
    world_size = data.draw(st.integers(1, config.num_lanes))
    whole = dict(zip(order.step_positions(step).tolist(), order.step_sample_ids(step).tolist(), strict=True))
    seen: dict[int, int] = {}
    for rank in range(world_size):
        positions = order.rank_positions(step, rank, world_size)
        assert len(positions) >= config.global_batch_size // config.num_lanes
        shard_ids = order.sample_ids(positions).tolist()
        assert not seen.keys() & set(positions.tolist())
        seen.update(zip(positions.tolist(), shard_ids, strict=True))
    assert seen == whole


@given(orders(), st.integers(0, 500))
@settings(max_examples=100, deadline=None)
def test_each_sample_is_seen_exactly_once_in_each_of_many_epochs(built, first_epoch):
    order, _, sizes = built
    total = int(sizes.sum())
    for epoch in (first_epoch, first_epoch + 1, first_epoch + 2):
        ids = order.sample_ids(np.arange(epoch * total, (epoch + 1) * total))
        assert np.array_equal(np.sort(ids), np.arange(total))


@given(orders(), st.integers(0, 200))
@settings(max_examples=50, deadline=None)
def test_a_step_is_the_same_whatever_was_asked_before(built, step):
    order, config, sizes = built
    walked = [order.step_sample_ids(s) for s in range(step % 20)]
    again = Order(sizes, config)
    assert np.array_equal(again.step_sample_ids(step), order.step_sample_ids(step))
    assert all(np.array_equal(again.step_sample_ids(s), ids) for s, ids in enumerate(walked))


@given(orders(), st.integers(0, 300))
@settings(max_examples=100, deadline=None)
def test_windows_cover_an_epoch_once_and_hold_what_their_positions_ask_for(built, epoch):
    order, config, sizes = built
    total = int(sizes.sum())
    positions = np.arange(epoch * total, (epoch + 1) * total)
    first_ids = np.concatenate([[0], np.cumsum(sizes)])
    covered = []
    for window in order.windows(positions):
        rows = [first_ids[r.shard] + np.arange(r.first_row, r.first_row + r.num_rows) for r in window.runs]
        assert all(r.first_row >= 0 and r.first_row + r.num_rows <= sizes[r.shard] for r in window.runs)
        assert 1 <= sum(map(len, rows)) <= config.shuffle_window_samples
        covered.append(np.concatenate(rows))
    assert np.array_equal(np.sort(np.concatenate(covered)), np.arange(total))
    one = positions[total // 2 : total // 2 + 1]
    (window,) = order.windows(one)
    inside = np.concatenate(
        [first_ids[r.shard] + np.arange(r.first_row, r.first_row + r.num_rows) for r in window.runs]
    )
    assert order.sample_ids(one)[0] in inside


def test_a_lane_reads_long_runs_of_consecutive_samples():
    """16 shards of 500, 8 lanes: a lane's 1,000 samples of an epoch lie in at most 4 stretches."""
    config = DataConfig(global_batch_size=64, num_lanes=8, shuffle_window_samples=100)
    order = Order(np.full(16, 500), config)
    for slot in range(8):
        ids = np.sort(order.sample_ids(np.arange(slot, 8_000, 8)))
        assert len(ids) == 1_000
        assert (np.diff(ids) > 1).sum() <= 3


def test_epochs_seeds_and_purposes_differ_and_neighbours_are_spread():
    config = DataConfig(global_batch_size=64, num_lanes=32, seed=1)
    order = Order(np.full(10, 1_000), config)
    first, second = (order.sample_ids(np.arange(e * 10_000, (e + 1) * 10_000)) for e in (0, 1))
    other = Order(np.full(10, 1_000), DataConfig(global_batch_size=64, num_lanes=32, seed=2)).sample_ids(
        np.arange(10_000)
    )
    # Two unrelated permutations of 10,000 agree in about one place.
    assert (first == second).sum() < 10
    assert (first == other).sum() < 10
    # A batch of 64 touches at least half as many shards as independent draws would (all 10).
    shards_a_batch = [len(np.unique(first[i : i + 64] // 1_000)) for i in range(0, 9_984, 64)]
    assert np.mean(shards_a_batch) > 7


def test_ids_are_the_same_on_every_machine_and_release():
    """Literals: a change here breaks the resume of every run that exists."""
    order = Order(np.array([5, 3, 4]), DataConfig(global_batch_size=4, num_lanes=2, seed=7, shuffle_window_samples=3))
    assert [order.step_sample_ids(step).tolist() for step in (0, 1, 2, 1_000_000)] == [
        [7, 9, 1, 8],
        [0, 11, 2, 10],
        [3, 5, 4, 6],
        [7, 10, 3, 11],
    ]


@pytest.mark.parametrize(
    ("world_size", "micro", "expected"), [(1, None, 1), (1, 10, 7), (3, 8, 4), (4, 16, 1), (4, 5, 4)]
)
def test_every_rank_takes_the_same_number_of_micro_steps(world_size, micro, expected):
    """G 64 on 4 lanes: 16 a lane; 3 ranks hold 32, 16, 16."""
    config = DataConfig(global_batch_size=64, num_lanes=4, micro_batch_size=micro)
    assert num_micro_steps(config, world_size) == expected


def test_bad_ranks_and_empty_datasets_are_refused():
    order = Order(np.array([8]), DataConfig(global_batch_size=4, num_lanes=2))
    with pytest.raises(ValueError, match=r"world_size \(3\) at most data.num_lanes \(2\)"):
        order.rank_positions(0, 0, 3)
    with pytest.raises(ValueError, match="0 samples"):
        Order(np.array([], dtype=np.int64), DataConfig(global_batch_size=4, num_lanes=2))


def test_a_billion_samples_in_a_hundred_thousand_shards_stay_small():
    """Peak resident memory of a rank that computes a step of a 10^9-sample dataset; 100 MB measured."""
    code = """
import numpy as np
from pipeline.config import DataConfig
from pipeline.order import Order
order = Order(np.full(100_000, 10_000), DataConfig(global_batch_size=4096, num_lanes=512))
ids = order.sample_ids(order.rank_positions(123_456_789, 3, 8))
peak_kib = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
print(len(ids), peak_kib // 1024)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert int(out[0]) == 512
    assert int(out[1]) < 300
