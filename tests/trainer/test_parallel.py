"""Ranks: what is decided together is the same everywhere, and no failure leaves a rank waiting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_runs import CPU, run_ranks

from trainer import parallel
from trainer.errors import PeerError


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
