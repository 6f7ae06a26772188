"""Which parameters of a classifier move at which rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from trainer.evaluate.config import EvaluateConfig
from trainer.evaluate.lars import Lars

_NOT_DECAYED = ("pos_embed", "cls_token")


def layer_of(name: str, depth: int) -> int:
    """The layer of a parameter: 0 for the embedding, 1 to `depth` for the blocks, `depth + 1` for what follows."""
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed."):
        return 0
    if name.startswith("blocks."):
        return 1 + int(name.split(".")[1])
    return depth + 1


def layer_groups(model: nn.Module, *, depth: int, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters in groups of one layer and one decay, from the embedding up.

    Args:
        model: a Classifier, sharded or not.
        depth: its blocks.
        weight_decay: of matrices; vectors, biases, the class token and the position embedding have none.
        layer_decay: `lr_scale` of a group is this to the power of how many layers are above it.

    Source:
        Clark et al. 2020, "ELECTRA", appendix; for vision transformers Bao et al. 2022, "BEiT", section 3.1.
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layer_of(name, depth)
        decays = parameter.ndim > 1 and name not in _NOT_DECAYED
        empty = {
            "params": [],
            "weight_decay": weight_decay if decays else 0.0,
            "lr_scale": layer_decay ** (depth + 1 - layer),
        }
        groups.setdefault((layer, decays), empty)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def build_optimizer(config: EvaluateConfig, model: nn.Module) -> Optimizer:
    """The optimizer over the layers' groups. Its rate is 0 until the loop sets it before each step."""
    optim = config.optim
    groups = layer_groups(
        model, depth=config.model.depth, weight_decay=optim.weight_decay, layer_decay=optim.layer_decay
    )
    if optim.optimizer == "lars":
        return Lars(groups, lr=0.0, momentum=optim.momentum)
    return torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, fused=True)
