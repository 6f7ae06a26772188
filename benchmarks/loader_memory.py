"""Memory and speed of one rank's loader: 64 lanes over 8 ranks, images of about 110 kB, default windows.

Makes a synthetic dataset (about 1.2 GB, in a temporary folder unless --dataset names one to keep), loads from it as
rank 0 of 8 in a fresh process, and compares the peak of resident memory with the arithmetic of docs/memory.md.

    python -m benchmarks.loader_memory
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline import DataConfig, Loader, open_dataset
from pipeline.config import num_kept_patches
from pipeline.dataset import INDEX_CACHE_BYTES
from pipeline.decode import MAX_BATCH_SIZE
from pipeline.errors import ManifestError
from pipeline.listing import Listing, SampleRef
from pipeline.write import write_dataset

CONFIG = DataConfig(global_batch_size=4096, num_lanes=64)
WORLD_SIZE = 8
IMAGE_BYTES = 110_000
NUM_DISTINCT = 64
SAMPLES_PER_LANE = 160
GOAL_BYTES = 2**30
RESULT = Path("build/bench/loader_memory.json")


class SyntheticSource:
    """Noise over smooth areas, as many JPEGs of about `IMAGE_BYTES` as asked for, a few of them distinct."""

    def __init__(self, num_samples: int) -> None:
        self._num_samples = num_samples
        self._images = [synthetic_jpeg(seed) for seed in range(NUM_DISTINCT)]

    def scan(self) -> Listing:
        refs = [
            SampleRef(f"{number:06d}", f"{number:06d}.jpg", len(self._images[number % NUM_DISTINCT]), -1)
            for number in range(self._num_samples)
        ]
        return Listing(tuple(refs), None)

    def read(self, ref: SampleRef) -> bytes:
        return self._images[int(ref.key) % NUM_DISTINCT]


def synthetic_jpeg(seed: int) -> bytes:
    """A 375 x 500 JPEG, ImageNet's usual size, whose quality is chosen to come near `IMAGE_BYTES`."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:375, :500]
    smooth = np.stack([127 + 80 * np.sin(x / rng.uniform(10, 90) + y / rng.uniform(10, 90)) for _ in range(3)], 2)
    image = Image.fromarray((smooth + rng.normal(0, 14, smooth.shape)).clip(0, 255).astype(np.uint8))
    encoded = []
    for quality in range(80, 98):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        encoded.append(buffer.getvalue())
    return min(encoded, key=lambda data: abs(len(data) - IMAGE_BYTES))


def arithmetic() -> list[tuple[str, str, float]]:
    """What is held at once at the most: (what, how it is counted, bytes)."""
    lanes, a_lane = CONFIG.num_lanes // WORLD_SIZE, CONFIG.global_batch_size // CONFIG.num_lanes
    window, ahead = CONFIG.shuffle_window_samples, CONFIG.read_ahead_steps
    samples, batches = (1 + ahead) * a_lane + 2 * window, CONFIG.prefetch_batches + 2
    batch = CONFIG.global_batch_size // WORLD_SIZE
    height, width = CONFIG.augment.image_size
    num_threads = len(os.sched_getaffinity(0))
    kb = f"{IMAGE_BYTES / 1e3:.0f} kB"
    return [
        (
            "encoded samples",
            f"{lanes} lanes x ((1 + {ahead}) steps x {a_lane} + 2 x window {window}) x {kb}",
            lanes * samples * IMAGE_BYTES,
        ),
        (
            "waiting samples",
            f"{CONFIG.prefetch_batches} batches queued but not decoded x {batch} x {kb}",
            CONFIG.prefetch_batches * batch * IMAGE_BYTES,
        ),
        (
            "reads in flight",
            f"{CONFIG.num_fetches} x {CONFIG.fetch_bytes / 2**20:.0f} MiB, once more in the store's hands",
            CONFIG.num_fetches * CONFIG.fetch_bytes,
        ),
        (
            "decoded batches",
            f"({CONFIG.prefetch_batches} queued + 1 made + 1 used) x {batch} x {height} x {width} x 3",
            batches * batch * height * width * 3,
        ),
        (
            "decoded crops",
            f"({num_threads} threads + 1) x {MAX_BATCH_SIZE} x 375 x 500 x 3",
            (num_threads + 1) * MAX_BATCH_SIZE * 375 * 500 * 3,
        ),
        ("shard indexes", f"{INDEX_CACHE_BYTES // 2**20} MiB, whatever the dataset", INDEX_CACHE_BYTES),
    ]


def measure(dataset_url: str, num_steps: int) -> dict[str, float]:
    """Load `num_steps` steps as rank 0: images a second, then the peak with full queues."""
    dataset = open_dataset(dataset_url)
    baseline = resident_bytes()
    started, num_images = 0.0, 0
    with Loader(dataset, CONFIG, dp_rank=0, dp_world_size=WORLD_SIZE) as loader:
        batch = next(loader)
        assert batch.kept_ids.shape[1] == num_kept_patches(CONFIG.augment)
        started = time.perf_counter()
        for _ in range(num_steps):
            batch = next(loader)
            num_images += len(batch.images)
        elapsed = time.perf_counter() - started
        for _ in range(4):  # a slow model: everything ahead of it fills up
            time.sleep(2)
            batch = next(loader)
        stats = loader.stats()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "baseline_bytes": baseline,
        "peak_growth_bytes": peak - baseline,
        "peak_bytes": peak,
        "images_per_s": num_images / elapsed,
        "fetch_wait_s": stats.fetch_wait_s,
        "decode_s": stats.decode_s,
        "fetched_bytes": stats.fetched_bytes,
    }


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def ensure_dataset(url: str) -> None:
    """Write the dataset unless it is there."""
    try:
        manifest = open_dataset(url).manifest
    except ManifestError:
        print(f"writing {CONFIG.num_lanes * SAMPLES_PER_LANE} images to {url} ...", flush=True)
        source = SyntheticSource(CONFIG.num_lanes * SAMPLES_PER_LANE)
        manifest = write_dataset(source, url, shard_bytes=64 * 2**20, num_workers=os.cpu_count() or 1)
    assert manifest.num_samples >= CONFIG.num_lanes * SAMPLES_PER_LANE
    mean = open_dataset(url).index(0).num_bytes.mean()
    assert abs(mean - IMAGE_BYTES) < IMAGE_BYTES / 100


def report(measured: dict[str, float]) -> bool:
    """Print and write the table; whether the goal is met."""
    rows = arithmetic()
    rows.append(("sum", "at most", sum(num_bytes for *_, num_bytes in rows)))
    rows += [
        ("peak growth", "measured, over the process before", measured["peak_growth_bytes"]),
        ("peak", "measured, resident memory of the whole process", measured["peak_bytes"]),
    ]
    print(f"\n{CONFIG.num_lanes} lanes, {WORLD_SIZE} ranks, G = {CONFIG.global_batch_size}: one rank holds at most")
    for what, how, num_bytes in rows:
        print(f"  {what:<18}{num_bytes / 1e6:8.0f} MB   {how}")
    num_cpus = len(os.sched_getaffinity(0))
    print(f"loader alone: {measured['images_per_s']:.0f} images/s on {num_cpus} CPUs")
    growth = measured["peak_growth_bytes"]
    goal = {"name": "peak growth, in bytes", "goal": GOAL_BYTES, "measured": growth, "met": growth < GOAL_BYTES}
    print(f"goal: peak growth < {GOAL_BYTES / 1e6:.0f} MB: {'met' if goal['met'] else 'MISSED'}")
    machine = {"cpus": num_cpus, "cpu": cpu_name(), "machine": platform.machine(), "python": platform.python_version()}
    table = [{"what": what, "how": how, "bytes": num_bytes} for what, how, num_bytes in rows]
    table.append({"what": "loader alone", "how": "measured", "images_per_s": measured["images_per_s"]})
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps({"machine": machine, "rows": table, "goals": [goal]}, indent=1) + "\n")
    print(f"written to {RESULT}")
    return bool(goal["met"])


def cpu_name() -> str:
    names = [line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return names[0] if names else platform.processor()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="where the synthetic dataset is, or is to be kept; default: temporary")
    parser.add_argument("--num-steps", type=int, default=6)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.dataset, arguments.num_steps)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        url = arguments.dataset or f"{folder}/dataset"
        ensure_dataset(url)
        # A fresh process, so that the peak is the loader's and not the writer's.
        module = [sys.executable, "-m", "benchmarks.loader_memory"]
        command = [*module, "--measure", "--dataset", url, "--num-steps", str(arguments.num_steps)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return 0 if report(json.loads(done.stdout)) else 1


if __name__ == "__main__":
    sys.exit(main())
