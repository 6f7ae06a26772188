"""Ranks: what is decided together is the same everywhere, and no failure leaves a rank waiting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_runs import CPU, run_ranks, tiny_config
from torch.distributed.tensor import DTensor

from trainer import parallel
from trainer.config import ParallelConfig
from trainer.errors import PeerError
from trainer.mae import build_mae


@pytest.mark.slow
def test_decisions_are_the_same_on_every_rank() -> None:
    for rank, decided in enumerate(run_ranks(_decide, 3)):
        assert decided == {
            "nobody": False,
            "one": True,
            "everybody": True,
            "gathered": ["rank 0", "rank 1", "rank 2"],
            "from zero": 1000,
            "own": rank,
            "sum": [3.0, 3.0],
        }


def _decide() -> dict[str, Any]:
    rank = parallel.rank()
    return {
        "nobody": parallel.agree(False),
        "one": parallel.agree(rank == 1),
        "everybody": parallel.agree(True),
        "gathered": parallel.gather(f"rank {rank}", "checkpoint"),
        "from zero": parallel.from_rank_zero(lambda: 1000 + rank),
        "own": parallel.together(lambda: rank),
        "sum": parallel.all_reduce(torch.tensor([1.0, float(rank)])).tolist(),
    }


@pytest.mark.slow
def test_a_failure_on_one_rank_is_a_failure_on_all() -> None:
    for rank, errors in enumerate(run_ranks(_fail, 2)):
        own, peers = "LookupError: not here", "PeerError: rank {}: LookupError: not here"
        assert errors["together"] == (own if rank == 1 else peers.format(1))
        assert errors["from zero"] == (own if rank == 0 else peers.format(0))
        assert errors["agreed afterwards"] is False


class _UnpicklableError(LookupError):
    """Cannot be sent to another process."""

    def __reduce__(self) -> Any:
        raise TypeError("not this one")


def _fail() -> dict[str, Any]:
    def fail() -> None:
        error = _UnpicklableError("not here")
        type(error).__name__ = "LookupError"
        raise error

    def outcome(call: Any, action: Any) -> str:
        try:
            call(action)
        except (LookupError, PeerError) as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    return {
        "together": outcome(parallel.together, fail if parallel.rank() == 1 else lambda: None),
        "from zero": outcome(parallel.from_rank_zero, fail),
        "agreed afterwards": parallel.agree(False),
    }


def test_a_process_alone_needs_no_group() -> None:
    assert not dist.is_initialized()
    assert (parallel.rank(), parallel.world_size()) == (0, 1)
    assert parallel.agree(True)
    assert not parallel.agree(False)
    assert parallel.gather(5) == [5]
    assert parallel.from_rank_zero(lambda: 6) == parallel.together(lambda: 6) == 6
    with pytest.raises(KeyError):
        parallel.together(lambda: {}["missing"])


def test_the_mesh_of_a_process_alone_goes_with_its_context() -> None:
    for _ in range(2):
        with parallel.process_mesh(CPU) as mesh:
            assert mesh.size() == 1
            assert parallel.agree(True)
        assert not dist.is_initialized()


@pytest.mark.slow
def test_every_rank_holds_its_share_of_the_same_weights() -> None:
    config = tiny_config()
    whole = {name: weight.detach() for name, weight in build_mae(config).named_parameters()}
    shares = run_ranks(_shard, 2)
    for name, weight in whole.items():
        (first, full), (second, _) = (share[name] for share in shares)
        torch.testing.assert_close(torch.cat([first, second]), weight, rtol=0, atol=0)
        torch.testing.assert_close(full, weight, rtol=0, atol=0)
    held = sum(first.numel() for first, _ in shares[0].values())
    total = sum(weight.numel() for weight in whole.values())
    assert held < 0.6 * total


def _shard() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    model = build_mae(tiny_config())
    with parallel.process_mesh(CPU) as mesh:
        parallel.shard_model(model, ParallelConfig(precision="fp32"), mesh)
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        assert all(isinstance(p, DTensor) for p in parameters.values())
        return {name: (p.to_local(), p.full_tensor()) for name, p in parameters.items()}  # type: ignore[attr-defined]


def test_bf16_computes_in_bf16_and_keeps_weights_and_gradients_in_fp32() -> None:
    model = build_mae(tiny_config())
    seen: dict[str, torch.dtype] = {}
    block = model.blocks[0]
    with parallel.process_mesh(CPU) as mesh:
        parallel.shard_model(model, ParallelConfig(precision="bf16"), mesh)
        block.register_forward_pre_hook(lambda module, inputs: seen.update(tokens=inputs[0].dtype))
        model.register_forward_pre_hook(lambda module, inputs: seen.update(images=inputs[0].dtype))
        patches = torch.arange(16).repeat(2, 1)
        loss = model(torch.rand(2, 3, 16, 16), patches[:, :4], patches[:, 4:])
        loss.sum().backward()
        grads = {p.grad.dtype for p in model.parameters() if p.grad is not None}
    assert seen == {"tokens": torch.bfloat16, "images": torch.float32}
    assert loss.dtype == torch.float32
    assert grads == {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.slow
def test_the_gradient_norm_is_that_of_the_whole_gradient() -> None:
    (alone,) = run_ranks(_square_norm, 1)
    first, second = run_ranks(_square_norm, 2)
    assert first != second
    assert first + second == pytest.approx(alone, rel=1e-5)


def _square_norm() -> float:
    model = build_mae(tiny_config())
    with parallel.process_mesh(CPU) as mesh:
        parallel.shard_model(model, ParallelConfig(precision="fp32"), mesh)
        patches = torch.arange(16).repeat(2, 1)
        images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        model(images, patches[:, :4], patches[:, 4:]).sum().backward()
        return float(parallel.local_grad_norm(model)) ** 2
