"""The model over the ranks: built without a whole copy anywhere, sharded block by block, recomputed and compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from trainer.config import ParallelConfig, TrainConfig
from trainer.mae import MAE
from trainer.vit import Block, CrossBlock

Model = TypeVar("Model", bound=nn.Module)

MIN_GROUP = 2**20
"""Parameters of a block that is worth a group of its own: each group costs the host a millisecond or two a step, and
the network its latency, which smaller ones do not make up for."""

# What is dear to compute again: kept where activation checkpointing is selective.
_KEPT_OPS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def build_sharded(config: TrainConfig, device: torch.device, mesh: DeviceMesh) -> MAE:
    """The model with its initial weights, sharded over the mesh.

    It is described first, then sharded, and only then given memory, so that no rank ever holds more of it than its
    shards and one whole tensor. Its weights are those of `build_mae`, bit by bit, whatever the mesh.

    Args:
        config: model, precision, activation checkpointing, compilation.
        device: where the shards live.
        mesh: from `parallel.process_mesh`.
    """
    model = empty_sharded(lambda: MAE(config.model, config.data.augment), config.parallel, device, mesh)
    model.init_weights(config.data.seed)
    return model


def empty_sharded(
    describe: Callable[[], Model], config: ParallelConfig, device: torch.device, mesh: DeviceMesh
) -> Model:
    """What `describe` makes, sharded over the mesh; it has memory, and nothing in it yet."""
    with torch.device("meta"):
        model = describe()
    shard_model(model, config, mesh)
    model.to_empty(device=device)
    return model


def shard_model(model: nn.Module, config: ParallelConfig, mesh: DeviceMesh) -> None:
    """Shard `model` over `mesh` in place with FSDP2: every block on its own, the rest with the root; alone, not at all.

    Blocks of fewer parameters than `MIN_GROUP` are left with the root. Weights and gradients are kept and reduced in
    fp32; `bf16` is the precision of forward and backward. A mesh of two dimensions shards over the second and keeps
    copies over the first (HSDP).

    Args:
        model: of transformer blocks and what is around them; the same weights on every rank, or none yet ("meta").
        config: precision, activation checkpointing, compilation.
        mesh: from `parallel.process_mesh`.
    """
    policy = _policy(config, cast_inputs=True)
    # A rank alone has nothing to gather or reduce: FSDP would only copy all weights twice and all gradients once. The
    # layers of an MAE cast their weights themselves, to what the patch embedding begins with; others leave it to FSDP.
    alone = mesh.size() == 1 and (config.precision == "fp32" or isinstance(model, MAE))
    blocks: list[nn.Module] = [module for module in model.modules() if isinstance(module, Block | CrossBlock)]
    for block in blocks:
        # The innermost first: what is compiled includes what is computed again, and neither FSDP's hooks.
        block.forward = _compiled(_recomputed(block.forward, config), config)
        if not alone and sum(parameter.numel() for parameter in block.parameters()) >= MIN_GROUP:
            fully_shard(block, mesh=mesh, mp_policy=policy)
    if alone:
        if isinstance(model, MAE):
            model.patch_embed.compute_dtype = torch.bfloat16 if config.precision == "bf16" else None
        return
    # The root is handed images, of which the loss's targets are made: those stay in fp32.
    fully_shard(model, mesh=mesh, mp_policy=_policy(config, cast_inputs=False))


def _policy(config: ParallelConfig, *, cast_inputs: bool) -> MixedPrecisionPolicy:
    if config.precision == "fp32":
        return MixedPrecisionPolicy(cast_forward_inputs=cast_inputs)
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=cast_inputs)


def _recomputed(forward: Callable[..., Tensor], config: ParallelConfig) -> Callable[..., Tensor]:
    """`forward`, which keeps less for backward and computes it again there."""
    if config.activation_checkpointing == "none":
        return forward
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # there is nothing random in it
    if config.activation_checkpointing == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_or_recompute)
        options["respect_saved_tensors_hooks"] = True
    return partial(checkpoint, forward, **options)


def _keep_or_recompute(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT_OPS else CheckpointPolicy.PREFER_RECOMPUTE


def _compiled(forward: Callable[..., Tensor], config: ParallelConfig) -> Callable[..., Tensor]:
    return torch.compile(forward) if config.compile else forward
