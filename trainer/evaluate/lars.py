"""LARS: a rate for each tensor, by its own norm and its gradient's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from trainer import parallel


class Lars(Optimizer):
    """Momentum whose gradients are scaled layer by layer, for large batches.

    It obeys `found_inf` and `grad_scale` as torch's fused optimizers do, so that `StepGuard` can skip and clip without
    making the host wait, and takes norms over all ranks where tensors are sharded: libraries' do neither.

    Args:
        params: tensors or groups. Vectors and scalars (biases) are neither scaled nor decayed.
        lr: learning rate.
        momentum: of the sum of past gradients.
        weight_decay: added to the gradient, times the weight.
        trust: the length of a step over that of the weight, at rate 1.

    Source:
        You et al. 2017, "Large batch training of convolutional networks", algorithm 1, without its schedule.
    """

    def __init__(
        self, params: Any, *, lr: float, momentum: float = 0.9, weight_decay: float = 0.0, trust: float = 1e-3
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parallel.local(parameter.grad), group)

    def _update(self, parameter: Tensor, change: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        weight, buffer = parallel.local(parameter), parallel.local(state["momentum_buffer"])
        if (scale := getattr(self, "grad_scale", None)) is not None:
            change = change / scale
        if parameter.ndim > 1:
            ratio = _trust_ratio(parameter, change, group["trust"], group["weight_decay"])
            change = ratio * (change + group["weight_decay"] * weight)
        momentum = group["momentum"] * buffer + change
        moved = weight - group["lr"] * momentum
        if (skip := getattr(self, "found_inf", None)) is not None:
            momentum, moved = torch.where(skip > 0, buffer, momentum), torch.where(skip > 0, weight, moved)
        buffer.copy_(momentum)
        weight.copy_(moved)


def _trust_ratio(parameter: Tensor, gradient: Tensor, trust: float, weight_decay: float) -> Tensor:
    """`trust` times the weight's norm over those of gradient and decay; 1 where weight or gradient is 0."""
    weight_norm, gradient_norm = (_norm(tensor, parameter) for tensor in (parallel.local(parameter), gradient))
    ratio = trust * weight_norm / (gradient_norm + weight_decay * weight_norm)
    return torch.where((weight_norm > 0) & (gradient_norm > 0), ratio, torch.ones_like(ratio))


def _norm(part: Tensor, like: Tensor) -> Tensor:
    """2-norm of the tensor of which `part` is this rank's, sharded as `like` is."""
    if isinstance(like, DTensor):
        part = DTensor.from_local(
            part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
    norm = torch.linalg.vector_norm(part)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
