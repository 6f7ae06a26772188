"""SIGKILL at 50 random moments, each time another number of ranks: three epochs with each sample exactly once in each.

Each rank is a process with its own loader. A step counts as committed when every rank of an attempt has written down
what it got, as a checkpoint would count; the next attempt starts there. Nothing but the step's number is carried over.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import AugmentConfig, DataConfig, Loader, open_dataset
from pipeline.sources import FolderSource
from pipeline.write import write_dataset

NUM_SAMPLES, NUM_EPOCHS, NUM_KILLS = 95, 3, 50
CONFIG = DataConfig(
    global_batch_size=4,
    num_lanes=4,
    shuffle_window_samples=8,
    augment=AugmentConfig(image_size=(16, 16), patch_size=4),
    num_decode_threads=1,
    num_fetches=2,
)
NUM_STEPS = -(-NUM_SAMPLES * NUM_EPOCHS // CONFIG.global_batch_size)
STEP_S = 0.03


def run_rank(url: str, audit: str, attempt: int, rank: int, world_size: int, start_step: int) -> None:
    """One rank: writes down the samples of each step, as a whole file or not at all."""
    with Loader(open_dataset(url), CONFIG, dp_rank=rank, dp_world_size=world_size, start_step=start_step) as loader:
        for step in range(start_step, NUM_STEPS):
            batch = next(loader)
            time.sleep(STEP_S)  # the model
            path = Path(audit) / f"{step:04d}-{attempt:03d}-{rank}of{world_size}"
            path.with_suffix(".part").write_text(json.dumps(batch.sample_ids.tolist()))
            path.with_suffix(".part").rename(path)


def kill(pid: int | None) -> bool:
    """SIGKILL; False if there is nothing left to kill, as near the end of the run."""
    assert pid is not None
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def committed_steps(audit: Path, attempt: int, start_step: int, world_size: int) -> list[list[int]]:
    """The samples of each step from `start_step` on that all ranks of the attempt have written down."""
    found = []
    for step in range(start_step, NUM_STEPS):
        paths = [audit / f"{step:04d}-{attempt:03d}-{rank}of{world_size}" for rank in range(world_size)]
        if not all(path.exists() for path in paths):
            break
        found.append([sample_id for path in paths for sample_id in json.loads(path.read_text())])
    return found


@pytest.fixture
def dataset_url(tmp_path: Path) -> str:
    rng = np.random.default_rng(0)
    (tmp_path / "source").mkdir()
    for number in range(NUM_SAMPLES):
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(tmp_path / f"source/{number:03d}.jpg")
    write_dataset(FolderSource(str(tmp_path / "source")), str(tmp_path / "dataset"), shard_bytes=20_000)
    return str(tmp_path / "dataset")


@pytest.mark.slow
def test_kills_lose_and_repeat_nothing(dataset_url: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.loader", "pipeline.dataset"])
    audit, log, rng = tmp_path / "audit", list[list[int]](), random.Random(0)
    audit.mkdir()
    num_kills, worlds = 0, list[int]()
    while len(log) < NUM_STEPS:
        attempt, start, world_size = len(worlds), len(log), rng.randint(1, 4)
        worlds.append(world_size)
        ranks = [
            context.Process(target=run_rank, args=(dataset_url, str(audit), attempt, rank, world_size, start))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        if num_kills < NUM_KILLS:
            # At any moment: while it starts, in a step, or when some ranks have written and others have not.
            moment = time.monotonic() + 10 if rng.random() < 0.8 else time.monotonic() + rng.uniform(0, 0.3)
            first = audit / f"{start:04d}-{attempt:03d}-0of{world_size}"
            while time.monotonic() < moment and not first.exists():
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 2 * STEP_S))
            killed = [kill(process.pid) for process in ranks]
            num_kills += any(killed)
        for process in ranks:
            process.join(120)
            assert process.exitcode in (0, -signal.SIGKILL)
        log += committed_steps(audit, attempt, start, world_size)
    assert num_kills == NUM_KILLS, f"the run was over after {num_kills} kills"
    assert set(worlds) == {1, 2, 3, 4}
    seen = [sample_id for samples in log for sample_id in sorted(samples)]
    whole = np.concatenate([open_dataset(dataset_url).step_sample_ids(CONFIG, step) for step in range(NUM_STEPS)])
    assert [sorted(samples) for samples in log] == [sorted(part) for part in np.split(whole, NUM_STEPS)]
    # A step may span two epochs: count each sample over all that belongs to whole epochs.
    counts = np.bincount(whole[: NUM_SAMPLES * NUM_EPOCHS], minlength=NUM_SAMPLES)
    assert counts.tolist() == [NUM_EPOCHS] * NUM_SAMPLES
    assert len(seen) == NUM_STEPS * CONFIG.global_batch_size
