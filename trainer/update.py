"""One optimizer step: micro-batches in, an update out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from trainer import parallel
from trainer.config import TrainConfig
from trainer.errors import TrainingError
from trainer.mae import MAE, build_mae, normalize
from trainer.optim import build_optimizer
from trainer.step_numbers import StepNumbers

if TYPE_CHECKING:
    from pipeline.loader import Batch
    from pipeline.reader import Quarantined


def build(config: TrainConfig, device: torch.device, mesh: DeviceMesh) -> tuple[MAE, Optimizer]:
    """The model with its initial weights, on the device and sharded over the mesh, and its optimizer."""
    model = build_mae(config).to(device)
    parallel.shard_model(model, config.parallel, mesh)
    return model, build_optimizer(config, model)


def update(
    config: TrainConfig,
    model: MAE,
    optimizer: Optimizer,
    batches: Iterator[Batch],
    numbers: StepNumbers,
    *,
    step: int,
    lr: float,
) -> list[Quarantined]:
    """One optimizer step over all its micro-batches; returns the samples that were replaced in them.

    A collective.

    Args:
        config: the recipe.
        model: from `build`.
        optimizer: from `build`.
        batches: this rank's micro-batches; those of `step` are taken.
        numbers: told about the step.
        step: updates completed before this one.
        lr: the rate of this one.

    Raises:
        TrainingError: the loader gave another step than the one due, or nothing.
    """
    quarantined: list[Quarantined] = []
    # FSDP takes the mean over the ranks of what each adds up. They may hold different numbers of images, so each
    # weighs an image by the world size over the global batch: the mean over the batch then comes out exactly.
    weight = parallel.world_size() / config.data.global_batch_size
    for group in optimizer.param_groups:
        group["lr"] = lr
    device = next(model.parameters()).device
    last = False
    while not last:
        batch = _next_batch(batches, numbers, step, device)
        last = batch.micro_step == batch.num_micro_steps - 1
        cast(FSDPModule, model).set_requires_gradient_sync(last)
        losses = _forward(config, model, batch)
        (losses.sum() * weight).backward()  # type: ignore[no-untyped-call]
        numbers.add(losses, batch.sample_ids)
        quarantined += batch.quarantined
    numbers.measure_gradient(parallel.local_grad_norm(model))
    optimizer.step()
    optimizer.zero_grad()
    numbers.end_step(step + 1, lr)
    return quarantined


def _next_batch(batches: Iterator[Batch], numbers: StepNumbers, step: int, device: torch.device) -> Batch:
    """The next micro-batch, on the device; what it took is told to `numbers`."""
    started = time.perf_counter()
    batch = next(batches, None)
    if batch is None or batch.step != step:
        given = "no more batches" if batch is None else f"a batch of step {batch.step}"
        raise TrainingError(f"the loader gave {given} when step {step} was due; start it at the resumed step")
    batch = batch.to(device)
    numbers.waited(started, time.perf_counter(), batch.fetched_at, batch.copy_s)
    return batch


def _forward(config: TrainConfig, model: MAE, batch: Batch) -> Tensor:
    """The loss of each image of a micro-batch."""
    augment = config.data.augment
    images = normalize(batch.images, augment.mean, augment.std)
    losses: Tensor = model(images, batch.kept_ids, batch.masked_ids)
    return losses
