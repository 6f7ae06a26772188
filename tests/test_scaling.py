"""The simulation of large worlds: bytes that can be counted by hand, at sizes where they can be."""

from typing import Any

import pytest
import torch.distributed as dist

from benchmarks import scaling
from pipeline.config import AugmentConfig, DataConfig
from trainer import sharding
from trainer.config import ModelConfig, ParallelConfig, TrainConfig

# Each of two blocks of width 8 has 8 * 24 + 24 + 8 * 8 + 8 + 8 * 32 + 32 + 32 * 8 + 8 + 4 * 8 = 872 parameters.
# Patches, class token and norm have 48 * 8 + 8 + 8 + 16, mask token and decoder 8 + 8 * 8 + 8 + 16 + 8 * 48 + 48 more.
BLOCKS, ROOT = 2 * 872, 416 + 528
WEIGHTS = BLOCKS + ROOT
BUFFERS = 2 * 17 * 8
TOKENS = 2 * 8  # class and mask token have one row each: rank 0 has it, the others send as many zeros
GUARD = 16  # loss and norm, over all ranks


def small(**fields: Any) -> TrainConfig:
    return TrainConfig(
        data=DataConfig(
            global_batch_size=16,
            num_lanes=8,
            micro_batch_size=2,
            augment=AugmentConfig(image_size=(16, 16), patch_size=4),
        ),
        model=ModelConfig(embed_dim=8, depth=1, num_heads=2, decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2),
        parallel=ParallelConfig(**fields),
    )


@pytest.fixture(autouse=True)
def _every_block_is_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "MIN_GROUP", 1)


@pytest.mark.parametrize(("precision", "wide"), [("fp32", 4), ("bf16", 2)])
def test_a_step_sends_weights_twice_and_gradients_once(precision: Any, wide: int) -> None:
    found = scaling.simulate(small(precision=precision), 8)
    # The root keeps its weights from forward to backward; gradients are reduced in fp32. A ring of 8 sends 7/8.
    padding = 7 * TOKENS
    expected = 7 / 8 * (wide * (2 * BLOCKS + ROOT + padding) + 4 * (WEIGHTS + padding) + 2 * GUARD)
    assert sum(found["sent_bytes"].values()) == pytest.approx(expected, rel=1e-6)
    assert found["num_collectives"] == 3 + 2 * 3 - 1 + 1  # 3 groups: gathered, again but the root, reduced; the guard's
    assert not dist.is_initialized()


def test_copies_exchange_gradients_only() -> None:
    found = scaling.simulate(small(precision="fp32", shard_size=2), 8)
    assert found["sent_bytes"]["shard"] == pytest.approx(1 / 2 * 4 * (2 * BLOCKS + ROOT + WEIGHTS + 2 * TOKENS))
    # Four copies of each half, of which that with the zeros counts; and the guard's all-reduce over all eight.
    assert found["sent_bytes"]["replicate"] == pytest.approx(2 * 3 / 4 * 4 * (WEIGHTS + TOKENS) / 2 + 2 * 7 / 8 * GUARD)


def test_a_rank_holds_its_share() -> None:
    for fields, world_size, share in [({}, 2, 2), ({}, 8, 8), ({"shard_size": 2}, 8, 2)]:
        found = scaling.simulate(small(precision="fp32", **fields), world_size)
        kinds = found["peak_bytes_by_kind"]
        weights = (WEIGHTS - TOKENS) / share + TOKENS
        assert kinds["weights"] == 4 * (weights + BUFFERS)
        assert kinds["moments"] == pytest.approx(8 * weights, rel=0.15)
        assert found["state_share"] == pytest.approx(
            share * weights / WEIGHTS, rel=0.15
        )  # and the step count of each tensor


def test_gradients_are_whole_between_micro_batches() -> None:
    found = scaling.simulate(small(precision="fp32"), 4)  # four images a rank in two passes
    assert found["num_micro_steps"] == 2
    assert found["peak_bytes_by_kind"]["gradients"] >= 4 * WEIGHTS


def test_recomputing_lowers_the_peak() -> None:
    peaks = [
        scaling.simulate(small(precision="fp32", activation_checkpointing=kind), 8)["peak_bytes_by_kind"]["activations"]
        for kind in ("full", "selective", "none")
    ]
    assert peaks == sorted(peaks)
    assert peaks[0] < 0.8 * peaks[-1]


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    config, world_size = small(shard_size=2), 8
    scaling.print_rows([scaling.simulate(config, world_size)])
    assert capsys.readouterr().out.splitlines()[-1].split()[:5] == ["8", "2", "none", "2", "1"]


def test_every_world_size_is_simulated_with_both_layouts() -> None:
    found = [(world_size, config.parallel.shard_size) for config, world_size in scaling.layouts()]
    for world_size in (8, 64, 512, 1024):
        assert (world_size, None) in found
        assert any(size not in (None, world_size) for world, size in found if world == world_size)
