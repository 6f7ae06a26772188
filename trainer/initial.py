"""The weights that training starts from."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def assign(parameter: Tensor, value: Tensor) -> None:
    """Give a parameter a value that each rank has made whole; of a sharded one it keeps its part."""
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(value)


def keyed_generator(name: str, seed: int) -> torch.Generator:
    """A generator for one parameter's first value, which depends on the seed and its name alone."""
    key = hashlib.sha256(f"initial weights/{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little"))


def initial_value(name: str, shape: torch.Size, seed: int, patch_values: int) -> Tensor:
    """A parameter's first value, float32 on the CPU.

    Source:
        He et al. 2022, appendix A.1, for the linear layers; the rest is what the published models started from.
    """
    generator = keyed_generator(name, seed)
    value = torch.empty(shape, device="cpu")
    if name in ("cls_token", "mask_token"):
        return nn.init.normal_(value, std=0.02, generator=generator)
    if name == "feature_weights":  # each decoder block begins with the mean over all depths
        return value.fill_(1 / shape[1])
    if name == "patch_embed.proj.bias":  # left as a convolution has it
        bound = 1 / math.sqrt(patch_values)
        return nn.init.uniform_(value, -bound, bound, generator=generator)
    if value.ndim >= 2:  # the patch projection counts as a linear layer, the fused qkv as one matrix
        return nn.init.xavier_uniform_(value.flatten(1), generator=generator).view(shape)
    return value.fill_(1.0 if name.endswith("weight") else 0.0)  # norms; biases
