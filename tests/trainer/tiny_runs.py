"""Runs small enough to test with: a model of a second, batches from memory, ranks as processes on this machine."""

from __future__ import annotations

import dataclasses
import datetime
import multiprocessing
import os
import pickle
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pipeline.augment import draw_masks
from pipeline.config import AugmentConfig, DataConfig
from pipeline.loader import Batch
from pipeline.order import Order, num_micro_steps
from pipeline.store import Store
from trainer import checkpoint, parallel
from trainer.config import (
    CheckpointConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)
from trainer.loop import Hooks, StopReason, Wish, train
from trainer.metrics import read_metrics

SAMPLES_PER_SHARD = np.array([13, 20, 7])
NUM_SAMPLES = int(SAMPLES_PER_SHARD.sum())
CPU = torch.device("cpu")

# Processes are forked from one that has imported all this and has run nothing: a rank starts in milliseconds.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__, "torch._dynamo"])


def tiny_config(
    *,
    num_steps: int = 8,
    every_steps: int = 4,
    log_every_steps: int = 2,
    precision: Any = "fp32",
    micro_batch_size: int | None = None,
) -> TrainConfig:
    """A recipe whose step takes milliseconds; four lanes, so three ranks hold 4, 2 and 2 of 8 images."""
    augment = AugmentConfig(image_size=(16, 16), patch_size=4, mask_ratio=0.75)
    return TrainConfig(
        data=DataConfig(global_batch_size=8, num_lanes=4, augment=augment, micro_batch_size=micro_batch_size),
        model=ModelConfig(
            embed_dim=16, depth=2, num_heads=2, decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2
        ),
        optim=OptimConfig(base_lr=0.02, num_steps=num_steps, warmup_fraction=0.25),
        parallel=ParallelConfig(precision=precision),
        checkpoint=CheckpointConfig(every_steps=every_steps, keep_last=2),
        log=LogConfig(every_steps=log_every_steps),
    )


def memory_loader(
    config: TrainConfig,
    start_step: int = 0,
    change: Callable[[Batch], Batch] = lambda batch: batch,
) -> Iterator[Batch]:
    """This rank's batches in the real order with the real masks, of images made up from their sample ids."""
    order, data = Order(SAMPLES_PER_SHARD, config.data), config.data
    rank, world_size = parallel.rank(), parallel.world_size()
    num_micro = num_micro_steps(data, world_size)
    step = start_step
    while True:
        positions = order.rank_positions(step, rank, world_size)
        for micro_step, part in enumerate(np.array_split(positions, num_micro)):
            ids, epochs = order.sample_ids(part), order.epochs(part)
            kept, masked = draw_masks(data.augment, data.seed, epochs, ids)
            batch = Batch(
                images=torch.stack([_image(int(i)) for i in ids]),
                kept_ids=torch.from_numpy(kept),
                masked_ids=torch.from_numpy(masked),
                sample_ids=torch.from_numpy(ids),
                labels=torch.full((len(ids),), -1),
                step=step,
                micro_step=micro_step,
                num_micro_steps=num_micro,
            )
            yield change(batch)
        step += 1


def _image(sample_id: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sample_id)
    small = torch.randint(0, 256, (1, 3, 4, 4), generator=generator).float()
    return torch.nn.functional.interpolate(small, (16, 16), mode="bilinear")[0].byte()


@dataclasses.dataclass
class Told:
    """What an attempt returned and told."""

    reason: StopReason
    records: list[Any]


def stopping_at(step: int | None, records: list[Any], **others: Any) -> Hooks:
    """Hooks that collect the records, and ask to stop once that of `step` is among them; None never does."""

    def ask() -> Wish:
        return Wish.STOP if step is not None and records and records[-1]["step"] >= step else Wish.GO_ON

    return Hooks(ask=ask, on_metrics=records.append, **others)


def train_attempt(
    url: str,
    config: TrainConfig,
    *,
    attempt: int = 1,
    stop_at: int | None = None,
    change: Callable[[Batch], Batch] = lambda batch: batch,
) -> Told:
    """One attempt at the run at `url`, from its newest checkpoint on; asked to stop once `stop_at` was recorded."""
    run = Store(url)
    commit = checkpoint.find_resume(run, lambda path, reason: None)
    records: list[Any] = []
    reason = train(
        config,
        memory_loader(config, commit.step if commit else 0, change),
        run=run,
        num_samples=NUM_SAMPLES,
        attempt=attempt,
        device=CPU,
        resume_from=commit,
        hooks=stopping_at(stop_at, records),
    )
    return Told(reason, records)


def losses(url: str) -> list[float]:
    """The loss of every step of a run."""
    return [record["loss"] for record in read_metrics(Store(url))]


def run_ranks(action: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """Call `action` in `world_size` new processes that are the ranks of one gloo group; their results, by rank.

    Without a group if `world_size` is 0: one process then. Raises AssertionError with the traceback of a rank
    that failed, or its exit code if it died.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(max(1, world_size))]
        processes = []
        for rank, (_, sender) in enumerate(pipes):
            inputs = (rank, world_size, f"{folder}/store", dict(os.environ), sender, action, arguments)
            process = _CONTEXT.Process(target=_be_a_rank, args=inputs, daemon=True)
            process.start()
            sender.close()
            processes.append(process)
        results = [_receive(receiver) for receiver, _ in pipes]
        for process in processes:
            process.join()
    failures = [
        f"rank {rank} (exit code {process.exitcode}):\n{error}"
        for rank, (process, (_, error)) in enumerate(zip(processes, results, strict=True))
        if error
    ]
    assert not failures, "\n".join(failures)
    return [value for value, _ in results]


def _receive(receiver: Connection) -> tuple[Any, str | None]:
    try:
        # Plainly pickled: torch would share a tensor's memory with a process that is gone by then.
        return pickle.loads(receiver.recv_bytes())
    except EOFError:
        return None, "died"


def _be_a_rank(
    rank: int,
    world_size: int,
    rendezvous: str,
    environment: dict[str, str],
    sender: Connection,
    action: Callable[..., Any],
    arguments: Any,
) -> None:
    os.environ.update(environment)  # not that of the process we were forked from
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    try:
        if world_size:
            dist.init_process_group(
                "gloo",
                init_method=Path(rendezvous).as_uri(),
                rank=rank,
                world_size=world_size,
                timeout=datetime.timedelta(seconds=60),
            )
        sender.send_bytes(pickle.dumps((action(*arguments), None)))
    except BaseException:
        sender.send_bytes(pickle.dumps((None, traceback.format_exc())))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
