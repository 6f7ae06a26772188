"""What a worker trains, and on which batches: a masked autoencoder, or a classifier that evaluates one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from cluster.config import EvaluateJob, JobConfig
from pipeline import DataConfig, Dataset, Loader, open_dataset
from pipeline.store import Store
from trainer import update
from trainer.checkpoint import Commit
from trainer.config import num_steps
from trainer.evaluate import train as classifier
from trainer.evaluate.batches import ClassifierBatches
from trainer.evaluate.validate import EpochValidation
from trainer.loop import Validation


@dataclass(frozen=True)
class Place:
    """One rank, and what it has."""

    rank: int
    world_size: int
    num_threads: int
    device: torch.device


@dataclass(frozen=True)
class Task:
    """What `trainer.loop.train` is given."""

    batches: Iterator[Any]
    build: Callable[[Any, torch.device, DeviceMesh], update.Trainee]
    validation: Validation | None = None


@contextmanager
def pretraining(job: JobConfig, dataset: Dataset, place: Place, commit: Commit | None) -> Iterator[Task]:
    """Pretraining from `commit` on, or from the start."""
    with _loader(job, dataset, place, commit, place.device) as loader:
        yield Task(loader, update.build)


@contextmanager
def evaluation(job: EvaluateJob, dataset: Dataset, place: Place, commit: Commit | None) -> Iterator[Task]:
    """An evaluation from `commit` on, or from its source's encoder."""
    config = dataclasses.replace(job.train, data=_on_threads(job.train.data, place))
    validation = EpochValidation(
        config,
        open_dataset(job.val, config.store),
        run=Store(job.run, config.store),
        source=job.source,
        num_samples=dataset.num_samples,
        num_steps=num_steps(config, dataset.num_samples),
        device=place.device,
    )
    with (
        _loader(job, dataset, place, commit, torch.device("cpu")) as loader,
        ClassifierBatches(
            config,
            loader,
            dataset.samples_per_shard,
            rank=place.rank,
            world_size=place.world_size,
            num_threads=place.num_threads,
            pin_memory=place.device.type == "cuda",
        ) as batches,
    ):
        build = partial(classifier.build, source=None if commit else job.source)
        yield Task(batches, build, validation)


def _loader(job: JobConfig, dataset: Dataset, place: Place, commit: Commit | None, device: torch.device) -> Loader:
    return Loader(
        dataset,
        _on_threads(job.train.data, place),
        dp_rank=place.rank,
        dp_world_size=place.world_size,
        start_step=commit.step if commit else 0,
        device=device,
    )


def _on_threads(data: DataConfig, place: Place) -> DataConfig:
    """The config with the worker's threads for decoding, unless it names a number."""
    if data.num_decode_threads is not None:
        return data
    return dataclasses.replace(data, num_decode_threads=place.num_threads)
