"""Pruning: which checkpoints go, and in which order."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.store import Store
from trainer import checkpoint
from trainer.checkpoint import Commit


@pytest.fixture
def run(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "run"))


def prunable(run: Store, *steps: int) -> dict[int, Commit]:
    """Checkpoints with next to nothing in them."""
    commits = {}
    for step in steps:
        commits[step] = Commit(step=step, samples_seen=step, world_size=1, files={})
        run.write(f"{commits[step].directory}/__0_0.distcp", b"tensors")
        run.write(f"{commits[step].directory}/commit.json", commits[step].to_json())
    return commits


def steps_left(run: Store) -> list[int]:
    return sorted({int(entry.path.split("_")[1][:9]) for entry in run.list("checkpoints")})


def test_pruning_keeps_the_newest(run: Store) -> None:
    commits = prunable(run, 1, 2, 3, 4)
    checkpoint.prune(run, 2, commits[4])
    assert steps_left(run) == [3, 4]


def test_pruning_takes_the_remains_of_killed_saves(run: Store) -> None:
    commits = prunable(run, 1, 3, 5)
    run.write("checkpoints/step_000000004/__0_0.distcp", b"half")
    checkpoint.prune(run, 3, commits[5])
    assert steps_left(run) == [1, 3, 5]


def test_pruning_never_takes_what_was_committed_for_what_was_found_damaged(run: Store) -> None:
    commits = prunable(run, 1, 2, 8, 9)  # 8 and 9 were damaged; training went on from 1
    checkpoint.prune(run, 1, commits[2])
    assert steps_left(run) == [2, 8, 9]


def test_pruning_takes_the_commit_first(run: Store) -> None:
    commits = prunable(run, 1, 2, 3)
    removed: list[str] = []

    class Watched(Store):
        def remove(self, path: str) -> None:
            removed.append(path)
            super().remove(path)

        def remove_tree(self, prefix: str) -> None:
            removed.append(prefix)
            super().remove_tree(prefix)

    checkpoint.prune(Watched(run.url), 2, commits[3])
    assert removed == ["checkpoints/step_000000001/commit.json", "checkpoints/step_000000001"]


def test_checkpoints_at_multiples_are_kept_for_good(run: Store) -> None:
    commits = prunable(run, 2, 4, 6, 8, 10, 12)
    checkpoint.prune(run, 2, commits[12], keep_every_steps=4)
    assert steps_left(run) == [4, 8, 10, 12]
    for step in (14, 16, 18):
        checkpoint.prune(run, 2, prunable(run, step)[step], keep_every_steps=4)
    assert steps_left(run) == [4, 8, 12, 16, 18]
