"""A classifier as the training loop takes it: built from a pretrained encoder, with its optimizer and its loss."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from pipeline.store import Store
from trainer import checkpoint
from trainer.average import ema_tensors
from trainer.evaluate.batches import ClassifierBatch
from trainer.evaluate.classifier import Classifier
from trainer.evaluate.config import EvaluateConfig, SourceConfig, require_encoder_of
from trainer.evaluate.optim import build_optimizer
from trainer.guard import StepGuard
from trainer.mae import normalize
from trainer.run_files import read_run
from trainer.sharding import empty_sharded
from trainer.update import Trainee


def build(config: EvaluateConfig, device: torch.device, mesh: DeviceMesh, *, source: SourceConfig | None) -> Trainee:
    """The classifier and what goes with it, on the device and sharded over the mesh. A collective.

    Args:
        config: with the number of classes.
        device: where the shards live.
        mesh: from `parallel.process_mesh`.
        source: the encoder to begin with; None where a checkpoint of this run is loaded next.

    Raises:
        ValueError: the source is another encoder than the config's.
        CheckpointError: the source's checkpoint is gone, or damaged.
    """
    model = empty_sharded(lambda: Classifier(config.model, config.data.augment), config.parallel, device, mesh)
    model.init_weights(config.data.seed)
    if source is not None:
        load_encoder(model, config, source)
    guard = StepGuard(config, mesh, device)
    return Trainee(model, build_optimizer(config, model), guard, None, partial(_losses, config, model))


def load_encoder(model: Classifier, config: EvaluateConfig, source: SourceConfig) -> None:
    """Give a classifier a pretrained encoder; the head stays as it is. A collective.

    Raises: as `build`.
    """
    run = Store(source.run, config.store)
    pretrained = read_run(run).config
    require_encoder_of(config, pretrained.model, pretrained.data.augment)
    commit = checkpoint.find_step(run, source.step)
    names = model.pretrained_names()
    if source.average:
        tensors = {name: tensor.detach() for name, tensor in model.named_parameters() if name in names}
        checkpoint.load(run, commit, model, extra=ema_tensors(tensors), only=())
    else:
        checkpoint.load(run, commit, model, only=names)
    augment = pretrained.data.augment
    rows, columns = (side // augment.patch_size for side in augment.image_size)
    model.place_positions((rows, columns))


def _losses(config: EvaluateConfig, model: Classifier, batch: ClassifierBatch) -> Tensor:
    """The cross-entropy of each image of a micro-batch with its soft label."""
    images = batch.images
    if images.dtype == torch.uint8:
        images = normalize(images, config.data.augment.mean, config.data.augment.std)
    scores = model(images, batch.branch_scales, batch.num_parts)
    return F.cross_entropy(scores, batch.targets, reduction="none")
