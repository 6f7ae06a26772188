"""Checkpoints small enough to test with."""

from __future__ import annotations

import dataclasses

import torch
from tiny_runs import tiny_config
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)

from pipeline.store import Store
from trainer import checkpoint, parallel
from trainer.checkpoint import Commit
from trainer.config import ParallelConfig
from trainer.mae import MAE, build_mae
from trainer.optim import build_optimizer
from trainer.sharding import shard_model

Numbers = dict[str, Tensor]


def trained(num_steps: int, *, seed: int = 0, shard: bool = False) -> tuple[MAE, torch.optim.Optimizer]:
    """A model and its optimizer after a few updates with made-up gradients, the same at every world size."""
    config = tiny_config()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, seed=seed))
    model = build_mae(config)
    if shard:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (parallel.world_size(),))
        shard_model(model, ParallelConfig(precision="fp32"), mesh)
    optimizer = build_optimizer(config, model)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    for _ in range(num_steps):
        for parameter in model.parameters():
            parameter.grad = parameter.detach().clone()
        optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def numbers(model: MAE, optimizer: torch.optim.Optimizer) -> Numbers:
    """Every weight and every number of the optimizer, whole, on every rank."""
    options = StateDictOptions(full_state_dict=True)
    weights = get_model_state_dict(model, options=options)
    found = {f"model.{name}": value.clone() for name, value in weights.items()}
    for name, moments in get_optimizer_state_dict(model, optimizer, options=options)["state"].items():
        found |= {f"optimizer.{name}.{moment}": value.clone() for moment, value in moments.items()}
    return found


def assert_same(ours: Numbers, theirs: Numbers) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=0, msg=name)


def save(run: Store, step: int) -> Commit:
    return checkpoint.write(run, checkpoint.state_of(*trained(step)), step=step, samples_seen=step * 8)


def resume(run: Store) -> tuple[int | None, list[tuple[str, str]]]:
    damages: list[tuple[str, str]] = []
    commit = checkpoint.find_resume(run, lambda path, reason: damages.append((path, reason)))
    return commit.step if commit else None, damages
