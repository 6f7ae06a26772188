"""The loop: what a run computes does not depend on interruptions, the world size, or micro-batches."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import (
    CPU,
    NUM_SAMPLES,
    SAMPLES_PER_SHARD,
    Told,
    losses,
    memory_loader,
    run_ranks,
    tiny_config,
    train_attempt,
)

from pipeline.loader import Batch
from pipeline.order import Order
from pipeline.reader import Quarantined
from pipeline.store import Store
from trainer import checkpoint, parallel
from trainer.config import TrainConfig
from trainer.errors import TrainingError
from trainer.guard import Verdict
from trainer.loop import StopReason, train
from trainer.mae import build_mae, normalize
from trainer.metrics import read_events, read_metrics
from trainer.optim import build_optimizer, learning_rate
from trainer.step_numbers import StepNumbers


def checkpoint_files(run: Path, step: int) -> dict[str, bytes]:
    """The tensors' files of a checkpoint; the metadata holds a random id."""
    folder = run / "checkpoints" / f"step_{step:09d}"
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.distcp"))}


PLAIN: dict[str, Any] = {}
ALL: dict[str, Any] = {"clip_norm": 0.5, "ema_decay": 0.9, "spike_sigmas": 6.0}


@pytest.mark.parametrize(("world_size", "fields"), [(1, PLAIN), (1, ALL), pytest.param(2, ALL, marks=pytest.mark.slow)])
def test_an_interrupted_run_is_bit_identical_to_one_that_was_not(
    tmp_path: Path, world_size: int, fields: dict[str, Any]
) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    config = tiny_config()
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, **fields))
    run_ranks(train_attempt, world_size, str(straight), config)
    first = run_ranks(_stop_at_4, world_size, str(stopped), config)
    second = run_ranks(train_attempt, world_size, str(stopped), config)
    assert [told.reason for told in first] == [StopReason.STOPPED] * world_size
    assert [told.reason for told in second] == [StopReason.FINISHED] * world_size
    assert losses(str(straight)) == losses(str(stopped))
    assert len(losses(str(straight))) == 8
    assert [record["step"] for record in second[0].records] == [5, 6, 7, 8]
    expected = checkpoint_files(straight, 8)
    assert len(expected) == world_size
    assert checkpoint_files(stopped, 8) == expected


def _stop_at_4(url: str, config: TrainConfig) -> Told:
    return train_attempt(url, config, stop_at=4)


@pytest.mark.slow
def test_losses_and_samples_do_not_depend_on_the_world_size(tmp_path: Path) -> None:
    config = tiny_config(num_steps=6)
    runs: dict[int, list[Any]] = {}
    for world_size in (1, 2, 3):
        url = str(tmp_path / str(world_size))
        run_ranks(train_attempt, world_size, url, config)
        runs[world_size] = read_metrics(Store(url))
    for world_size in (2, 3):
        for ours, theirs in zip(runs[1], runs[world_size], strict=True):
            assert ours["sample_ids_digest"] == theirs["sample_ids_digest"]
            assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-4)
            assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-3)
    assert runs[1][-1]["loss"] != pytest.approx(runs[1][0]["loss"], rel=0.01)


def test_the_losses_are_those_of_plain_pytorch(tmp_path: Path) -> None:
    config = tiny_config(num_steps=5)
    told = train_attempt(str(tmp_path), config)
    model = build_mae(config)
    optimizer = build_optimizer(config, model)
    batches = memory_loader(config)
    for step, record in enumerate(told.records):
        batch = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, 5)
        images = normalize(batch.images, config.data.augment.mean, config.data.augment.std)
        loss = model(images, batch.kept_ids, batch.masked_ids).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
        optimizer.step()
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert record["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert record["lr"] == learning_rate(config, step, 5)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 3])
def test_accumulation_changes_nothing(tmp_path: Path, world_size: int) -> None:
    # At three ranks the images are 4, 2, 2: in three micro-batches of at most 2 the second has 1 and 1.
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    run_ranks(train_attempt, world_size, whole, tiny_config(num_steps=4))
    run_ranks(train_attempt, world_size, parts, tiny_config(num_steps=4, micro_batch_size=2))
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.slow
def test_bf16_follows_fp32(tmp_path: Path) -> None:
    urls = {precision: str(tmp_path / precision) for precision in ("fp32", "bf16")}
    for precision, url in urls.items():
        train_attempt(url, tiny_config(precision=precision))
    assert losses(urls["bf16"]) != losses(urls["fp32"])
    assert losses(urls["bf16"]) == pytest.approx(losses(urls["fp32"]), rel=0.03)


def test_a_record_says_what_the_step_was(tmp_path: Path) -> None:
    config = tiny_config(num_steps=7, log_every_steps=3)
    told = train_attempt(str(tmp_path), config)
    assert told.records == read_metrics(Store(str(tmp_path)))
    assert [record["step"] for record in told.records] == [1, 2, 3, 4, 5, 6, 7]
    assert [record["samples_seen"] for record in told.records] == [8, 16, 24, 32, 40, 48, 56]
    assert told.records[-1]["epoch"] == 56 / NUM_SAMPLES
    ids = Order(SAMPLES_PER_SHARD, config.data).step_sample_ids(2)
    assert told.records[2]["sample_ids_digest"] == f"{sum(_splitmix(int(i)) for i in ids) % 2**64:016x}"
    assert all(record["step_s"] > 0 and record["data_wait_s"] > 0 for record in told.records)


def _parts(record: Any) -> list[float]:
    return [record[name] for name in ("fetch_wait_s", "decode_wait_s", "copy_s", "model_s")]


def test_a_wait_is_charged_to_what_was_waited_for_and_the_parts_add_up_to_the_step(tmp_path: Path) -> None:
    def slow(batch: Batch) -> Batch:
        fetch_s, decode_s = {2: (0.3, 0.0), 4: (0.0, 0.3), 6: (0.15, 0.3)}.get(batch.step, (0.0, 0.0))
        time.sleep(fetch_s)
        fetched_at = time.perf_counter()
        time.sleep(decode_s)
        return dataclasses.replace(batch, fetched_at=fetched_at)

    records = train_attempt(str(tmp_path), tiny_config(log_every_steps=1), change=slow).records
    for record in records:
        assert min(_parts(record)) >= 0
        assert sum(_parts(record)) == pytest.approx(record["step_s"], rel=1e-9)
        assert record["fetch_wait_s"] + record["decode_wait_s"] == pytest.approx(record["data_wait_s"], rel=1e-9)
    assert records[2]["fetch_wait_s"] >= 0.3 > records[2]["decode_wait_s"]
    assert records[4]["decode_wait_s"] >= 0.3 > records[4]["fetch_wait_s"]
    assert records[6]["fetch_wait_s"] >= 0.15
    assert records[6]["decode_wait_s"] >= 0.3


@pytest.mark.slow
def test_a_record_has_the_times_of_the_rank_that_waited_longest(tmp_path: Path) -> None:
    told = run_ranks(_train_with_slow_rank, 2, str(tmp_path))
    for record in told[0].records:
        assert sum(_parts(record)) == pytest.approx(record["step_s"], rel=1e-9)
        assert record["decode_wait_s"] >= 0.2  # rank 1's; rank 0 waits for it in the model


def _train_with_slow_rank(url: str) -> Told:
    def slow(batch: Batch) -> Batch:
        time.sleep(0.2 * parallel.rank())
        return batch

    return train_attempt(url, tiny_config(num_steps=2, log_every_steps=1), change=slow)


def test_a_batch_that_was_ready_is_no_wait_for_bytes_however_late_they_came() -> None:
    numbers = StepNumbers(tiny_config(), NUM_SAMPLES, CPU)
    numbers.waited(started=100.0, ended=100.5, fetched_at=99.0, copy_s=0.125)
    numbers.add(torch.zeros(8), torch.arange(8))
    numbers.end_step(1, 0.0, Verdict(torch.zeros(()), torch.zeros(())))
    (step,) = numbers.read()
    record = step.record
    assert (record["fetch_wait_s"], record["decode_wait_s"], record["copy_s"]) == (0.0, 0.375, 0.125)


def _splitmix(value: int) -> int:
    """SplitMix64 in Python's unbounded integers."""
    value = (value + 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


def test_a_finished_run_returns_at_once_and_writes_nothing(tmp_path: Path) -> None:
    config = tiny_config(num_steps=3)
    train_attempt(str(tmp_path), config)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    told = train_attempt(str(tmp_path), config, attempt=2)
    assert told.reason is StopReason.FINISHED
    assert told.records == []
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_checkpoints_come_at_their_cadence_and_old_ones_go(tmp_path: Path) -> None:
    train_attempt(str(tmp_path), tiny_config(num_steps=9, every_steps=2, log_every_steps=5))
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("*/commit.json")) == ["commit.json"] * 2
    saves = [event for event in read_events(Store(str(tmp_path))) if event["event"] == "save"]
    assert [event["step"] for event in saves] == [2, 4, 6, 8, 9]
    assert all(event["num_bytes"] > 0 and event["seconds"] > 0 for event in saves)
    commit = checkpoint.find_resume(Store(str(tmp_path)), pytest.fail)
    assert commit is not None
    assert (commit.step, commit.samples_seen, commit.world_size) == (9, 72, 1)


def test_events_tell_the_story_of_the_run(tmp_path: Path) -> None:
    config = tiny_config()
    train_attempt(str(tmp_path), config, stop_at=2)
    train_attempt(str(tmp_path), config, attempt=2)
    events = read_events(Store(str(tmp_path)))
    story = [(event["attempt"], event["event"], event.get("step")) for event in events]
    assert story == [
        (1, "start", 0),
        (1, "save", 2),
        (1, "stop", 2),
        (2, "start", 2),
        (2, "save", 4),
        (2, "save", 8),
        (2, "stop", 8),
    ]
    assert events[2]["reason"] == "stopped"
    assert events[3]["resumed_from"] == "checkpoints/step_000000002"
    assert events[-1]["reason"] == "finished"
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)


@pytest.mark.slow
def test_training_goes_on_from_the_newest_checkpoint_that_holds(tmp_path: Path) -> None:
    config = tiny_config(every_steps=2)
    train_attempt(str(tmp_path), config, stop_at=4)
    (damaged,) = (tmp_path / "checkpoints/step_000000004").glob("*.distcp")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    told = train_attempt(str(tmp_path), config, attempt=2)
    assert told.records[0]["step"] == 3
    assert checkpoint.newest_step(Store(str(tmp_path))) == 8


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loss_that_is_not_finite_stops_before_a_checkpoint_holds_it(tmp_path: Path, world_size: int) -> None:
    messages = run_ranks(_train_until_it_breaks, world_size, str(tmp_path), 0)
    assert all("1 updates in a row were skipped" in message for message in messages), messages
    assert all("step 4, was not finite" in message for message in messages), messages
    assert [record["skipped"] for record in read_metrics(Store(str(tmp_path)))] == [False] * 3 + [True]
    assert read_events(Store(str(tmp_path)))[-1]["reason"] == "non_finite"
    assert checkpoint.newest_step(Store(str(tmp_path))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loss_that_is_not_finite_is_skipped_counted_and_put_down_to_its_samples(
    tmp_path: Path, world_size: int
) -> None:
    assert run_ranks(_train_until_it_breaks, world_size, str(tmp_path), 1) == ["it went on"] * world_size
    records = read_metrics(Store(str(tmp_path)))
    assert [record["step"] for record in records if record["skipped"]] == [4]
    assert not math.isfinite(records[3]["loss"])
    assert all(math.isfinite(record["loss"]) for record in records if not record["skipped"])
    assert "NaN" not in "".join(path.read_text() for path in tmp_path.rglob("*.jsonl"))
    (event,) = [event for event in read_events(Store(str(tmp_path))) if event["event"] == "skipped"]
    assert (event["step"], event["reason"]) == (4, "non_finite")
    order = Order(SAMPLES_PER_SHARD, tiny_config().data)
    broken = order.rank_positions(3, world_size - 1, world_size)
    assert event["sample_ids"] == sorted(order.sample_ids(broken).tolist())


def _train_until_it_breaks(url: str, max_skipped_steps: int) -> str:
    """Infinite pixels on the last rank only, in the update to step 4, at which a checkpoint is due."""
    rank = torch.distributed.get_rank()
    config = tiny_config(log_every_steps=8, every_steps=2)
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, max_skipped_steps=max_skipped_steps))

    def infinite(batch: Batch) -> Batch:
        if batch.step == 3 and rank == torch.distributed.get_world_size() - 1:
            return dataclasses.replace(batch, images=torch.full_like(batch.images, math.inf, dtype=torch.float32))
        return batch

    try:
        train_attempt(url, config, change=infinite)
    except TrainingError as error:
        return str(error)
    return "it went on"


@pytest.mark.slow
def test_replaced_samples_of_every_rank_become_events(tmp_path: Path) -> None:
    run_ranks(_train_with_replacements, 2, str(tmp_path), tiny_config(num_steps=4))
    found = [event for event in read_events(Store(str(tmp_path))) if event["event"] == "quarantined"]
    assert [(event["step"], event["sample_id"], event["replacement_id"]) for event in found] == [
        (2, 100, 7),
        (2, 101, 7),
    ]
    assert {event["reason"] for event in found} == {"crc32c"}


def _train_with_replacements(url: str, config: TrainConfig) -> None:
    rank = torch.distributed.get_rank()

    def replace(batch: Batch) -> Batch:
        found = (Quarantined(2, 100 + rank, 7, "crc32c"),) if batch.step == 2 else ()
        return dataclasses.replace(batch, quarantined=found)

    train_attempt(url, config, change=replace)


@pytest.mark.slow
def test_one_rank_that_is_asked_to_stop_stops_all(tmp_path: Path) -> None:
    # `stop_at` looks at the records, which only rank 0 is given.
    reasons = [told.reason for told in run_ranks(_stop_at_4, 3, str(tmp_path), tiny_config())]
    assert reasons == [StopReason.STOPPED] * 3
    assert checkpoint.newest_step(Store(str(tmp_path))) == 4


def test_a_loader_at_another_step_is_refused(tmp_path: Path) -> None:
    config = tiny_config()
    with pytest.raises(TrainingError, match="a batch of step 3 when step 0 was due"):
        train(
            config,
            memory_loader(config, 3),
            run=Store(str(tmp_path)),
            num_samples=NUM_SAMPLES,
            attempt=1,
            device=CPU,
            resume_from=None,
        )
