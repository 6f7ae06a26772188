"""How well batches are shuffled, against a full permutation: ImageNet's size and classes, without its images.

Samples come from a folder sorted by class. They are either written by `tarmac shard`, whose plan permutes them, or
left as they are in tars that `tarmac index` took in place. Prints a table and writes build/bench/shuffle.json;
docs/shuffle.md says how to read it.

    python -m benchmarks.shuffle [--quick] [--picture docs/images/shuffle.png]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.loader_memory import cpu_name
from pipeline.config import DataConfig
from pipeline.listing import SampleRef
from pipeline.order import Order
from pipeline.write import plan_shards

Int64 = npt.NDArray[np.int64]
RESULT = Path("build/bench/shuffle.json")
IMAGE_BYTES, SHARD_BYTES = 110_000, 256 * 2**20
NUM_SAMPLES, NUM_CLASSES = 1_281_167, 1_000
NOISE_SIGMAS = 4.0
NUM_RANKS = 8

METRICS = {
    "ks": "distance of the source positions in a batch from uniform (Kolmogorov-Smirnov)",
    "chi2": "chi-square of a batch's classes, over its degrees of freedom",
    "distinct": "distinct classes in a batch",
    "largest": "samples of a batch's largest class",
    "serial": "correlation of the classes of a batch and the next",
    "again": "pairs that share a batch in two epochs running, over what chance gives",
}


@dataclass(frozen=True)
class Placed:
    """A dataset without bytes: where each of its samples stood in the source, and the samples of each shard."""

    name: str
    source_position: Int64
    samples_per_shard: Int64


@dataclass(frozen=True)
class Row:
    """One way to make batches, measured with several seeds; `values` maps a metric to a value a seed."""

    dataset: str
    order: str
    memory_bytes: int | None
    values: dict[str, list[float]]


def sharded(num_samples: int, shard_bytes: int) -> Placed:
    """What `tarmac shard` makes of a folder sorted by class."""
    refs = [SampleRef(f"{at:08d}", f"{at:08d}.jpg", IMAGE_BYTES, -1) for at in range(num_samples)]
    shards = plan_shards(refs, 0, shard_bytes)
    position = np.array([int(ref.key) for shard in shards for ref in shard])
    return Placed("tarmac shard", position, np.array([len(shard) for shard in shards]))


def indexed(num_samples: int, shard_bytes: int) -> Placed:
    """What `tarmac index` finds in tars that were filled in the order of the classes."""
    a_shard = shard_bytes // IMAGE_BYTES
    sizes = np.diff(np.append(np.arange(0, num_samples, a_shard), num_samples))
    return Placed("tars sorted by class", np.arange(num_samples), sizes)


def two_epochs(placed: Placed, config: DataConfig) -> tuple[Int64, Int64]:
    """Source positions [steps, G] of the steps that lie wholly in the first and in the second epoch."""
    order, batch, total = Order(placed.samples_per_shard, config), config.global_batch_size, len(placed.source_position)
    num_steps = total // batch - 1
    epochs = []
    for first in (0, -(-total // batch)):
        ids = order.sample_ids(np.arange(first * batch, (first + num_steps) * batch))
        epochs.append(placed.source_position[ids].reshape(num_steps, batch))
    return epochs[0], epochs[1]


def two_permutations(num_samples: int, batch: int, seed: int) -> tuple[Int64, Int64]:
    """The same of two full permutations."""
    rng, num_steps = np.random.default_rng(seed), num_samples // batch - 1
    first, second = (rng.permutation(num_samples)[: num_steps * batch].reshape(num_steps, batch) for _ in range(2))
    return first, second


def two_of_webdataset(placed: Placed, batch: int, buffer: int, seed: int) -> tuple[Int64, Int64]:
    """The same of WebDataset's own buffer: shards permuted, dealt to `NUM_RANKS` ranks, each with a shuffle buffer."""
    from webdataset.filters import _shuffle

    starts = np.concatenate([[0], np.cumsum(placed.samples_per_shard)])
    num_steps, epochs = len(placed.source_position) // batch - 1, []
    for epoch in range(2):
        rng = random.Random(seed * 2 + epoch)
        shards = list(range(len(placed.samples_per_shard)))
        rng.shuffle(shards)

        def stream(rank: int, shards: list[int] = shards) -> Iterator[int]:
            while True:  # a rank with fewer shards begins again, as `resampled` or `with_epoch` make it
                for shard in shards[rank::NUM_RANKS]:
                    yield from range(int(starts[shard]), int(starts[shard + 1]))

        ranks = [_shuffle(stream(rank), buffer, buffer // 10, rng) for rank in range(NUM_RANKS)]
        a_rank = num_steps * batch // NUM_RANKS
        columns = [np.fromiter(rank, np.int64, a_rank).reshape(num_steps, -1) for rank in ranks]
        epochs.append(placed.source_position[np.concatenate(columns, axis=1)])
    return epochs[0], epochs[1]


def measure(first: Int64, second: Int64, num_samples: int, num_classes: int) -> dict[str, float]:
    """The metrics of two epochs of source positions [steps, G]; means over the batches of the first."""
    counts = np.stack([np.bincount(ids * num_classes // num_samples, minlength=num_classes) for ids in first])
    expected = first.shape[1] * np.bincount(np.arange(num_samples) * num_classes // num_samples) / num_samples
    excess = counts - expected
    steps = np.arange(1, first.shape[1] + 1) / first.shape[1]
    distance = np.abs(np.sort(first, axis=1) / num_samples - steps).max(axis=1)
    serial = [float(np.corrcoef(excess[at], excess[at + 1])[0, 1]) for at in range(len(excess) - 1)]
    return {
        "ks": float(distance.mean()),
        "chi2": float((excess**2 / expected).sum(axis=1).mean() / (num_classes - 1)),
        "distinct": float((counts > 0).sum(axis=1).mean()),
        "largest": float(counts.max(axis=1).mean()),
        "serial": float(np.mean(serial)),
        "again": pairs_again(first, second, num_samples),
    }


def pairs_again(first: Int64, second: Int64, num_samples: int) -> float:
    """Pairs that share a batch in both epochs, over their number if the second were drawn by chance."""
    batch_of = np.full(num_samples, -1)
    batch_of[second.reshape(-1)] = np.repeat(np.arange(len(second)), second.shape[1])
    found = 0
    for ids in first:
        there = batch_of[ids]
        together = np.bincount(there[there >= 0])
        found += int((together * (together - 1) // 2).sum())
    batch, (num_first, num_second) = first.shape[1], (len(first), len(second))
    chance = num_second * batch * (batch - 1) / num_samples / (num_samples - 1)
    return found / (num_first * batch * (batch - 1) / 2 * chance)


def held_bytes(config: DataConfig) -> int:
    """Encoded samples that one of `NUM_RANKS` ranks holds at the most: the arithmetic of docs/memory.md."""
    a_lane = (1 + config.read_ahead_steps) * config.global_batch_size // config.num_lanes
    return config.num_lanes // NUM_RANKS * (a_lane + 2 * config.shuffle_window_samples) * IMAGE_BYTES


def rows(num_samples: int, num_classes: int, shard_bytes: int, num_seeds: int) -> list[Row]:
    """Every dataset with every order."""
    default = DataConfig()
    variants = [  # lanes, window
        (default.num_lanes, default.shuffle_window_samples),
        (default.num_lanes, 512),
        (1024, 32),
        (1024, 128),
        (4096, 8),
    ]
    batch = default.global_batch_size

    def row(
        dataset: str, order: str, memory: int | None, epochs: Callable[[int], tuple[Int64, Int64]], times: int = 1
    ) -> Row:
        found = [measure(*epochs(seed), num_samples, num_classes) for seed in range(times * num_seeds)]
        print(f"measured: {dataset}, {order}", flush=True)
        return Row(dataset, order, memory, {name: [one[name] for one in found] for name in METRICS})

    table = [row("any", "full permutation", None, lambda seed: two_permutations(num_samples, batch, seed), 4)]
    for placed in (sharded(num_samples, shard_bytes), indexed(num_samples, shard_bytes)):
        for lanes, window in variants:
            configs = [
                DataConfig(num_lanes=lanes, shuffle_window_samples=window, seed=seed) for seed in range(num_seeds)
            ]
            name = f"{lanes} lanes, window {window}" + (" (default)" if (lanes, window) == variants[0] else "")
            memory = held_bytes(configs[0])
            table.append(
                row(placed.name, name, memory, lambda seed, p=placed, c=configs: two_epochs(p, c[seed]))  # type: ignore[misc]
            )
        for buffer in (1000, 10000):
            name = f"webdataset, {NUM_RANKS} ranks, shuffle({buffer})"
            memory = buffer * IMAGE_BYTES
            table.append(
                row(placed.name, name, memory, lambda seed, p=placed, b=buffer: two_of_webdataset(p, batch, b, seed))  # type: ignore[misc]
            )
    return table


def sigmas(row: Row, permutation: Row, metric: str) -> float:
    """How far a row's mean is from the permutation's, in standard errors of the difference."""
    ours, theirs = (np.array(one.values[metric]) for one in (row, permutation))
    error = theirs.std(ddof=1) * np.sqrt(1 / len(ours) + 1 / len(theirs))
    return float((ours.mean() - theirs.mean()) / error)


def goals(table: Sequence[Row]) -> list[dict[str, Any]]:
    """What the defaults promise for a dataset that `tarmac shard` wrote."""
    default = next(row for row in table if row.order.endswith("(default)"))
    found = [(name, sigmas(default, table[0], name)) for name in METRICS]
    return [
        {
            "name": f"{name}: sigmas from a full permutation",
            "goal": NOISE_SIGMAS,
            "measured": off,
            "met": abs(off) <= NOISE_SIGMAS,
        }
        for name, off in found
    ]


def print_table(table: Sequence[Row]) -> None:
    print(f"\n{'dataset':<21}{'order':<38}" + "".join(f"{name:>10}" for name in METRICS) + f"{'held, a rank':>15}")
    for row in table:
        cells = "".join(f"{np.mean(row.values[name]):>10.4g}" for name in METRICS)
        held = "-" if row.memory_bytes is None else f"{row.memory_bytes / 1e6:,.0f} MB"
        print(f"{row.dataset:<21}{row.order:<38}{cells}{held:>15}")
    noise = "".join(f"{np.std(table[0].values[name], ddof=1):>10.2g}" for name in METRICS)
    print(f"{'':<21}{'noise of a full permutation, 1 sigma':<38}{noise}")
    for name, meaning in METRICS.items():
        print(f"  {name:<9} {meaning}")


def draw(path: Path, num_samples: int, shard_bytes: int) -> None:
    """A picture: the classes of one batch, by source position, for the orders that people ask about."""
    from matplotlib.figure import Figure

    config = DataConfig()
    panels = {
        "full permutation": two_permutations(num_samples, config.global_batch_size, 0)[0],
        "tarmac shard, defaults": two_epochs(sharded(num_samples, shard_bytes), config)[0],
        "tars sorted by class, defaults": two_epochs(indexed(num_samples, shard_bytes), config)[0],
    }
    figure = Figure(figsize=(8, 4.5), dpi=90, layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, sharey=True)
    for ax, (name, epochs) in zip(axes, panels.items(), strict=True):
        ax.hist(epochs[len(epochs) // 2], bins=NUM_CLASSES, range=(0, num_samples), color="#1f5aa6")
        ax.set_title(name, loc="left", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    axes[1].set_ylabel("samples of each class in one batch of 4096")
    axes[-1].set_xlabel("position in the source, sorted by class")
    figure.savefig(path, format="png")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the samples, two seeds")
    parser.add_argument("--picture", type=Path, help="draw one batch of each order as a PNG")
    parser.add_argument("--result", type=Path, default=RESULT, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    scale = 10 if options.quick else 1
    num_samples, shard_bytes = NUM_SAMPLES // scale, SHARD_BYTES // scale
    table = rows(num_samples, NUM_CLASSES, shard_bytes, 2 if options.quick else 5)
    print_table(table)
    found = goals(table)
    for goal in found:
        print(
            f"goal: {goal['name']} within {goal['goal']}: {goal['measured']:+.1f}, {'met' if goal['met'] else 'MISSED'}"
        )
    machine = {"cpus": len(os.sched_getaffinity(0)), "cpu": cpu_name(), "python": platform.python_version()}
    options.result.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        {"dataset": row.dataset, "order": row.order, "held_bytes": row.memory_bytes, **row.values} for row in table
    ]
    options.result.write_text(json.dumps({"machine": machine, "rows": lines, "goals": found}, indent=1) + "\n")
    print(f"written to {options.result}")
    if options.picture:
        draw(options.picture, num_samples, shard_bytes)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
