"""One row of the step benchmark in a process of its own: `python -m benchmarks.peers.step_runner SPEC NUM_STEPS COUNT`.

The last line that it prints is what was measured, as JSON; COUNT is 1 where operations and memory are counted as well.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import step_counts
from benchmarks.peers.step_models import Spec, batch_of, images_of, noise_of, our_config
from benchmarks.peers.step_peers import build_peer
from pipeline.loader import Batch
from trainer import parallel
from trainer.mae import build_mae, normalize
from trainer.step_numbers import StepNumbers
from trainer.update import build, update

CPU = torch.device("cpu")
LR = 1e-4


def main() -> None:
    """Print what was measured as JSON."""
    spec, num_steps, count = Spec(**json.loads(sys.argv[1])), int(sys.argv[2]), sys.argv[3] == "1"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if spec.precision == "bf16" and spec.size != "tiny" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        sys.exit("this CPU has no instructions for bf16 (avx512 or amx), and takes minutes a step without them")
    measure = {"matmuls": step_counts.time_matmuls, "ours": time_ours, "bare": time_bare}
    measure |= {"loop": time_loop, "ray": time_under_ray}
    print(json.dumps(measure.get(spec.builder, time_peer)(spec, num_steps, count)))


def time_ours(spec: Spec, num_steps: int, count: bool) -> dict[str, Any]:
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

        found = time_steps(one_step, num_steps) | {"loss": numbers.read()[0].record["loss"]}
        if count:
            images = normalize(one.images, config.data.augment.mean, config.data.augment.std)
            found |= step_counts.counts(
                lambda: trainee.model(images, one.kept_ids, one.masked_ids).sum(), trainee.model, spec.batch_size
            )
    return found


def time_peer(spec: Spec, num_steps: int, count: bool) -> dict[str, Any]:
    """Steps of a peer's model with the optimizer that ours has, bf16 by autocast."""
    model, images, noise = build_peer(spec), images_of(spec.batch_size), noise_of(spec.batch_size)
    losses: list[float] = []

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=spec.precision == "bf16"):
            loss: Tensor = model(images, noise)
        return loss

    found = time_steps(_plain_step(model, forward, losses), num_steps) | {"loss": losses[0]}
    return found | (step_counts.counts(forward, model, spec.batch_size) if count else {})


def time_bare(spec: Spec, num_steps: int, count: bool) -> dict[str, Any]:
    """Steps of our model with nothing around it, not even the gradient's norm."""
    config, one, losses = our_config(spec), batch_of(spec.batch_size), list[float]()
    model, augment = build_mae(config), config.data.augment

    def forward() -> Tensor:
        images = normalize(one.images, augment.mean, augment.std)
        loss: Tensor = model(images, one.kept_ids, one.masked_ids).mean()
        return loss

    return time_steps(_plain_step(model, forward, losses), num_steps) | {"loss": losses[0]}


def time_loop(spec: Spec, num_steps: int, count: bool) -> dict[str, Any]:
    """The same steps as `trainer.loop.train` takes them, records, events and saves included."""
    from benchmarks.peers.step_ray import train_alone

    return train_alone(spec, num_steps)


def time_under_ray(spec: Spec, num_steps: int, count: bool) -> dict[str, Any]:
    """The same in a Ray Train worker."""
    from benchmarks.peers.step_ray import train_under_ray

    return train_under_ray(spec, num_steps)


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


def time_steps(one_step: Callable[[], None], num_steps: int) -> dict[str, Any]:
    """Seconds of each step after one that warms up, its CPU seconds, and the largest resident memory by then."""
    one_step()
    return step_counts.timed(one_step, num_steps) | {"peak_bytes": peak_bytes()}


def peak_bytes() -> int:
    """The largest resident memory of this process so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def repeated(one: Batch, num_steps: int) -> Iterator[Batch]:
    """A batch again and again."""
    return (replace(one, step=step) for step in range(num_steps))


if __name__ == "__main__":
    main()
