"""What a step costs in numbers that no clock gives: operations, memory kept for backward, and the limit of matmuls."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
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


def timed(one_step: Callable[[], None], num_steps: int) -> dict[str, list[float]]:
    """Seconds of each step, and CPU seconds of all this process's threads."""
    found: dict[str, list[float]] = {"seconds": [], "cpu_seconds": []}
    for _ in range(num_steps):
        started, cpu_started = time.perf_counter(), time.process_time()
        one_step()
        found["seconds"].append(time.perf_counter() - started)
        found["cpu_seconds"].append(time.process_time() - cpu_started)
    return found


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


def time_matmuls(spec: Spec, num_rounds: int, count: bool) -> dict[str, Any]:
    """The matrix products of our model's step and nothing else, in its precision."""
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

    one_step()
    return timed(one_step, num_rounds) | {"flops_per_image": flops / spec.batch_size}
