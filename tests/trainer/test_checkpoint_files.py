"""A checkpoint's files: nothing that someone put into the bucket can run code, or stand for something else."""

from __future__ import annotations

import dataclasses
import os
import pickle
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
import torch
from tiny_checkpoints import save, trained
from tiny_runs import tiny_config

from pipeline.store import Store
from trainer import checkpoint
from trainer.checkpoint import CheckpointError, Commit
from trainer.mae import build_mae


@pytest.fixture
def run(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "run"))


def recommit(run: Store, commit: Commit, name: str, data: bytes) -> Commit:
    """Replace a file, and vouch for it: what someone who can write to the bucket can do."""
    run.write(f"{commit.directory}/{name}", data)
    record = type(commit.files[name])(len(data), f"{google_crc32c.value(data):08x}")
    forged = dataclasses.replace(commit, files={**commit.files, name: record})
    run.write(f"{commit.directory}/commit.json", forged.to_json())
    return forged


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_a_malicious_metadata_pickle_runs_nothing(run: Store, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    payload = pickle.dumps(Malicious(canary))
    forged = recommit(run, save(run, 1), ".metadata", payload)
    assert checkpoint.find_resume(run, pytest.fail) == forged
    with pytest.raises(CheckpointError, match=r"asks for posix.system"):
        checkpoint.load(run, forged, *trained(0))
    assert not canary.exists()
    pickle.loads(payload)
    assert canary.exists(), "the pickle was harmless: the test shows nothing"


@pytest.mark.parametrize(
    "payload",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"ctorch\nload\n(S'x'\ntR.",
        b"\x80\x04\x8c\x05torch\x8c\x0bhub.load_st\x93.",
        b"ctorch.distributed.checkpoint.metadata\nos\n.",
        b"\x80\x04\x8c&torch.distributed.checkpoint.metadata\x8c\tos.system\x93.",
        pickle.dumps({"a": 1}),
        b"garbage",
        b"",
    ],
)
def test_metadata_that_is_something_else_is_refused(run: Store, payload: bytes) -> None:
    forged = recommit(run, save(run, 1), ".metadata", payload)
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        checkpoint.load(run, forged, *trained(0))


def test_metadata_that_points_elsewhere_is_refused(run: Store) -> None:
    commit = save(run, 1)
    metadata = run.read(f"{commit.directory}/.metadata")
    forged = recommit(run, commit, ".metadata", metadata.replace(b"__0_0.distcp", b"../../../etc"))
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        checkpoint.load(run, forged, *trained(0))


def test_a_malicious_tensor_file_runs_nothing(run: Store, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    commit = save(run, 1)
    torch.save({"x": Malicious(canary)}, tmp_path / "bad.pt")
    bad = (tmp_path / "bad.pt").read_bytes()
    size = commit.files["__0_0.distcp"].num_bytes
    forged = recommit(run, commit, "__0_0.distcp", bad.ljust(size, b"\0"))
    with pytest.raises(CheckpointError):
        checkpoint.load(run, forged, *trained(0))
    assert not canary.exists()


def test_another_model_is_refused(run: Store) -> None:
    commit = save(run, 1)
    config = tiny_config()
    deeper = dataclasses.replace(config, model=dataclasses.replace(config.model, depth=3))
    with pytest.raises(CheckpointError, match=r"cannot load checkpoints/step_000000001.*blocks\.2"):
        checkpoint.load(run, commit, build_mae(deeper))
