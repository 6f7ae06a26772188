"""A dataset of 10^9 samples in 10^5 shards, of which only the manifest exists: how long until a rank knows its samples?

python -m benchmarks.scale
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pipeline import DataConfig, open_dataset
from pipeline.manifest import Manifest, ShardInfo, write_manifest
from pipeline.order import Order
from pipeline.store import Store

NUM_SHARDS, SAMPLES_PER_SHARD = 100_000, 10_000
RANK, WORLD_SIZE, NUM_STEPS = 3, 8, 100
RESULT = Path("build/bench/scale.json")


def write_synthetic_manifest(folder: str) -> None:
    shards = tuple(
        ShardInfo(f"shard-{number:06d}", SAMPLES_PER_SHARD, 10**9, f"{number:064x}", f"{number:064x}", f"{number:064x}")
        for number in range(NUM_SHARDS)
    )
    write_manifest(
        Store(folder), Manifest(NUM_SHARDS * SAMPLES_PER_SHARD, NUM_SHARDS * 10**9, None, {}, shards, bad_samples=())
    )


def measure(folder: str) -> dict[str, float]:
    """In a fresh process: from nothing but imports to the ids of a rank's first step; then of other steps."""
    started = time.perf_counter()
    dataset = open_dataset(folder)
    config = DataConfig()
    order = Order(dataset.samples_per_shard, config)
    assert len(order.sample_ids(order.rank_positions(123_456, RANK, WORLD_SIZE))) == 4096 // WORLD_SIZE
    first_ids_s = time.perf_counter() - started
    steps = []
    for step in range(NUM_STEPS):
        started = time.perf_counter()
        order.sample_ids(order.rank_positions(step * 1000, RANK, WORLD_SIZE))
        steps.append(time.perf_counter() - started)
    # Of this program: getrusage's would be that of the process that started it, if it was larger.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = 1024 * int(status["VmHWM"].split()[0])
    return {"first_ids_s": first_ids_s, "step_ids_s": sorted(steps)[NUM_STEPS // 2], "peak_bytes": peak}


def main() -> int:
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
        return 0
    with tempfile.TemporaryDirectory(prefix="tarmac-bench-") as folder:
        write_synthetic_manifest(folder)
        command = [sys.executable, "-m", "benchmarks.scale", folder]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    limits = {"first_ids_s": 3.0, "step_ids_s": 0.01, "peak_bytes": 300e6}
    goals = [
        {"name": name, "goal": limit, "measured": found[name], "met": found[name] < limit}
        for name, limit in limits.items()
    ]
    print(f"{NUM_SHARDS:,} shards, {NUM_SHARDS * SAMPLES_PER_SHARD:,} samples, rank {RANK} of {WORLD_SIZE}")
    print(f"  manifest opened, ids of the first step   {found['first_ids_s']:8.3f} s")
    print(f"  ids of another step, median              {1e3 * found['step_ids_s']:8.3f} ms")
    print(f"  peak resident, libraries included        {found['peak_bytes'] / 1e6:8.0f} MB")
    for goal in goals:
        print(f"goal: {goal['name']} < {goal['goal']:g}: {'met' if goal['met'] else 'MISSED'}")
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    RESULT.write_text(json.dumps({"machine": machine, "rows": [found], "goals": goals}, indent=1) + "\n")
    print(f"written to {RESULT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
