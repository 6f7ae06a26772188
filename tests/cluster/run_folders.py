"""Runs as their bucket shows them, written by hand in the formats of docs/formats.md."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

from pipeline.config import DataConfig
from pipeline.store import Store
from trainer.config import OptimConfig, TrainConfig
from trainer.evaluate import recipes as evaluation_recipes
from trainer.evaluate.config import EvaluationRecord, SourceConfig
from trainer.run_files import open_run

CONFIG = TrainConfig(data=DataConfig(global_batch_size=10, num_lanes=5), optim=OptimConfig(num_epochs=4.0))
"""Over the 50 images that `record` counts: 20 steps."""
NOW = time.time()


def record(step: int, time_s: float = NOW) -> dict[str, Any]:
    """A step record, as far as anybody looks at it here."""
    numbers = {"loss": 2.0 / step, "lr": 1e-3, "images_per_s": 100.0 + step, "data_wait_s": 0.0, "step_s": 0.5}
    return {"step": step, "samples_seen": step * 10, "epoch": step / 5, "skipped": False, "time": time_s, **numbers}


def begin(run: Store) -> None:
    """run.json."""
    open_run(run, CONFIG, "digest")


def write_lines(run: Store, attempt: int, name: str, lines: list[dict[str, Any]]) -> None:
    """A file of an attempt."""
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    run.write(f"attempts/{attempt:04d}/{name}", text.encode())


def begin_evaluation(run: Store) -> None:
    """run.json of a fine-tuning of three classes, for 20 steps."""
    config = evaluation_recipes.get("finetune_cifar_tiny")
    model, optim = replace(config.model, num_classes=3), replace(config.optim, num_steps=20)
    source = SourceConfig(run="s3://bucket/runs/b", step=4000)
    train = replace(config, model=model, optim=optim)
    open_run(run, EvaluationRecord(train=train, source=source, val_digest="other digest"), "digest")


def write_lease(
    run: Store, *, age_s: float, generation: int = 1, pid: int = 42, term_s: float = 10.0, released: bool = False
) -> None:
    """A lease that was renewed so long ago, and runs for `term_s` at a time."""
    times = {"started": NOW - 100, "renewed": time.time() - age_s, "term_s": term_s}
    process = {"host": "head", "pid": pid, "kernel": None, "pid_started": None, "driver": f"d{generation}"}
    body = {"generation": generation, "released": released, **process, **times}
    run.write(f"lease/{generation:06d}.json", json.dumps(body).encode())
