"""One row of the step benchmark, in a process of its own: `python -m benchmarks.peers.step_runner SPEC NUM_STEPS`."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.peers.step_models import Spec, build_peer, images_and_noise, our_config
from pipeline.loader import Batch
from trainer import parallel
from trainer.mae import build_mae
from trainer.step_numbers import StepNumbers
from trainer.update import build, update

_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
FLOPS: dict[Any, Callable[..., int]] = {
    _ATTENTION: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value),
    _ATTENTION_BACKWARD: lambda grad, query, key, value, *_, **__: sdpa_backward_flop_count(grad, query, key, value),
}
"""What torch's counter leaves out."""


def main() -> None:
    """Print what was measured as JSON."""
    spec, num_steps = Spec(**json.loads(sys.argv[1])), int(sys.argv[2])
    if spec.builder == "matmuls":
        found = matmul_speeds(spec, num_steps)
    elif spec.builder == "ours":
        found = time_ours(spec, num_steps)
    else:
        found = time_peer(spec, num_steps)
    print(json.dumps(found | {"peak_bytes": peak_bytes()}))


def time_ours(spec: Spec, num_steps: int) -> dict[str, Any]:
    """Steps as a run of one rank takes them, on batches from memory."""
    config = our_config(spec)
    images, noise = images_and_noise(spec.batch_size)
    order = noise.argsort(dim=1)
    ids = torch.arange(spec.batch_size)

    def batches() -> Iterator[Batch]:
        step = 0
        while True:
            pixels = (images * 50 + 128).clamp(0, 255).byte()
            yield Batch(
                images=pixels, kept_ids=order[:, :49], masked_ids=order[:, 49:], sample_ids=ids, labels=ids,
                step=step, micro_step=0, num_micro_steps=1,
            )  # fmt: skip
            step += 1

    with parallel.process_mesh(torch.device("cpu")) as mesh:
        trainee = build(config, torch.device("cpu"), mesh)
        numbers, source, step = StepNumbers(config, 10**6, torch.device("cpu")), batches(), 0

        def one_step() -> None:
            nonlocal step
            update(config, trainee, source, numbers, step=step, lr=1e-4)
            step += 1

        seconds = time_steps(one_step, num_steps)
        loss = numbers.read()[-1].record["loss"]
    return {"seconds": seconds, "loss": loss, "saved_bytes": saved_bytes(spec)}


def time_peer(spec: Spec, num_steps: int) -> dict[str, Any]:
    """Steps of a peer's model with the optimizer that ours has."""
    torch.manual_seed(0)
    model = build_peer(spec)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    images, noise = images_and_noise(spec.batch_size)
    losses = []

    def one_step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=spec.precision == "bf16"):
            loss = model(images, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))

    return {"seconds": time_steps(one_step, num_steps), "loss": losses[-1], "saved_bytes": None}


def time_steps(one_step: Callable[[], None], num_steps: int) -> list[float]:
    """Seconds of each step after one that warms up."""
    one_step()
    seconds = []
    for _ in range(num_steps):
        started = time.perf_counter()
        one_step()
        seconds.append(time.perf_counter() - started)
    return seconds


def saved_bytes(spec: Spec) -> int:
    """What one forward keeps for backward, weights left out: each tensor's memory counted once."""
    config = our_config(spec)
    model = build_mae(config)
    weights = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    images, noise = images_and_noise(spec.batch_size)
    order = noise.argsort(dim=1)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(images, order[:, :49], order[:, 49:]).sum()  # held, so that no memory is used twice
    del loss
    return sum(kept.values())


def flops_per_image(spec: Spec) -> int:
    """Forward and backward, counted by torch at the operators."""
    model = build_mae(our_config(spec))
    images, noise = images_and_noise(2)
    order = noise.argsort(dim=1)
    with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        model(images, order[:, :49], order[:, 49:]).sum().backward()
    return counter.get_total_flops() // 2


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


def matmul_speeds(spec: Spec, num_rounds: int) -> dict[str, Any]:
    """FLOP/s of the model's own matrix products and nothing else, in its precision; and FLOPs an image."""
    model, dtype = build_mae(our_config(spec)), torch.bfloat16 if spec.precision == "bf16" else torch.float32
    images, noise = images_and_noise(spec.batch_size)
    order = noise.argsort(dim=1)
    with _Products() as products:
        model(images, order[:, :49], order[:, 49:]).sum().backward()
    pairs = [
        (count, *(torch.empty_strided(*side, dtype=dtype).normal_() for side in sides))
        for sides, count in products.found.items()
    ]
    flops = sum(2 * count * left.numel() * right.shape[1] for count, left, right in pairs)

    def one_round() -> None:
        for count, left, right in pairs:
            for _ in range(count):
                torch.mm(left, right)

    seconds = time_steps(one_round, num_rounds)
    return {"seconds": seconds, "flops": flops, "flops_per_image": flops_per_image(spec), "loss": None}


def peak_bytes() -> int:
    """The largest resident memory of this process so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main()
