"""Evaluations small enough to test with: three colours with noise, and an encoder that has hardly been trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tiny_runs import CPU, Told, stopping_at, tiny_config

from cluster.cli import main
from cluster.config import EvaluateJob
from cluster.tasks import Place, evaluation
from pipeline import Loader, open_dataset
from pipeline.config import AugmentConfig, DataConfig
from pipeline.store import Store
from trainer import parallel
from trainer.checkpoint import find_resume
from trainer.config import CheckpointConfig, LogConfig, ParallelConfig
from trainer.evaluate.config import (
    ClassifierConfig,
    EvaluateConfig,
    EvaluateOptimConfig,
    RegularizeConfig,
    SourceConfig,
    ValidationConfig,
)
from trainer.loop import train
from trainer.metrics import next_attempt
from trainer.run_files import open_run

COLOURS = {"blue": (60, 60, 180), "green": (60, 180, 60), "red": (180, 60, 60)}
ALL_ON = RegularizeConfig(
    randaugment_magnitude=9.0, erase_probability=0.5, mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1
)


def make_dataset(folder: Path, num_per_class: int, seed: int, size: int = 16) -> str:
    """A sharded dataset of three colours."""
    generator = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / "images" / name).mkdir(parents=True)
        for number in range(num_per_class):
            pixels = np.clip(np.array(colour) + generator.normal(0, 40, (size, size, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{number}.png")
    url = str(folder / "dataset")
    assert main(["shard", str(folder / "images"), url, "--num-workers", "1", "--shard-bytes", "20000"]) == 0
    return url


def pretrain_tiny(data: str, run_url: str, ema_decay: float | None = None) -> None:
    """A run of four steps on the dataset at `data`."""
    config = tiny_config(num_steps=4)
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, ema_decay=ema_decay))
    dataset, run = open_dataset(data), Store(run_url)
    open_run(run, config, dataset.manifest.digest())
    with Loader(dataset, config.data) as loader:
        train(
            config,
            loader,
            run=run,
            num_samples=dataset.num_samples,
            attempt=1,
            device=CPU,
            resume_from=None,
        )


def tiny_finetune(num_steps: int = 8, regularize: RegularizeConfig = ALL_ON, **fields: Any) -> EvaluateConfig:
    """Fine-tuning of `tiny_config`'s encoder, everything random in it on; 4 images to mix in each of 4 lanes."""
    return EvaluateConfig(
        data=DataConfig(
            global_batch_size=16,
            num_lanes=4,
            augment=AugmentConfig(image_size=(16, 16), patch_size=4, crop_scale=(0.3, 1.0)),
            **fields,
        ),
        model=ClassifierConfig(embed_dim=16, depth=2, num_heads=2, num_classes=3, drop_path=0.3),
        optim=EvaluateOptimConfig(base_lr=0.1, num_steps=num_steps, warmup_fraction=0.25, layer_decay=0.75),
        regularize=regularize,
        validation=ValidationConfig(crop_fraction=1.0),
        parallel=ParallelConfig(precision="fp32"),
        checkpoint=CheckpointConfig(every_steps=4, keep_last=2),
        log=LogConfig(every_steps=2),
    )


def tiny_linear(num_steps: int = 8, **fields: Any) -> EvaluateConfig:
    """A linear probe of `tiny_config`'s encoder."""
    config = tiny_finetune(num_steps, RegularizeConfig(), **fields)
    return EvaluateConfig(
        data=config.data,
        model=ClassifierConfig(
            embed_dim=16, depth=2, num_heads=2, num_classes=3, frozen_encoder=True, pool="class", head_std=0.01
        ),
        optim=EvaluateOptimConfig(
            optimizer="lars", base_lr=3000.0, weight_decay=0.0, num_steps=num_steps, warmup_fraction=0.25
        ),
        validation=config.validation,
        parallel=config.parallel,
        checkpoint=config.checkpoint,
        log=config.log,
    )


def job_of(config: EvaluateConfig, *, data: str, val: str, source: str, run: str | Path) -> EvaluateJob:
    """The job; its source is the run that `pretrain_tiny` made."""
    return EvaluateJob(train=config, data=data, val=val, run=str(run), source=SourceConfig(run=source, step=4))


def evaluate_attempt(job: EvaluateJob, stop_at: int | None = None) -> tuple[Told, list[dict[str, Any]]]:
    """One attempt at an evaluation, as a worker makes it: what it told, and its scores."""
    run, dataset = Store(job.run), open_dataset(job.data)
    commit = find_resume(run, lambda path, reason: None)
    attempt = parallel.from_rank_zero(lambda: next_attempt(run))
    place = Place(parallel.rank(), parallel.world_size(), 1, CPU)
    records: list[Any] = []
    events: list[dict[str, Any]] = []
    with evaluation(job, dataset, place, commit) as task:
        reason = train(
            job.train,
            task.batches,
            run=run,
            num_samples=dataset.num_samples,
            attempt=attempt,
            device=CPU,
            resume_from=commit,
            hooks=stopping_at(stop_at, records, on_event=events.append),
            build=task.build,
            validation=task.validation,
        )
    return Told(reason, records), [event for event in events if event["event"] == "validation"]
