"""One optimizer step: micro-batches in, an update out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from trainer import parallel
from trainer.average import EncoderAverage, ema_tensors
from trainer.config import LoopConfig, TrainConfig
from trainer.errors import TrainingError
from trainer.guard import StepGuard
from trainer.mae import MAE, normalize
from trainer.optim import build_optimizer
from trainer.sharding import build_sharded
from trainer.step_numbers import StepNumbers

if TYPE_CHECKING:
    from pipeline.loader import Batch
    from pipeline.reader import Quarantined


@dataclass(frozen=True)
class Trainee:
    """What a run changes from step to step, all of it in its checkpoints."""

    model: nn.Module
    optimizer: Optimizer
    guard: StepGuard
    average: EncoderAverage | None
    losses: Callable[[Any], Tensor]
    """The loss of each image of a micro-batch, which is on the device."""

    def extra_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds beside model and optimizer, by name."""
        average = ema_tensors(self.average.tensors) if self.average is not None else {}
        return {"guard": self.guard.state} | average


def build(config: TrainConfig, device: torch.device, mesh: DeviceMesh) -> Trainee:
    """The model with its initial weights, on the device and sharded over the mesh, and what goes with it."""
    model = build_sharded(config, device, mesh)
    average = EncoderAverage(model, config.optim.ema_decay) if config.optim.ema_decay is not None else None
    guard = StepGuard(config, mesh, device)
    return Trainee(model, build_optimizer(config, model), guard, average, partial(_mae_losses, config, model))


def update(
    config: LoopConfig,
    trainee: Trainee,
    batches: Iterator[Any],
    numbers: StepNumbers,
    *,
    step: int,
    lr: float,
) -> list[Quarantined]:
    """One optimizer step over all its micro-batches; returns the samples that were replaced in them.

    A collective.

    Args:
        config: the recipe.
        trainee: from `build`.
        batches: this rank's micro-batches; those of `step` are taken. What each is, is between them and
            `trainee.losses`; here it has what `Batch` has beside its tensors, and `sample_ids`.
        numbers: told about the step.
        step: updates completed before this one.
        lr: the rate of this one.

    Raises:
        TrainingError: the loader gave another step than the one due, or nothing.
    """
    model, optimizer = trainee.model, trainee.optimizer
    quarantined: list[Quarantined] = []
    # FSDP takes the mean over the ranks of what each adds up. They may hold different numbers of images, so each
    # weighs an image by the world size over the global batch: the mean over the batch then comes out exactly.
    weight = parallel.world_size() / config.data.global_batch_size
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    device = next(model.parameters()).device
    last = False
    while not last:
        batch = _next_batch(batches, numbers, step, device)
        last = batch.micro_step == batch.num_micro_steps - 1
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
        losses = trainee.losses(batch)
        (losses.sum() * weight).backward()  # type: ignore[no-untyped-call]
        numbers.add(losses, batch.sample_ids)
        quarantined += batch.quarantined
    verdict = trainee.guard.judge(model, optimizer, numbers.loss_sum)
    optimizer.step()
    optimizer.zero_grad()
    if trainee.average is not None:
        trainee.average.update()
    numbers.end_step(step + 1, lr, verdict)
    return quarantined


def _next_batch(batches: Iterator[Any], numbers: StepNumbers, step: int, device: torch.device) -> Any:
    """The next micro-batch, on the device; what it took is told to `numbers`."""
    started = time.perf_counter()
    batch = next(batches, None)
    if batch is None or batch.step != step:
        given = "no more batches" if batch is None else f"a batch of step {batch.step}"
        raise TrainingError(f"the loader gave {given} when step {step} was due; start it at the resumed step")
    batch = batch.to(device)
    numbers.waited(started, time.perf_counter(), batch.fetched_at, batch.copy_s)
    return batch


def _mae_losses(config: TrainConfig, model: MAE, batch: Batch) -> Tensor:
    """How badly each image of a micro-batch was reconstructed."""
    augment = config.data.augment
    images = normalize(batch.images, augment.mean, augment.std)
    losses: Tensor = model(images, batch.kept_ids, batch.masked_ids)
    return losses
