"""The peer of the bad night: Ray Train's own documented fault tolerance, `report` and `get_checkpoint`, on our model.

`python -m tests.chaos.ray_pattern --like RUN --data DATASET --out FOLDER`, with RAY_ADDRESS. Model, images, batch and
cadence are those of RUN. What Ray leaves to the user is as good as ours: the loader goes on at any step at once, and
checkpoints go to a local folder that all nodes see. Ray restarts the workers as often as it takes.

Source:
    Ray's user guides "Handling Failures and Node Preemption" and "Saving and Loading Checkpoints".
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from pipeline import Loader, open_dataset
from pipeline.store import Store
from trainer.config import TrainConfig, from_dict, to_dict
from trainer.mae import build_mae, normalize
from trainer.optim import build_optimizer, learning_rate
from trainer.run_files import read_run

NUM_STEPS = 10**6
STATE = "state.pt"


def train_func(settings: dict[str, Any]) -> None:
    """One worker, as the guides write it."""
    torch.set_num_threads(1)
    config: TrainConfig = from_dict(TrainConfig, settings["config"])
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    model = ray.train.torch.prepare_model(build_mae(config))
    optimizer, start = build_optimizer(config, model), 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / STATE, weights_only=True)
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    with (
        Loader(
            open_dataset(settings["data"]), config.data, dp_rank=rank, dp_world_size=world_size, start_step=start
        ) as loader,
        Path(settings["out"], f"steps-{time.time_ns()}.jsonl").open("w") as records,
    ):
        for batch in loader:
            loss = train_step(config, model, optimizer, batch)
            step = batch.step + 1
            if rank == 0:
                records.write(json.dumps({"step": step, "time": time.time(), "loss": loss}) + "\n")
                records.flush()
            if step % config.checkpoint.every_steps == 0:
                report(rank, model, optimizer, step, loss)


def train_step(config: TrainConfig, model: Any, optimizer: torch.optim.Optimizer, batch: Any) -> float:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, batch.step, NUM_STEPS)
    augment = config.data.augment
    images = normalize(batch.images, augment.mean, augment.std)
    loss = model(images, batch.kept_ids, batch.masked_ids).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def report(rank: int, model: Any, optimizer: torch.optim.Optimizer, step: int, loss: float) -> None:
    """Rank 0 saves, all report."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if rank == 0:
            state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, Path(folder) / STATE)
            checkpoint = Checkpoint.from_directory(folder)
        ray.train.report({"step": step, "loss": loss}, checkpoint=checkpoint)


def main() -> int:
    """Train until killed."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.ray_pattern", description=__doc__)
    parser.add_argument("--like", required=True, help="URL of a run of ours, whose recipe is taken")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num-workers", type=int, default=2)
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    config = read_run(Store(arguments.like)).config
    ray.init()
    trainer = TorchTrainer(
        train_func,
        train_loop_config={"config": to_dict(config), "data": arguments.data, "out": str(out)},
        scaling_config=ScalingConfig(num_workers=arguments.num_workers),
        run_config=RunConfig(
            name="night",
            storage_path=str(out / "ray"),
            failure_config=FailureConfig(max_failures=-1),
            checkpoint_config=CheckpointConfig(num_to_keep=config.checkpoint.keep_last),
        ),
    )
    trainer.fit()
    return 0


if __name__ == "__main__":
    sys.exit(main())
