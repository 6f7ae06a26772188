"""Between two log intervals the host never waits for the device: nothing is read back, whatever is switched on."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from tiny_runs import CPU, memory_loader, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from trainer import parallel
from trainer.optim import learning_rate
from trainer.step_numbers import StepNumbers
from trainer.update import build, update

# What a GPU has to finish its work for: a value, or a size that depends on values, becomes known to the host.
WAITS = (
    torch.ops.aten._local_scalar_dense.default,  # .item(), float(), bool(), if
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.unique_dim.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.equal.default,
)


class Waits(TorchDispatchMode):
    """Counts them, wherever they come from."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.num_ops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_ops += 1
        by_mask = func is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if func in WAITS or by_mask:
            self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "fields", [{}, {"clip_norm": 0.5, "ema_decay": 0.9, "spike_sigmas": 6.0}], ids=["as in the paper", "all of it"]
)
@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_updates_read_nothing_back(fields: dict[str, Any], micro_batch_size: int | None) -> None:
    config = tiny_config(micro_batch_size=micro_batch_size)
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, **fields))
    with parallel.process_mesh(CPU) as mesh:
        trainee, numbers, batches = build(config, CPU, mesh), StepNumbers(config, 40, CPU), memory_loader(config)
        ready = [next(batches) for _ in range(3 * (2 if micro_batch_size else 1))]
        with Waits() as waits:
            source = iter(ready)
            for step in range(3):
                lr = learning_rate(config, step, 8)
                update(config, trainee, source, numbers, step=step, lr=lr)
        assert waits.num_ops > 300  # it did see the steps
        assert not waits.found


def test_it_would_notice() -> None:
    with Waits() as waits:
        value = torch.ones(3)
        if value.sum() > 2:
            float(value[0])
            value.tolist()
        value[value > 0]
    assert waits.found["aten._local_scalar_dense.default"] >= 2
    assert sum(waits.found.values()) >= 3
