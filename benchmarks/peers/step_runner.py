"""One row of the step benchmark in a process of its own.

    python -m benchmarks.peers.step_runner SPEC PLAN COUNT ADDRESS

It takes the turns that it is given at ADDRESS; COUNT is 1 where operations and memory are counted in the end.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.peers import step_counts
from benchmarks.peers.step_models import Spec, batch_of, images_of, noise_of, our_config
from benchmarks.peers.step_peers import build_peer
from benchmarks.peers.step_turns import Plan, Turns
from trainer import parallel
from trainer.mae import build_mae, normalize
from trainer.step_numbers import StepNumbers
from trainer.update import build, update

CPU = torch.device("cpu")
LR = 1e-4


def main() -> None:
    """Take all turns."""
    spec, plan, count = Spec(**json.loads(sys.argv[1])), Plan(**json.loads(sys.argv[2])), sys.argv[3] == "1"
    torch.set_num_threads(spec.num_threads)
    turns = Turns(sys.argv[4], plan) if spec.builder != "ray" else None
    if turns is None:
        from benchmarks.peers.step_ray import run_under_ray

        run_under_ray(spec, plan, sys.argv[4])
    elif spec.builder == "loop":
        from benchmarks.peers.step_ray import run_alone

        run_alone(spec, turns)
    else:
        run = {"matmuls": run_matmuls, "ours": run_ours, "bare": run_bare}.get(spec.builder, run_peer)
        run(spec, turns, count)


def run_matmuls(spec: Spec, turns: Turns, count: bool) -> None:
    """The limit: our step's matrix products and nothing else."""
    one_step, flops = step_counts.matmuls(spec)
    turns.take(one_step)
    turns.tell({"flops_per_image": flops / spec.batch_size})


def run_ours(spec: Spec, turns: Turns, count: bool) -> None:
    """Steps as a run of one rank takes them, on a batch from memory."""
    config = our_config(spec)
    one = batch_of(spec.batch_size)
    with parallel.process_mesh(CPU) as mesh:
        trainee = build(config, CPU, mesh)
        numbers, step = StepNumbers(config, 10**6, CPU), 0

        def one_step() -> None:
            nonlocal step
            update(config, trainee, iter([replace(one, step=step)]), numbers, step=step, lr=LR)
            step += 1

        turns.take(one_step)
        found = {"peak_bytes": step_counts.peak_bytes(), "loss": numbers.read()[0].record["loss"]}
        if count:
            images = normalize(one.images, config.data.augment.mean, config.data.augment.std)
            found |= step_counts.counts(
                lambda: trainee.model(images, one.kept_ids, one.masked_ids).sum(), trainee.model, spec.batch_size
            )
        turns.tell(found)


def run_peer(spec: Spec, turns: Turns, count: bool) -> None:
    """Steps of a peer's model with the optimizer that ours has, bf16 by autocast."""
    model, images, noise = build_peer(spec), images_of(spec.batch_size), noise_of(spec.batch_size)

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=spec.precision == "bf16"):
            loss: Tensor = model(images, noise)
        return loss

    _run_plainly(model, forward, spec, turns, count)


def run_bare(spec: Spec, turns: Turns, count: bool) -> None:
    """Steps of our model with nothing around it, not even the gradient's norm."""
    config, one = our_config(spec), batch_of(spec.batch_size)
    model, augment = build_mae(config), config.data.augment

    def forward() -> Tensor:
        images = normalize(one.images, augment.mean, augment.std)
        loss: Tensor = model(images, one.kept_ids, one.masked_ids).mean()
        return loss

    _run_plainly(model, forward, spec, turns, count)


def _run_plainly(model: nn.Module, forward: Callable[[], Tensor], spec: Spec, turns: Turns, count: bool) -> None:
    losses: list[float] = []
    turns.take(_plain_step(model, forward, losses))
    found = {"peak_bytes": step_counts.peak_bytes(), "loss": losses[0]}
    turns.tell(found | (step_counts.counts(forward, model, spec.batch_size) if count else {}))


def _plain_step(model: nn.Module, forward: Callable[[], Tensor], losses: list[float]) -> Callable[[], None]:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LR, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    def one_step() -> None:
        loss = forward()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    return one_step


if __name__ == "__main__":
    main()
