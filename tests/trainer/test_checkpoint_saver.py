"""Saving beside the loop: what is saved is the moment's state, one at a time, and no failure passes unseen."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import assert_same, numbers, resume, trained
from tiny_runs import _CONTEXT, CPU, NUM_SAMPLES, memory_loader, run_ranks, tiny_config, train_attempt

from pipeline.errors import StoreError
from pipeline.store import Store
from trainer import checkpoint, parallel
from trainer.checkpoint_saver import CheckpointSaver
from trainer.loop import train
from trainer.metrics import read_events


class GatedStore(Store):
    """Lets nobody write before the gate is open, and counts who is at it."""

    gate = threading.Event()
    writing: list[str] = []  # noqa: RUF012 (shared on purpose)
    most = 0

    def child(self, path: str) -> Store:
        return GatedStore(f"{self.url}/{path}")

    @contextmanager
    def writer(self, path: str) -> Iterator[Any]:
        GatedStore.writing.append(path)
        GatedStore.most = max(GatedStore.most, len(GatedStore.writing))
        try:
            assert self.gate.wait(30)
            with super().writer(path) as stream:
                yield stream
        finally:
            GatedStore.writing.remove(path)


@pytest.fixture
def gated(tmp_path: Path) -> GatedStore:
    GatedStore.gate.clear()
    GatedStore.most = 0
    return GatedStore(str(tmp_path))


def saver_of(run: Store) -> CheckpointSaver:
    return CheckpointSaver(run, may_write=lambda: None, after_commit=lambda commit: None, patience_s=30.0)


def test_what_is_saved_is_the_state_at_the_start_whatever_comes_after(gated: GatedStore) -> None:
    with parallel.process_mesh(CPU), saver_of(gated) as saver:
        model, optimizer = trained(1)
        expected = numbers(model, optimizer)
        saver.start(checkpoint.state_of(model, optimizer), step=1, samples_seen=8)
        for parameter in model.parameters():  # training goes on
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert resume(gated) == (None, [])
        assert saver.take_saved() == []
        GatedStore.gate.set()
        saver.wait()
        (saved,) = saver.take_saved()
        assert saved.commit == checkpoint.find_resume(gated, pytest.fail)
        assert saved.stall_s > 0
        loaded = trained(0, seed=1)
        checkpoint.load(gated, saved.commit, *loaded)
        assert_same(numbers(*loaded), expected)


def test_one_save_is_in_flight_and_the_next_one_waits_for_it(gated: GatedStore) -> None:
    second_asked, second_began = threading.Event(), threading.Event()
    began_behind_the_gate = []

    def open_later() -> None:
        assert second_asked.wait(30)
        began_behind_the_gate.append(second_began.wait(1))
        GatedStore.gate.set()

    opener = threading.Thread(target=open_later)
    opener.start()
    with parallel.process_mesh(CPU), saver_of(gated) as saver:
        expected = {}
        for step in (1, 2, 3):
            state = trained(step)
            expected[step] = numbers(*state)
            if step == 2:
                assert resume(gated) == (None, [])  # the first one is at the gate, and its caller went on
                second_asked.set()
            saver.start(checkpoint.state_of(*state), step=step, samples_seen=8 * step)
            if step == 2:
                second_began.set()
        saver.wait()
        opener.join()
        assert began_behind_the_gate == [False]
        first, second, third = saver.take_saved()
        assert second.stall_s > 0.5  # of the second before the gate opened
        assert GatedStore.most == 1
        for saved in (first, second, third):  # the copies share their memory, and yet each is of its own step
            loaded = trained(0, seed=1)
            checkpoint.load(gated, saved.commit, *loaded)
            assert_same(numbers(*loaded), expected[saved.commit.step])


def test_a_save_that_is_waited_for_copies_nothing(tmp_path: Path) -> None:
    run, model = Store(str(tmp_path)), trained(1)
    saver = CheckpointSaver(
        run, may_write=lambda: None, after_commit=lambda commit: None, patience_s=1.0, asynchronous=False
    )
    before = threading.active_count()
    with parallel.process_mesh(CPU), saver:
        saver.start(checkpoint.state_of(*model), step=1, samples_seen=8)
        assert threading.active_count() == before
        assert resume(run) == (1, [])
        (saved,) = saver.take_saved()
    assert saved.stall_s == saved.seconds > 0


class _FullAfterOne(Store):
    """The first checkpoint fits."""

    def child(self, path: str) -> Store:
        return _FullAfterOne(f"{self.url}/{path}")

    def writer(self, path: str) -> Any:
        if "step_000000004" in self.url and parallel.rank() == parallel.world_size() - 1:
            raise StoreError("disk full")
        return super().writer(path)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_save_that_fails_ends_the_run_on_every_rank_at_the_same_step(tmp_path: Path, world_size: int) -> None:
    for message, last_step in run_ranks(_train_on_a_full_disk, world_size, str(tmp_path)):
        assert "disk full" in message
        assert 4 <= last_step <= 12
    assert resume(Store(str(tmp_path))) == (2, [])


def _train_on_a_full_disk(url: str) -> tuple[str, int]:
    config = dataclasses.replace(tiny_config(num_steps=40, every_steps=2, log_every_steps=1))
    seen = 0

    def batches() -> Iterator[Any]:
        nonlocal seen
        for batch in memory_loader(config):
            seen = batch.step
            time.sleep(0.05)
            yield batch

    try:
        run = _FullAfterOne(url)
        train(config, batches(), run=run, num_samples=NUM_SAMPLES, attempt=1, device=CPU, resume_from=None)
    except StoreError as error:
        return str(error), seen
    return "it went on", seen


def test_the_loop_stands_still_for_the_copy_and_says_how_long(tmp_path: Path) -> None:
    train_attempt(str(tmp_path), tiny_config(num_steps=9, every_steps=2))
    saves = [event for event in read_events(Store(str(tmp_path))) if event["event"] == "save"]
    assert [event["step"] for event in saves] == [2, 4, 6, 8, 9]
    assert all(event["stall_s"] > 0 and event["seconds"] > 0 for event in saves)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_fifty_kills_at_any_moment_leave_the_newest_proven_checkpoint(tmp_path: Path, seed: int) -> None:
    """Each life loads what there is, checks it to the last bit, and saves on until it is killed."""
    chance, url = random.Random(seed), str(tmp_path)
    steps, in_flight = [0], 0
    while len(steps) <= 50 or in_flight < 6:  # how many kills hit a save depends on the disk's speed
        assert len(steps) <= 200, f"{in_flight} of 200 kills hit a save"
        receiver, sender = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(target=_save_until_killed, args=(url, sender, dict(os.environ)), daemon=True)
        process.start()
        sender.close()
        assert receiver.poll(60), "it did not start"
        assert receiver.recv() == steps[-1]  # it found what was found here, and its weights were right
        time.sleep(chance.uniform(0, 0.6))  # a save takes 0.05 to 0.2 s
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        step, damages = resume(Store(url))
        assert damages == []
        assert (step or 0) >= steps[-1]
        steps.append(step or 0)
        in_flight += any(f"step_{(step or 0) + 1:09d}" in entry.path for entry in Store(url).list())
    assert steps[-1] > 20


def _save_until_killed(url: str, sender: Any, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    run = Store(url)
    commit = checkpoint.find_resume(run, lambda path, reason: os._exit(1))
    step = commit.step if commit else 0
    if commit is not None:
        loaded = trained(0, seed=1)
        checkpoint.load(run, commit, *loaded)
        assert_same(numbers(*loaded), numbers(*trained(step % 7 + 1)))
    with (
        parallel.process_mesh(CPU),
        CheckpointSaver(
            run,
            may_write=lambda: None,
            after_commit=lambda commit: checkpoint.prune(run, 2, commit),
            patience_s=30.0,
        ) as saver,
    ):
        states = [checkpoint.state_of(*trained(number + 1)) for number in range(7)]
        sender.send(step)
        while True:
            step += 1
            saver.start(states[step % 7], step=step, samples_seen=step * 8)
