"""AdamW as MAE uses it: which tensors decay, and the learning rate of each step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from trainer.config import LoopConfig, TrainConfig, peak_lr


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters into those that decay and those that do not.

    Matrices decay, and so do the class and mask tokens; biases, norms and other 1-D tensors do not.

    Args:
        model: sharded or not; a shard has as many dimensions as its tensor.
        weight_decay: of the first group.

    Returns:
        Two groups for an optimizer, each in the model's own order.

    Source:
        He et al. 2022, appendix A.1; which tensors decay is what the published recipe does.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim <= 1 or name.endswith(".bias") else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def build_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.AdamW:
    """Fused AdamW over the parameter groups. Its rate is 0 until the loop sets `learning_rate` before each step."""
    groups = parameter_groups(model, config.optim.weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=config.optim.betas, fused=True)


def learning_rate(config: LoopConfig, step: int, num_steps: int) -> float:
    """The learning rate of one update: linear warm-up from 0, then half a cosine down to `optim.min_lr`.

    Args:
        config: peak rate, floor and share of the run that warms up.
        step: updates completed before this one, from 0.
        num_steps: updates of the whole run.

    Returns:
        The rate for the update from `step` to `step + 1`; the first is 0, as in the published recipe.

    Source:
        He et al. 2022, table 8; Loshchilov & Hutter 2017, "SGDR".
    """
    peak, floor = peak_lr(config), config.optim.min_lr
    warmup_steps = config.optim.warmup_fraction * num_steps
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / (num_steps - warmup_steps))
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))
