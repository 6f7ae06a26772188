"""run.json: written once, refuses another recipe with the list of what differs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from tiny_runs import tiny_config

from pipeline.store import Store
from trainer.errors import RunError, RunMismatchError
from trainer.run_files import open_run, read_run

DIGEST = "ab" * 32


def test_a_run_is_recorded_once_and_read_back(tmp_path: Path) -> None:
    run, config = Store(str(tmp_path)), tiny_config()
    first = open_run(run, config, DIGEST)
    written = run.read("run.json")
    assert read_run(run) == first == open_run(run, config, DIGEST)
    assert first.config == config
    assert set(first.versions) == {"python", "tarmac", "torch", "numpy"}
    assert run.read("run.json") == written


def test_cadence_and_micro_batch_may_change(tmp_path: Path) -> None:
    run = Store(str(tmp_path))
    first = open_run(run, tiny_config(), DIGEST)
    changed = tiny_config(every_steps=7, log_every_steps=3, micro_batch_size=1)
    assert open_run(run, changed, DIGEST) == first


def test_another_recipe_is_refused_with_every_difference(tmp_path: Path) -> None:
    run, config = Store(str(tmp_path)), tiny_config()
    open_run(run, config, DIGEST)
    other = dataclasses.replace(
        tiny_config(precision="bf16"),
        optim=dataclasses.replace(config.optim, base_lr=0.5),
    )
    with pytest.raises(RunMismatchError) as raised:
        open_run(run, other, "cd" * 32)
    for part in (
        "optim.base_lr: 0.02 -> 0.5",
        "parallel.precision: 'fp32' -> 'bf16'",
        "manifest: abababababab -> cdcdcdcdcdcd",
    ):
        assert part in str(raised.value)


def test_what_is_no_run_or_damaged_says_so(tmp_path: Path) -> None:
    run = Store(str(tmp_path))
    with pytest.raises(RunError, match="is not a run"):
        read_run(run)
    run.write("run.json", b'{"version": 1, "config": {')
    with pytest.raises(RunError, match="cannot be read"):
        read_run(run)
    run.write("run.json", json.dumps({"version": 2}).encode())
    with pytest.raises(RunError, match="format version 2"):
        read_run(run)
