"""The ranks of a run: their mesh, and decisions that all of them take alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from trainer.errors import PeerError

T = TypeVar("T")
Purpose = Literal["control", "checkpoint"]

# One gloo group a purpose, with the default group that it was made under. They are not shared: a checkpoint's
# collectives may run in a thread of their own beside the loop's.
_groups: dict[Purpose, tuple[dist.ProcessGroup, dist.ProcessGroup]] = {}


@contextmanager
def process_mesh(device: torch.device, shard_size: int | None = None) -> Iterator[DeviceMesh]:
    """A mesh over all ranks, for as long as the context lasts.

    A process that belongs to no process group becomes a group of one, so that a single process runs the same
    code as many.

    Args:
        device: of each rank.
        shard_size: ranks that share one copy of the model, a divisor of the world size; None and the world size give
            a mesh of one dimension, fewer one of (copies, shards).
    """
    alone = not dist.is_initialized()
    if alone:
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = dist.HashStore()  # type: ignore[attr-defined]  # public, but not in __all__
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        world = dist.get_world_size()
        if shard_size in (None, world):
            yield init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
        else:
            assert shard_size is not None
            shape = (world // shard_size, shard_size)
            yield init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    finally:
        if alone:
            dist.destroy_process_group()
            _groups.clear()


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; a plain one itself."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def gloo_group(purpose: Purpose) -> dist.ProcessGroup | None:
    """The gloo group for `purpose`, made by the first call (a collective); None without a process group."""
    if not dist.is_initialized():
        return None
    world = dist.group.WORLD
    assert world is not None
    made_under, group = _groups.get(purpose, (None, None))
    if group is None or made_under is not world:
        group = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))  # this rank is in it
        _groups[purpose] = (world, group)
    return group


def all_reduce(values: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """`values` [...] on the CPU, reduced over the ranks in place, and returned."""
    if (group := gloo_group("control")) is not None:
        dist.all_reduce(values, op=op, group=group)
    return values


def agree(value: bool) -> bool:
    """Whether any rank says so; the same answer on every rank."""
    return any_of(value)[0]


def any_of(*values: bool) -> tuple[bool, ...]:
    """Of each value, whether any rank says so; the same answers on every rank, for one exchange."""
    return tuple(bool(value) for value in all_reduce(torch.tensor(values, dtype=torch.int64), dist.ReduceOp.MAX))


def gather(value: T, purpose: Purpose = "control") -> list[T]:
    """Every rank's value, in rank order, on every rank."""
    group = gloo_group(purpose)
    if group is None:
        return [value]
    values: list[T] = [value] * world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def together(action: Callable[[], T], purpose: Purpose = "control") -> T:
    """Run `action` on every rank and return this rank's result, if it went well on all of them.

    Raises:
        PeerError: it failed on another rank. Where it failed, its own error is raised: none is left waiting.
    """
    value, error = _attempt(action)
    failures = gather(_describe(error), purpose)
    if error is not None:
        raise error
    failed = [f"rank {rank}: {failure}" for rank, failure in enumerate(failures) if failure]
    if failed:
        raise PeerError("; ".join(failed))
    return value  # type: ignore[return-value]  # no failure: it is a T


def from_rank_zero(action: Callable[[], T], purpose: Purpose = "control") -> T:
    """Run `action` on rank 0 only and give every rank its result, or its failure as in `together`."""
    value, error = _attempt(action) if rank() == 0 else (None, None)
    outcome = [(value, _describe(error))]
    if (group := gloo_group(purpose)) is not None:
        dist.broadcast_object_list(outcome, src=0, group=group)
    if error is not None:
        raise error
    value, failure = outcome[0]
    if failure:
        raise PeerError(f"rank 0: {failure}")
    return value  # type: ignore[return-value]  # no failure: it is a T


def _attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error


def _describe(error: Exception | None) -> str | None:
    # Text, because not every exception survives being pickled, and one that does not would leave the others waiting.
    return None if error is None else f"{type(error).__name__}: {error}"
