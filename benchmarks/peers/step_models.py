"""What a row of the step benchmark trains: its size, its precision, its batch, and whose model it is."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.config import AugmentConfig, num_kept_patches, num_patches
from pipeline.loader import Batch
from trainer import recipes
from trainer.config import ModelConfig, ParallelConfig, TrainConfig
from trainer.mae import normalize

SIZES = {
    "base": recipes.get("mae_base_800ep").model,
    "large": recipes.get("mae_large_800ep").model,
    "tiny": ModelConfig(embed_dim=96, depth=2, num_heads=3, decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=4),
}
AUGMENT = AugmentConfig()


@dataclass(frozen=True)
class Spec:
    """A row: who built the model, how large it is, and how it runs."""

    name: str
    kind: str
    """ours, peer, limit or variant (of ours)."""
    builder: str
    """ours, transformers, lightly, timm; or matmuls, bare, loop, ray."""
    size: str
    precision: str = "fp32"
    compiled: bool = False
    batch_size: int = 16
    model: dict[str, Any] | None = None
    """Fields of our model that differ from the size's."""
    spare_cpus: int = 0
    """CPUs of this machine that it leaves alone."""

    @property
    def as_worker(self) -> bool:
        """Whether its process is set up as the worker of a run is."""
        return self.builder in ("ours", "bare", "loop")

    @property
    def num_threads(self) -> int:
        """Threads that compute."""
        return max(1, len(os.sched_getaffinity(0)) - self.spare_cpus)


def why_not(spec: Spec) -> str | None:
    """Why this machine cannot run it."""
    if spec.precision == "bf16" and spec.size != "tiny" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this CPU has no instructions for bf16 (avx512 or amx), and takes minutes a step without them"
    return None


def our_config(spec: Spec) -> TrainConfig:
    """Ours, as a run of one rank has it."""
    base = recipes.get("mae_base_800ep")
    data = replace(
        base.data, global_batch_size=spec.batch_size, num_lanes=1, micro_batch_size=None, decode_device="cpu"
    )
    parallel = ParallelConfig(precision="bf16" if spec.precision == "bf16" else "fp32", compile=spec.compiled)
    model = replace(SIZES[spec.size], **(spec.model or {}))
    # A small batch has a small rate, and its floor is of no interest here.
    return replace(base, data=data, model=model, parallel=parallel, optim=replace(base.optim, min_lr=0.0))


def batch_of(batch_size: int, step: int = 0) -> Batch:
    """A batch as the loader hands it out, always the same."""
    images, noise, ids = _pixels(batch_size), noise_of(batch_size), torch.arange(batch_size)
    order, num_kept = noise.argsort(dim=1), num_kept_patches(AUGMENT)
    return Batch(
        images=images.contiguous(memory_format=torch.channels_last),
        kept_ids=order[:, :num_kept].contiguous(),
        masked_ids=order[:, num_kept:].contiguous(),
        sample_ids=ids,
        labels=torch.full_like(ids, -1),
        step=step,
        micro_step=0,
        num_micro_steps=1,
    )


def images_of(batch_size: int) -> Tensor:
    """The same images, normalised: what peers are given."""
    return normalize(_pixels(batch_size), AUGMENT.mean, AUGMENT.std)


def noise_of(batch_size: int) -> Tensor:
    """What the masks come from: the patches of the smallest values are kept."""
    return torch.rand(batch_size, num_patches(AUGMENT), generator=torch.Generator().manual_seed(1))


def _pixels(batch_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    # Coarse noise, enlarged: patches differ within and from each other, as those of photographs do.
    coarse = torch.randint(0, 256, (batch_size, 3, 56, 56), generator=generator).float()
    return torch.nn.functional.interpolate(coarse, AUGMENT.image_size, mode="bilinear").byte()
