"""Batches of a dataset that was sorted by class are as mixed as those of a full permutation."""

import numpy as np
import pytest

from pipeline.config import DataConfig
from pipeline.listing import SampleRef
from pipeline.order import Order
from pipeline.write import plan_shards

NUM_SAMPLES, NUM_CLASSES, BATCH = 40_000, 200, 512
NUM_PERMUTATIONS = 20


@pytest.fixture(scope="module")
def shards():
    """The source position of each sample of each shard, as `tarmac shard` would place them."""
    refs = [SampleRef(f"{at:08d}", f"{at:08d}.jpg", 100, -1) for at in range(NUM_SAMPLES)]
    return [np.array([int(ref.key) for ref in shard]) for shard in plan_shards(refs, 0, 250_000)]


def distinct_classes(positions):
    """Mean number of classes in a batch, over an epoch's batches [steps, G] of source positions."""
    return float(np.mean([len(np.unique(batch * NUM_CLASSES // NUM_SAMPLES)) for batch in positions]))


def of_order(shards, **config):
    order = Order(np.array([len(shard) for shard in shards]), DataConfig(global_batch_size=BATCH, **config))
    ids = order.sample_ids(np.arange(NUM_SAMPLES // BATCH * BATCH)).reshape(-1, BATCH)
    return distinct_classes(np.concatenate(shards)[ids])


def sigmas(value):
    """How far a value is from full permutations, in their own standard deviations."""
    rng = np.random.default_rng(0)
    num_used = NUM_SAMPLES // BATCH * BATCH
    values = [
        distinct_classes(rng.permutation(NUM_SAMPLES)[:num_used].reshape(-1, BATCH)) for _ in range(NUM_PERMUTATIONS)
    ]
    return abs(value - np.mean(values)) / np.std(values, ddof=1)


def test_batches_of_a_sharded_dataset_have_as_many_classes_as_those_of_a_full_permutation(shards):
    assert len(shards) >= 16
    for seed in range(3):
        assert sigmas(of_order(shards, num_lanes=32, seed=seed)) < 4


def test_the_same_check_finds_a_dataset_left_in_the_order_of_its_classes():
    in_order = np.split(np.arange(NUM_SAMPLES), 16)
    assert sigmas(of_order(in_order, num_lanes=32)) > 20
    assert sigmas(of_order(in_order, num_lanes=1, shuffle_window_samples=1)) > 20
