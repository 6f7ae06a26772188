"""How many images of a validation set a classifier names, each of them looked at once."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from pipeline.augment import centre_crops
from pipeline.dataset import Dataset
from pipeline.loader import Batch, Loader
from pipeline.order import Order
from pipeline.store import Store
from trainer import parallel
from trainer.evaluate.config import EvaluateConfig, SourceConfig, validation_data
from trainer.mae import normalize
from trainer.metrics import RunLog

RESULT = "result.json"


@dataclass(frozen=True)
class Score:
    """What a classifier is worth."""

    top1: float
    """Share of the images whose class has the highest score."""
    top5: float
    """Share of those whose class is among the five highest."""
    loss: float
    """Mean cross-entropy."""
    num_samples: int
    """Images that were judged: all of the dataset but the damaged ones."""
    num_damaged: int
    """Images that could not be read or decoded."""


@torch.no_grad()
def score(config: EvaluateConfig, model: nn.Module, dataset: Dataset, device: torch.device) -> Score:
    """Judge `model` by every image of `dataset`, once. A collective: the ranks share the images.

    The last step of the pass runs into the next one, and a rank may have an image fewer than another: what does not
    belong to the pass goes through the model, as the ranks do so together, and does not count.

    Args:
        config: crops, precision and batch are its.
        model: sharded or not; left in the mode that it was in.
        dataset: with labels.
        device: where the model is.
    """
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    for batch, counts in _one_pass(config, dataset, device):
        sums += _judge(config, model, batch, counts)
    model.train(was_training)
    if isinstance(model, FSDPModule):
        model.reshard()  # no backward follows, which would do it
    top1, top5, loss, judged, seen = parallel.all_reduce(sums.cpu()).tolist()
    assert int(seen) == dataset.num_samples
    judged = max(judged, 1.0)
    return Score(top1 / judged, top5 / judged, loss / judged, int(judged), int(seen - judged))


def _one_pass(config: EvaluateConfig, dataset: Dataset, device: torch.device) -> Iterator[tuple[Batch, Tensor]]:
    """This rank's batches of one pass, with [B, 2]: whether an image is of the pass, and whether it is whole."""
    data = validation_data(config, dataset.num_samples)
    order, rank, world_size = Order(dataset.samples_per_shard, data), parallel.rank(), parallel.world_size()
    draw = partial(centre_crops, fraction=config.validation.crop_fraction)
    with Loader(dataset, data, dp_rank=rank, dp_world_size=world_size, device=device, draw_crops=draw) as loader:
        for step in range(-(-dataset.num_samples // data.global_batch_size)):
            positions = order.rank_positions(step, rank, world_size)
            wanted = order.sample_ids(positions)
            for part in np.array_split(np.arange(len(positions)), loader.num_micro_steps):
                batch = next(loader)
                belongs = torch.from_numpy(positions[part] < dataset.num_samples).to(device)
                # Where a sample is damaged, the loader gives another in its place.
                whole = belongs & (batch.sample_ids == torch.from_numpy(wanted[part]).to(device))
                yield batch, torch.stack([whole, belongs], dim=1)


def _judge(config: EvaluateConfig, model: nn.Module, batch: Batch, counts: Tensor) -> Tensor:
    """Of a batch, the sums that `score` adds up: top-1, top-5, loss, judged, seen."""
    augment = config.data.augment
    scores = model(normalize(batch.images, augment.mean, augment.std))  # [B, classes]
    ranked = scores.topk(min(5, scores.shape[1]), dim=1).indices == batch.labels[:, None]
    losses = F.cross_entropy(scores, batch.labels, reduction="none")
    columns = [ranked[:, 0], ranked.any(dim=1), losses, torch.ones_like(losses)]
    whole, belongs = counts.double().unbind(dim=1)
    return torch.stack([*((column.double() * whole).sum() for column in columns), belongs.sum()])


class EpochValidation:
    """Judges a classifier at the end of epochs and of the run, and writes the run's result.

    Args:
        config: of the run.
        dataset: to judge by.
        run: the run's store.
        source: where the encoder is from, for the result.
        num_samples: of the training data.
        num_steps: of the whole run.
        device: where the model is.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        dataset: Dataset,
        *,
        run: Store,
        source: SourceConfig,
        num_samples: int,
        num_steps: int,
        device: torch.device,
    ) -> None:
        self._config, self._dataset, self._run, self._source = config, dataset, run, source
        self._num_samples, self._num_steps, self._device = num_samples, num_steps, device

    def due(self, step: int) -> bool:
        """Whether an epoch that counts, or the run, ends with this step."""
        every = self._num_samples * self._config.validation.every_epochs
        ends = [samples * self._config.data.global_batch_size // every for samples in (step - 1, step)]
        return ends[0] < ends[1] or step == self._num_steps

    def run(self, model: nn.Module, step: int, log: RunLog) -> None:
        """Judge, and tell the log, and at the end the result's file."""
        started = time.perf_counter()
        found = score(self._config, model, self._dataset, self._device)
        epoch = step * self._config.data.global_batch_size / self._num_samples
        event = {
            "event": "validation",
            "step": step,
            "epoch": epoch,
            **{f"val_{name}": value for name, value in dataclasses.asdict(found).items()},
            "seconds": time.perf_counter() - started,
        }
        log.events([event])
        if step == self._num_steps:
            result = {**dataclasses.asdict(found), "step": step, "epoch": epoch}
            result["source"] = dataclasses.asdict(self._source)
            parallel.from_rank_zero(lambda: self._run.write(RESULT, json.dumps(result, indent=1).encode()))


def read_result(run: Store) -> dict[str, Any] | None:
    """The result of a finished evaluation; None before it has one."""
    if not run.exists(RESULT):
        return None
    result: dict[str, Any] = json.loads(run.read(RESULT))
    return result
