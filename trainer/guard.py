"""The guard between gradient and update: clips, and skips what would do harm. It never makes the host wait."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from trainer import parallel
from trainer.config import LoopConfig

SPIKE_WINDOW_STEPS = 128
"""Updates that the running mean and variance look back on, and that must have been made before one can be a spike."""


@dataclass(frozen=True)
class Verdict:
    """What became of a step: scalars on the device, the same on every rank."""

    grad_norm: Float[Tensor, ""]
    """2-norm of the gradient over all parameters, before it was clipped."""
    skipped_in_a_row: Float[Tensor, ""]
    """Updates skipped up to and with this one; 0 if it was made."""


class StepGuard:
    """Decides for all ranks alike whether an update is made, from the whole gradient's norm and the batch's loss.

    Skipped is what is not finite, and with `optim.spike_sigmas` what lies that many standard deviations above its
    running mean. The decision stays on the device: the optimizer's fused kernel is told of it as by an AMP gradient
    scaler (`found_inf`, and `grad_scale` to clip), and leaves weights, moments and step counts as they were.

    Source:
        For spikes OLMo 2 (2025), section 3.1: skip-step. For clipping Pascanu et al. 2013.
    """

    def __init__(self, config: LoopConfig, mesh: DeviceMesh, device: torch.device) -> None:
        self._batch = config.data.global_batch_size
        self._clip_norm, self._sigmas = config.optim.clip_norm, config.optim.spike_sigmas
        # The ranks' squares add up to as many whole gradients as there are copies of the model.
        self._num_copies = mesh.size(0) if mesh.ndim == 2 else 1
        self.state = torch.zeros(6, dtype=torch.float64, device=device)
        """Skipped in a row, updates made, and of loss and norm the running means, then variances: goes with a
        checkpoint."""

    def judge(self, model: nn.Module, optimizer: Optimizer, loss_sum: Float[Tensor, ""]) -> Verdict:
        """Look at the gradient, and tell `optimizer` what its next `step` has to do. A collective.

        Args:
            model: its gradients are those of the whole batch, reduced.
            optimizer: a fused one over the model's parameters.
            loss_sum: over this rank's images of the step, on the device.
        """
        grads = [parallel.local(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
        square = torch.nn.utils.get_total_norm(grads).double().square() / self._num_copies
        totals = torch.stack([loss_sum.double() / self._batch, square])
        if dist.is_initialized():
            dist.all_reduce(totals)
        seen = torch.stack([totals[0], totals[1].sqrt()])  # loss, norm
        skip = ~torch.isfinite(seen).all() | self._is_spike(seen)
        self._remember(seen, skip)
        optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
        if self._clip_norm is not None:
            optimizer.grad_scale = (seen[1] / self._clip_norm).clamp(min=1).float()  # type: ignore[attr-defined]
        return Verdict(seen[1], self.state[0].clone())

    def _is_spike(self, seen: Tensor) -> Tensor:
        if self._sigmas is None:
            return torch.zeros((), dtype=torch.bool, device=seen.device)
        made, means, variances = self.state[1], self.state[2:4], self.state[4:6]
        return (made >= SPIKE_WINDOW_STEPS) & (seen > means + self._sigmas * variances.sqrt()).any()

    def _remember(self, seen: Tensor, skip: Tensor) -> None:
        in_a_row, made, means, variances = self.state[:1], self.state[1:2], self.state[2:4], self.state[4:6]
        share = 1 / (made + 1).clamp(max=SPIKE_WINDOW_STEPS)
        deviation = seen - means
        made_now = torch.cat(
            [
                torch.zeros_like(in_a_row),
                made + 1,
                means + share * deviation,
                (1 - share) * (variances + share * deviation.square()),
            ]
        )
        skipped_now = torch.cat([in_a_row + 1, self.state[1:]])
        self.state.copy_(torch.where(skip, skipped_now, made_now))
