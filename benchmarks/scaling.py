"""ViT-H over up to 1,024 ranks, simulated: memory of a rank and bytes on the wire in one optimizer step.

python -m benchmarks.scaling

The real model, the real update and the real FSDP2 run as one rank of torch's fake process group, on tensors that have
shapes and no values. What is allocated and what is sent is counted; nothing is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPRefType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config import num_kept_patches, num_patches
from pipeline.loader import Batch
from pipeline.order import num_micro_steps
from trainer import parallel, recipes
from trainer.config import TrainConfig
from trainer.step_numbers import StepNumbers
from trainer.update import Trainee, build, update

CPU = torch.device("cpu")
RESULT = Path("build/bench/scaling.json")
WORLD_SIZES = (8, 64, 512, 1024)
NODE_SIZE = 8
KINDS = {
    "weights": (_FSDPRefType.SHARDED_PARAM, _FSDPRefType.BUFFER),
    "gradients": (_FSDPRefType.SHARDED_GRAD, _FSDPRefType.UNSHARDED_GRAD),
    "moments": (_FSDPRefType.OPT,),
    "gathered": (_FSDPRefType.UNSHARDED_PARAM, _FSDPRefType.ALL_GATHER, _FSDPRefType.REDUCE_SCATTER),
    "activations": (_FSDPRefType.ACT, _FSDPRefType.TEMP, _FSDPRefType.INP),
}


class WireBytes(TorchDispatchMode):
    """Counts what one rank sends, if every collective goes around a ring.

    Source:
        Patarasuk & Yuan 2009: of n ranks each sends (n - 1) / n of the whole to gather or to reduce and scatter it, and
        twice that to reduce it for all.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        """Args: mesh: from `parallel.process_mesh`; its last dimension is the ranks that share a copy."""
        super().__init__()
        self._shard_group = mesh.get_group("shard").group_name
        self.sent_bytes = {"shard": 0.0, "replicate": 0.0}
        """By whom it is exchanged with: ranks that share a copy of the model, or all others."""
        self.num_collectives = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        whole = _exchanged(func, args)
        if whole is not None:
            tensor, times, box = whole
            group = dist.ProcessGroup.unbox(box)
            size = group.size()
            kind = "shard" if group.group_name == self._shard_group else "replicate"
            self.sent_bytes[kind] += times * tensor.numel() * tensor.element_size() * (size - 1) / size
            self.num_collectives += 1
        elif func.namespace == "c10d":
            raise NotImplementedError(f"{func} is not counted")
        return result


def _exchanged(func: Any, args: Any) -> tuple[torch.Tensor, int, Any] | None:
    """Of a collective: the whole tensor, how often it goes around, and the group."""
    ops = torch.ops.c10d
    if func is ops._allgather_base_.default:
        return args[0], 1, args[2]
    if func is ops._reduce_scatter_base_.default:
        return args[1], 1, args[2]
    if func is ops.allreduce_.default:
        (tensor,) = args[0]
        return tensor, 2, args[1]
    return None


def simulate(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """One optimizer step of rank 0, after one that makes the moments.

    Args:
        config: its global batch and its lanes are divisible by `world_size`.
        world_size: ranks that are pretended.

    Returns:
        Bytes at the peak, in all and by kind; bytes sent by kind; number of collectives; and `state_share`, the rank's
        weights and moments over an even share of them.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        with parallel.process_mesh(CPU, config.parallel.shard_size) as mesh, FakeTensorMode():
            trainee = build(config, CPU, mesh)
            _step(config, trainee, MicroSteps(config, world_size))
            assert isinstance(trainee.model, FSDPModule)
            with WireBytes(mesh) as wire, FSDPMemTracker(trainee.model, trainee.optimizer) as memory:
                micro_steps = MicroSteps(config, world_size, memory)
                _step(config, trainee, micro_steps)
            peak = memory.get_tracker_snapshot("peak")[CPU]
            num_parameters = sum(parameter.numel() for parameter in trainee.model.parameters())
    finally:
        dist.destroy_process_group()
    kinds = {name: sum(peak[kind] for kind in kinds) for name, kinds in KINDS.items()}
    assert sum(kinds.values()) == peak["Total"], peak
    # FSDP2 adds up the gradients of all but the last micro-batch unsharded; the tracker has no name for these.
    kinds["gradients"] += micro_steps.kept_bytes
    kinds["activations"] -= micro_steps.kept_bytes
    shard_size = config.parallel.shard_size or world_size
    even_share = 12 * num_parameters / shard_size  # fp32: a weight and two moments
    return {
        "world_size": world_size,
        "shard_size": shard_size,
        "activation_checkpointing": config.parallel.activation_checkpointing,
        "images_per_rank": config.data.global_batch_size // world_size,
        "num_micro_steps": num_micro_steps(config.data, world_size),
        "peak_bytes": peak["Total"],
        "peak_bytes_by_kind": kinds,
        "sent_bytes": wire.sent_bytes,
        "num_collectives": wire.num_collectives,
        "state_share": (peak[_FSDPRefType.SHARDED_PARAM] + peak[_FSDPRefType.OPT]) / even_share,
    }


def _step(config: TrainConfig, trainee: Trainee, micro_steps: MicroSteps) -> None:
    numbers = StepNumbers(config, config.data.global_batch_size, CPU)
    update(config, trainee, iter(micro_steps), numbers, step=0, lr=1e-4)


class MicroSteps:
    """The micro-batches of one rank's step, of the right shapes.

    Args:
        config: batch and images.
        world_size: ranks that share the batch.
        memory: told what is an input, and that another pass begins.
    """

    def __init__(self, config: TrainConfig, world_size: int, memory: FSDPMemTracker | None = None) -> None:
        self._config, self._memory = config, memory
        self._num_images = config.data.global_batch_size // world_size
        self._num_micro = num_micro_steps(config.data, world_size)
        self.kept_bytes = 0
        """What was there between two micro-batches that is no weight, moment or input."""

    def __iter__(self) -> Iterator[Batch]:
        """Each micro-batch, from the first."""
        for micro_step in range(self._num_micro):
            batch = self._batch(micro_step)
            if self._memory is not None:
                self._memory.reset_mod_stats()  # or it would take a second forward pass for a mistake
                self._memory.track_inputs((batch.images, batch.kept_ids, batch.masked_ids))
                now = self._memory.get_tracker_snapshot()[CPU]
                if micro_step > 0:
                    self.kept_bytes = now[_FSDPRefType.ACT] + now[_FSDPRefType.TEMP]
            yield batch

    def _batch(self, micro_step: int) -> Batch:
        augment = self._config.data.augment
        size = self._num_images // self._num_micro
        num_kept = num_kept_patches(augment)
        return Batch(
            images=torch.zeros(size, 3, *augment.image_size, dtype=torch.uint8),
            kept_ids=torch.zeros(size, num_kept, dtype=torch.int64),
            masked_ids=torch.zeros(size, num_patches(augment) - num_kept, dtype=torch.int64),
            sample_ids=torch.zeros(size, dtype=torch.int64),
            labels=torch.zeros(size, dtype=torch.int64),
            step=0,
            micro_step=micro_step,
            num_micro_steps=self._num_micro,
        )


def layouts() -> Iterator[tuple[TrainConfig, int]]:
    """What the tables are about: FSDP2 and HSDP at every world size, then what recomputing saves at one."""
    recipe = recipes.mae_huge_1600ep()
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, num_lanes=max(WORLD_SIZES)))
    for world_size in WORLD_SIZES:
        for shard_size in (None, min(NODE_SIZE, world_size // 2)):
            yield _with(recipe, shard_size=shard_size, activation_checkpointing="full"), world_size
    for kind in ("none", "selective"):
        yield _with(recipe, activation_checkpointing=kind), 64


def _with(config: TrainConfig, **fields: Any) -> TrainConfig:
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, **fields))


def print_rows(rows: Iterable[dict[str, Any]]) -> None:
    """The table: one row a layout, printed as soon as it is there."""
    names = "".join(f"{name:>12}" for name in KINDS)
    print(f"{'':37} | of a rank at its peak, MiB{'':43} | a rank sends, GB a step |  state, x")
    head = f"{'ranks':>6}{'shard':>6}{'recompute':>11}{'images':>7}{'micro':>7} |{'peak':>8}{names}"
    print(f"{head} |{'shard':>8}{'copies':>9}{'calls':>7} | even share", flush=True)
    for row in rows:
        kinds = "".join(f"{row['peak_bytes_by_kind'][name] / 2**20:12,.0f}" for name in KINDS)
        layout = f"{row['world_size']:6,}{row['shard_size']:6,}{row['activation_checkpointing']:>11}"
        batch = f"{row['images_per_rank']:7}{row['num_micro_steps']:7}"
        sent = "".join(
            f"{row['sent_bytes'][kind] / 1e9:{width}.2f}" for kind, width in (("shard", 8), ("replicate", 9))
        )
        peak = f"{row['peak_bytes'] / 2**20:8,.0f}{kinds}"
        print(f"{layout}{batch} |{peak} |{sent}{row['num_collectives']:7} |{row['state_share']:11.3f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.parse_args()
    print("ViT-H/14 at 224 px, 4,096 images a step, bf16; simulated, minutes a row")
    rows: list[dict[str, Any]] = []

    def found() -> Iterator[dict[str, Any]]:
        for config, world_size in layouts():
            rows.append(simulate(config, world_size))
            yield rows[-1]

    print_rows(found())
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__}
    RESULT.write_text(json.dumps({"machine": machine, "rows": rows, "goals": []}, indent=1) + "\n")
    print(f"written to {RESULT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
