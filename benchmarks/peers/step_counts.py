"""What a step costs in numbers that no clock gives: operations, memory kept for backward, and the limit of matmuls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.peers.step_models import AUGMENT, Spec, batch_of, our_config
from trainer.mae import build_mae, normalize

_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_FLOPS: dict[Any, Callable[..., int]] = {
    _ATTENTION: lambda query, key, value, *_, out_val=None, **__: sdpa_flop_count(query, key, value),
    _ATTENTION_BACKWARD: lambda grad, query, key, value, *_, out_val=None, **__: sdpa_backward_flop_count(
        grad, query, key, value
    ),
}
"""What torch's counter leaves out: attention on a CPU."""


def counts(forward: Callable[[], Tensor], model: nn.Module, batch_size: int) -> dict[str, Any]:
    """FLOPs an image, and what a forward keeps for backward.

    Args:
        forward: gives a scalar.
        model: of which it is.
        batch_size: images that it takes.
    """
    kept: dict[int, int] = {}
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with FlopCounterMode(display=False, custom_mapping=_FLOPS) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = forward()  # held, so that no memory is used twice
        loss.backward()  # type: ignore[no-untyped-call]
    return {"flops_per_image": counter.get_total_flops() / batch_size, "saved_bytes": sum(kept.values())}


def peak_bytes() -> int:
    """The largest resident memory of this process so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


class _Products(TorchDispatchMode):
    """Collects the matrix products of what runs under it: shapes and strides of both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        sides = {torch.ops.aten.mm.default: args[:2], torch.ops.aten.addmm.default: args[1:3]}.get(func)
        if sides is not None:
            self.found[tuple((tuple(side.shape), side.stride()) for side in sides)] += 1
        return func(*args, **(kwargs or {}))


def matmuls(spec: Spec) -> tuple[Callable[[], None], int]:
    """The matrix products of our model's step and nothing else, in its precision: to run them, and their FLOPs."""
    model, dtype = build_mae(our_config(spec)), torch.bfloat16 if spec.precision == "bf16" else torch.float32
    batch = batch_of(spec.batch_size)
    images = normalize(batch.images, AUGMENT.mean, AUGMENT.std)
    with _Products() as products:
        model(images, batch.kept_ids, batch.masked_ids).sum().backward()
    del model
    pairs = [
        (number, *(torch.empty_strided(*side, dtype=dtype).normal_() for side in sides))
        for sides, number in products.found.items()
    ]
    flops = sum(2 * number * left.numel() * right.shape[1] for number, left, right in pairs)

    def one_step() -> None:
        for number, left, right in pairs:
            for _ in range(number):
                torch.mm(left, right)

    return one_step, flops
