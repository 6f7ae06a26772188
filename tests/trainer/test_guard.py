"""The guard and the average: what is clipped, skipped and averaged, against plain arithmetic."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import CPU, memory_loader, run_ranks, tiny_config, train_attempt
from torch import Tensor
from torch.distributed.tensor import DTensor

from pipeline.loader import Batch
from pipeline.store import Store
from trainer import load_trained, parallel
from trainer.config import OptimConfig, TrainConfig
from trainer.guard import SPIKE_WINDOW_STEPS, StepGuard
from trainer.mae import build_mae, normalize
from trainer.optim import build_optimizer, learning_rate, parameter_groups
from trainer.run_files import open_run
from trainer.step_numbers import StepNumbers
from trainer.update import Trainee, build, update


def config_with(**fields: Any) -> TrainConfig:
    config = tiny_config()
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, **fields))


def whole(tensors: Any) -> list[Tensor]:
    return [(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone() for tensor in tensors]


def everything(trainee: Trainee) -> list[Tensor]:
    """Weights, moments and step counts."""
    moments = [value for state in trainee.optimizer.state.values() for value in state.values()]
    return whole([*trainee.model.parameters(), *moments])


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "shard_size"), [(1, None), (2, None), (4, 2)])
def test_clipping_is_torchs_on_the_whole_gradient(world_size: int, shard_size: int | None) -> None:
    config = config_with(clip_norm=0.05)
    model = build_mae(config)
    optimizer = torch.optim.AdamW(parameter_groups(model, config.optim.weight_decay), lr=0.01, betas=(0.9, 0.95))
    norms = []
    for _, batch in zip(range(3), memory_loader(config), strict=False):
        images = normalize(batch.images, config.data.augment.mean, config.data.augment.std)
        model(images, batch.kept_ids, batch.masked_ids).mean().backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)))
        optimizer.step()
        optimizer.zero_grad()
    assert min(norms) > 0.06  # there was something to clip
    for found, found_norms in run_ranks(_train_clipped, world_size, shard_size):
        assert found_norms == pytest.approx(norms, rel=1e-3)
        # The first moments: weights also move where a gradient is nothing but rounding.
        for ours, parameter in zip(found, model.parameters(), strict=True):
            torch.testing.assert_close(ours, optimizer.state[parameter]["exp_avg"], rtol=1e-3, atol=1e-6)


def _train_clipped(shard_size: int | None) -> tuple[list[Tensor], list[float]]:
    config = config_with(clip_norm=0.05)
    with parallel.process_mesh(CPU, shard_size) as mesh:
        trainee, numbers, batches = build(config, CPU, mesh), StepNumbers(config, 40, CPU), memory_loader(config)
        for step in range(3):
            update(config, trainee, batches, numbers, step=step, lr=0.01)
        norms = [step.record["grad_norm"] for step in numbers.read()]
        return whole(trainee.optimizer.state[p]["exp_avg"] for p in trainee.model.parameters()), norms


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_skipped_update_changes_no_bit(world_size: int) -> None:
    assert run_ranks(_skip_one, world_size) == [[False, True, False]] * world_size


def _skip_one() -> list[bool]:
    """Whether each of three updates left everything as it was; the second one has a loss that is not a number."""

    def broken(batch: Batch) -> Batch:
        if batch.step == 1 and parallel.rank() == 0:
            return dataclasses.replace(batch, images=torch.full_like(batch.images, math.nan, dtype=torch.float32))
        return batch

    config = config_with(clip_norm=1.0)
    unchanged = []
    with parallel.process_mesh(CPU) as mesh:
        trainee, numbers = build(config, CPU, mesh), StepNumbers(config, 40, CPU)
        batches = memory_loader(config, change=broken)
        for step in range(3):
            before = everything(trainee)
            update(config, trainee, batches, numbers, step=step, lr=0.01)
            after = everything(trainee)
            same = [torch.equal(one, other) for one, other in zip(before, after, strict=False)]
            unchanged.append(all(same) and len(before) == len(after))
    return unchanged


def judge(guard: StepGuard, model: torch.nn.Module, optimizer: Any, loss: float, norm: float) -> bool:
    """Whether a batch of eight images with this mean loss and gradient norm is skipped."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    next(model.parameters()).grad.view(-1)[0] = norm  # type: ignore[union-attr]
    guard.judge(model, optimizer, torch.tensor(8 * loss))
    return bool(optimizer.found_inf)


@pytest.mark.parametrize("sigmas", [None, 6.0])
def test_a_spike_is_skipped_once_there_is_something_to_compare_with(sigmas: float | None) -> None:
    config = config_with(spike_sigmas=sigmas)
    generator = torch.Generator().manual_seed(0)
    with parallel.process_mesh(CPU) as mesh:
        model = torch.nn.Linear(3, 3)
        guard, optimizer = StepGuard(config, mesh, CPU), build_optimizer(config, model)
        assert not judge(guard, model, optimizer, 1.0, 1.0)
        assert not judge(guard, model, optimizer, 30.0, 1.0)  # nothing is known yet
        for _ in range(10 * SPIKE_WINDOW_STEPS):
            noise = 0.1 * torch.randn(2, generator=generator)
            assert not judge(guard, model, optimizer, 1.0 + float(noise[0]), 2.0 + float(noise[1]))
        assert judge(guard, model, optimizer, 1.8, 2.0) is (sigmas is not None)
        assert judge(guard, model, optimizer, 1.0, 2.8) is (sigmas is not None)
        assert not judge(guard, model, optimizer, 0.1, 0.1)  # only what is too large
        assert judge(guard, model, optimizer, math.inf, 2.0)
        assert judge(guard, model, optimizer, 1.0, math.nan)
        assert not judge(guard, model, optimizer, 1.2, 2.2)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_average_is_the_formulas(world_size: int) -> None:
    for formula, average, _ in run_ranks(_average, world_size):
        assert {"cls_token", "blocks.0.attn.qkv.weight", "norm.bias"} < average.keys()
        assert not any(name.startswith("decoder") for name in average)
        for name, weight in average.items():
            torch.testing.assert_close(weight, formula[name].float(), rtol=1e-5, atol=1e-7)


def test_the_averaged_encoder_of_a_run_can_be_loaded(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    open_run(Store(url), AVERAGED, "digest")
    train_attempt(url, AVERAGED)
    _, average, last = _average()
    loaded = load_trained(url, average=True).model.state_dict()
    for name, weight in last.items():
        assert torch.equal(loaded[name], average.get(name, weight)), name
    assert not torch.equal(average["cls_token"], last["cls_token"])
    plain = str(tmp_path / "plain")
    open_run(Store(plain), tiny_config(), "digest")
    with pytest.raises(ValueError, match=r"keeps no averaged weights.*optim\.ema_decay"):
        load_trained(plain, average=True)


AVERAGED = config_with(ema_decay=0.75, num_steps=4)


def _average() -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """By the formula in double precision, as kept, and the last weights, after four steps."""
    with parallel.process_mesh(CPU) as mesh:
        trainee, numbers = build(AVERAGED, CPU, mesh), StepNumbers(AVERAGED, 40, CPU)
        batches = memory_loader(AVERAGED)
        formula = {name: weight.double() for name, weight in build_mae(AVERAGED).named_parameters()}
        for step in range(4):
            update(AVERAGED, trainee, batches, numbers, step=step, lr=learning_rate(AVERAGED, step, 4))
            last = {name: whole([weight.detach()])[0] for name, weight in trainee.model.named_parameters()}
            formula = {name: 0.75 * old + 0.25 * last[name].double() for name, old in formula.items()}
        assert trainee.average is not None
        return formula, {name: whole([weight])[0] for name, weight in trainee.average.tensors.items()}, last


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clip_norm": 0.0}, "optim.clip_norm (0.0) must be positive"),
        ({"spike_sigmas": -1.0}, "optim.spike_sigmas (-1.0) must be positive"),
        ({"ema_decay": 1.0}, "optim.ema_decay (1.0) must be between 0 and 1"),
        ({"max_skipped_steps": -1}, "optim.max_skipped_steps (-1) must not be negative"),
    ],
)
def test_values_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011 (the message follows)
        OptimConfig(**fields)
    assert message in str(refused.value)
