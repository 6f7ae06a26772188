"""Checkpoints: one exists only when it is proven, at any world size, and nothing in it can run code."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
import torch
from tiny_checkpoints import Numbers, assert_same, numbers, resume, save, trained
from tiny_runs import run_ranks, tiny_config
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from pipeline.config import StoreConfig
from pipeline.errors import StoreError
from pipeline.store import Store
from pipeline.store_backend import Pin
from trainer import checkpoint, parallel
from trainer.checkpoint import CheckpointError
from trainer.checkpoint_commit import parse_commit
from trainer.mae import build_mae


@pytest.fixture
def run(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "run"))


def test_what_is_saved_is_loaded_from_any_store(store_url: str) -> None:
    run = Store(store_url).child("run")
    saved = trained(2)
    commit = checkpoint.write(run, checkpoint.state_of(*saved), step=2, samples_seen=16)
    assert checkpoint.find_resume(run, pytest.fail) == commit
    loaded = trained(0, seed=1)
    checkpoint.load(run, commit, *loaded)
    assert_same(numbers(*saved), numbers(*loaded))
    for name, record in commit.files.items():
        data = run.read(f"checkpoints/step_000000002/{name}")
        assert (len(data), f"{google_crc32c.value(data):08x}") == (record.num_bytes, record.crc32c)
    left = {entry.path for entry in run.list()}
    assert left == {f"checkpoints/step_000000002/{name}" for name in (".metadata", "__0_0.distcp", "commit.json")}


def test_damage_in_any_store_is_walked_past_and_pruned(store_url: str) -> None:
    run = Store(store_url).child("run")
    commits = [save(run, step) for step in (1, 2, 3)]
    path = "checkpoints/step_000000003/__0_0.distcp"
    run.write(path, flip_a_bit(run.read(path)))
    run.remove("checkpoints/step_000000002/.metadata")
    step, damages = resume(run)
    assert step == 1
    assert [path for path, _ in damages] == [path, "checkpoints/step_000000002/.metadata"]
    checkpoint.prune(run, 2, commits[2])
    assert {entry.path.split("/")[1] for entry in run.list()} == {"step_000000002", "step_000000003"}


@pytest.mark.slow
def test_ranks_save_to_any_store_and_one_process_loads(store_url: str) -> None:
    if not store_url.startswith(("s3:", "s3a:")):
        pytest.skip("resharding is tested on local paths below")
    expected = run_ranks(_save_sharded, 2, f"{store_url}/run", 3)[0]
    run = Store(f"{store_url}/run")
    commit = checkpoint.find_resume(run, pytest.fail)
    assert commit is not None
    assert commit.world_size == 2
    assert set(commit.files) == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    loaded = trained(0, seed=1)
    checkpoint.load(run, commit, *loaded)
    assert_same(expected, numbers(*loaded))


@pytest.mark.slow
@pytest.mark.parametrize(("saved_at", "loaded_at"), [(2, (1, 3)), (3, (2,))])
def test_a_checkpoint_loads_at_another_world_size(tmp_path: Path, saved_at: int, loaded_at: tuple[int, ...]) -> None:
    expected = run_ranks(_save_sharded, saved_at, str(tmp_path), 3)[0]
    for world_size in loaded_at:
        for found in run_ranks(_load_sharded, world_size, str(tmp_path)):
            assert_same(expected, found)


def _save_sharded(url: str, step: int) -> Numbers:
    model, optimizer = trained(step, shard=True)
    checkpoint.write(Store(url), checkpoint.state_of(model, optimizer), step=step, samples_seen=step * 8)
    return numbers(model, optimizer)


def _load_sharded(url: str) -> Numbers:
    commit = checkpoint.find_resume(Store(url), lambda path, reason: None)
    assert commit is not None
    model, optimizer = trained(0, seed=1, shard=True)
    checkpoint.load(Store(url), commit, model, optimizer)
    return numbers(model, optimizer)


def test_weights_load_without_an_optimizer(run: Store) -> None:
    saved = trained(2)
    commit = checkpoint.write(run, checkpoint.state_of(*saved), step=2, samples_seen=16)
    model = build_mae(tiny_config())
    checkpoint.load(run, commit, model)
    for name, weight in saved[0].state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=0, atol=0)


def test_pytorchs_own_tool_reads_a_checkpoint(run: Store, tmp_path: Path) -> None:
    saved = trained(2)
    commit = checkpoint.write(run, checkpoint.state_of(*saved), step=2, samples_seen=16)
    dcp_to_torch_save(f"{run.url}/{commit.directory}", tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    torch.testing.assert_close(whole["model"], dict(saved[0].state_dict()), rtol=0, atol=0)


def test_an_empty_run_has_no_checkpoint(run: Store) -> None:
    assert resume(run) == (None, [])
    assert checkpoint.newest_step(run) is None


# ---- damage ---------------------------------------------------------------------------------------------------------


def flip_a_bit(data: bytes) -> bytes:
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def change_samples_seen(data: bytes) -> bytes:
    return data.replace(b'"samples_seen": 16', b'"samples_seen": 61')


DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes | None], str]] = {
    "missing file": ("__0_0.distcp", lambda data: None, "is missing"),
    "missing metadata": (".metadata", lambda data: None, "is missing"),
    "truncated file": ("__0_0.distcp", lambda data: data[:-1], "bytes, not"),
    "longer file": ("__0_0.distcp", lambda data: data + b"x", "bytes, not"),
    "empty file": ("__0_0.distcp", lambda data: b"", "has 0 bytes, not"),
    "flipped bit": ("__0_0.distcp", flip_a_bit, "has crc32c"),
    "flipped bit in the metadata": (".metadata", flip_a_bit, "has crc32c"),
    "truncated commit": ("commit.json", lambda data: data[: len(data) // 2], "is not a commit record"),
    "empty commit": ("commit.json", lambda data: b"", "is not a commit record"),
    "another JSON": ("commit.json", lambda data: b"[1, 2]", "is not a commit record"),
    "commit of other bytes": ("commit.json", lambda data: b"\xff\x00", "is not a commit record"),
    "changed commit": ("commit.json", change_samples_seen, "of itself"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_walked_past(run: Store, name: str) -> None:
    file, damage, reason = DAMAGES[name]
    save(run, 1)
    save(run, 2)
    path = f"checkpoints/step_000000002/{file}"
    left = damage(run.read(path))
    run.remove(path) if left is None else run.write(path, left)
    step, damages = resume(run)
    assert step == 1
    ((damaged, why),) = damages
    assert damaged == path
    assert reason in why


def test_two_damaged_ones_are_walked_past(run: Store) -> None:
    for step in (1, 2, 3):
        save(run, step)
    for step in (2, 3):
        run.write(f"checkpoints/step_00000000{step}/__0_0.distcp", b"")
    step, damages = resume(run)
    assert step == 1
    assert [path.split("/")[1] for path, _ in damages] == ["step_000000003", "step_000000002"]


def test_a_commit_of_another_directory_is_damage(run: Store) -> None:
    save(run, 1)
    save(run, 2)
    run.write("checkpoints/step_000000002/commit.json", run.read("checkpoints/step_000000001/commit.json"))
    assert resume(run) == (
        1,
        [("checkpoints/step_000000002/commit.json", "is the commit of checkpoints/step_000000001")],
    )


@pytest.mark.slow
def test_ranks_share_the_check_and_agree_on_its_outcome(tmp_path: Path) -> None:
    run_ranks(_save_twice, 3, str(tmp_path))
    damaged = tmp_path / "checkpoints/step_000000002/__2_0.distcp"
    damaged.write_bytes(flip_a_bit(damaged.read_bytes()))
    first, *others = run_ranks(_resume, 2, str(tmp_path))
    assert (first[0], [path for path, _ in first[1]]) == (1, ["checkpoints/step_000000002/__2_0.distcp"])
    assert others == [(1, [])]


def _save_twice(url: str) -> None:
    model, optimizer = trained(1, shard=True)
    for step in (1, 2):
        checkpoint.write(Store(url), checkpoint.state_of(model, optimizer), step=step, samples_seen=step * 8)


def _resume(url: str) -> Any:
    return resume(Store(url))


def test_a_store_that_does_not_answer_is_no_damage(tmp_path: Path) -> None:
    class Away(Store):
        def read_range(self, path: str, offset: int, num_bytes: int, pin: Pin | None = None) -> bytes:
            raise StoreError("the network is away")

    save(Store(str(tmp_path)), 1)
    away = Away(str(tmp_path))
    away.child = lambda path: Away(f"{tmp_path}/{path}")  # type: ignore[method-assign]
    with pytest.raises(StoreError):
        resume(away)


def test_a_commit_record_is_the_documented_json(run: Store) -> None:
    commit = save(run, 2)
    body = json.loads(run.read("checkpoints/step_000000002/commit.json"))
    assert {key: body[key] for key in ("step", "samples_seen", "world_size", "version")} == {
        "step": 2,
        "samples_seen": 16,
        "world_size": 1,
        "version": 1,
    }
    assert set(body["files"]["__0_0.distcp"]) == {"num_bytes", "crc32c"}
    assert parse_commit(commit.to_json(), commit.directory) == commit


def test_a_newer_format_is_no_damage(run: Store) -> None:
    save(run, 1)
    newer = dataclasses.replace(save(run, 2), version=2)
    run.write(f"{newer.directory}/commit.json", newer.to_json())
    with pytest.raises(CheckpointError, match=r"step_000000002/commit.json has format version 2 .* reads 1; update"):
        resume(run)


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(run: Store) -> None:
    save(run, 1)
    run.write("checkpoints/step_000000001/__0_0.distcp", b"")
    with pytest.raises(CheckpointError, match=r"none verifies \(checkpoints/step_000000001/__0_0.distcp has 0 bytes"):
        resume(run)


def test_a_damaged_checkpoint_set_aside_takes_no_good_ones_place(run: Store) -> None:
    """20 is good, 33 (saved by a stop, off the cadence) is damaged: 40 must leave 20 beside it, not 33."""
    for step in (20, 33):
        save(run, step)
    path = "checkpoints/step_000000033/__0_0.distcp"
    run.write(path, flip_a_bit(run.read(path)))
    step, damages = resume(run)
    assert step == 20
    checkpoint.set_aside(run, damages)
    assert checkpoint.newest_step(run) == 20
    assert run.exists("checkpoints/step_000000033/commit.damaged.json")
    checkpoint.prune(run, 2, save(run, 40))
    left = {entry.path.split("/")[1] for entry in run.list("checkpoints")}
    assert left == {"step_000000020", "step_000000040"}


def test_an_outage_while_saving_or_loading_stays_a_store_error(run: Store, tmp_path: Path) -> None:
    """It passes, and the workers are started again; a CheckpointError would end the run for good."""

    class Full(Store):
        @contextmanager
        def writer(self, path: str) -> Iterator[Any]:
            raise StoreError("the store is away")
            yield

        def child(self, path: str) -> Store:
            return Full(f"{self.url}/{path}")

    model, optimizer = trained(1)
    with pytest.raises(StoreError, match="away"):
        checkpoint.write(Full(str(tmp_path / "full")), checkpoint.state_of(model, optimizer), step=1, samples_seen=8)


def test_who_may_not_write_neither_removes_nor_writes(run: Store) -> None:
    """A rank that was superseded comes to a step whose checkpoint its successor has committed."""

    def refuse() -> None:
        raise PermissionError("the run is another's")

    save(run, 1)
    save(run, 2)
    before = {entry.path: run.read(entry.path) for entry in run.list()}
    for step in (2, 3):
        with pytest.raises(PermissionError):
            checkpoint.write(run, checkpoint.state_of(*trained(5)), step=step, samples_seen=0, may_write=refuse)
    assert {entry.path: run.read(entry.path) for entry in run.list()} == before
    assert resume(run) == (2, [])


def test_who_may_write_no_longer_when_all_is_written_does_not_commit(run: Store) -> None:
    asked: list[bool] = []

    def refuse_later() -> None:
        asked.append(run.exists("checkpoints/step_000000002/__0_0.distcp"))
        if asked == [False, True]:
            raise PermissionError("the run is another's")

    save(run, 1)
    with pytest.raises(PermissionError):
        checkpoint.write(run, checkpoint.state_of(*trained(2)), step=2, samples_seen=16, may_write=refuse_later)
    assert asked == [False, True]
    assert resume(run) == (1, [])


# ---- killed and repeated saves --------------------------------------------------------------------------------------


class _KilledAfter(Store):
    """Kills this process once so many bytes have been written."""

    def __init__(self, url: str, num_bytes: int) -> None:
        super().__init__(url)
        self.left = num_bytes

    def child(self, path: str) -> Store:
        return _KilledAfter(f"{self.url}/{path}", self.left)

    @contextmanager
    def writer(self, path: str) -> Iterator[Any]:
        with super().writer(path) as stream:
            write = stream.write

            def count(data: bytes) -> int:
                self.left -= len(data)
                if self.left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return write(data)

            stream.write = count  # type: ignore[method-assign]
            yield stream


def _save_and_be_killed(url: str, num_bytes: int) -> None:
    checkpoint.write(_KilledAfter(url, num_bytes), checkpoint.state_of(*trained(2)), step=2, samples_seen=16)


@pytest.mark.slow
def test_a_save_that_is_killed_leaves_the_one_before_and_is_cleaned_up(run: Store) -> None:
    first = save(run, 1)
    for after in (0, first.num_bytes // 2, first.num_bytes - 100):
        with pytest.raises(AssertionError, match=rf"exit code -{int(signal.SIGKILL)}"):
            run_ranks(_save_and_be_killed, 0, run.url, after)
        assert resume(run) == (1, [])
    assert any("step_000000002" in entry.path for entry in run.list())
    run.write("checkpoints/step_000000002/__7_0.distcp", b"of a larger world")
    again = save(run, 2)
    assert resume(run) == (2, [])
    names = {entry.path.rsplit("/")[-1] for entry in run.list(again.directory)}
    assert names == {*again.files, "commit.json"}


@pytest.mark.slow
def test_a_failed_write_fails_the_save_on_every_rank(tmp_path: Path) -> None:
    errors = run_ranks(_save_where_rank_1_cannot, 2, str(tmp_path))
    assert all("rank 1: StoreError: disk full" in error for error in errors), errors
    assert resume(Store(str(tmp_path))) == (None, [])


class _Full(Store):
    def child(self, path: str) -> Store:
        return _Full(f"{self.url}/{path}")

    def writer(self, path: str) -> Any:
        raise StoreError("disk full")


def _save_where_rank_1_cannot(url: str) -> str:
    kind = _Full if parallel.rank() == 1 else Store
    try:
        checkpoint.write(kind(url, StoreConfig()), checkpoint.state_of(*trained(1, shard=True)), step=1, samples_seen=8)
    except StoreError as error:
        return str(error)
    return "it was saved"
