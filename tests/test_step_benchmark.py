"""The step benchmark: peers compute what ours computes, operations are counted right, and a row that fails says why."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from benchmarks import step
from benchmarks.peers import step_counts, step_goals, step_rows
from benchmarks.peers.step_models import AUGMENT, Spec, batch_of, images_of, noise_of, our_config
from benchmarks.peers.step_peers import build_peer
from benchmarks.peers.step_rows import BARE, CROSS, LIMIT, LOOP, OURS, SHALLOW, UNDER_RAY, WITH_MASKS
from benchmarks.peers.step_turns import Contender, Plan
from trainer.mae import build_mae, normalize

TINY = Spec("tarmac", "ours", "ours", "tiny", batch_size=2)


@pytest.mark.parametrize("builder", ["transformers", "lightly", "timm"])
def test_peers_have_our_weights_and_our_loss(builder: str) -> None:
    pytest.importorskip(builder)
    batch, ours = batch_of(2), build_mae(our_config(TINY))
    images = normalize(batch.images, AUGMENT.mean, AUGMENT.std)
    torch.testing.assert_close(images_of(2), images)
    expected = ours(images, batch.kept_ids, batch.masked_ids).mean()
    peer = build_peer(Spec(builder, "peer", builder, "tiny", batch_size=2))
    found = peer(images, noise_of(2))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    found.backward()
    trained = [weight for weight in peer.parameters() if weight.requires_grad]
    assert all(weight.grad is not None for weight in trained)
    assert sum(weight.numel() for weight in trained) == sum(weight.numel() for weight in ours.parameters())


class Known(nn.Module):
    """One linear layer, attention, and a function that keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = self.linear(tokens)
        attended = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
        return nn.functional.gelu(attended).sum()


def test_counts_operations_and_memory() -> None:
    model, tokens = Known(), torch.randn(2, 1, 5, 8)  # 2 images, one head, 5 tokens of 8
    found = step_counts.counts(lambda: model(tokens), model, batch_size=2)
    linear = 2 * (2 * 5 * 8 * 8)  # forward, and the weight's gradient; the tokens need none
    attention = 2 * (2 * 5 * 5 * 8) + 5 * (2 * 5 * 5 * 8)  # its backward begins with the scores again
    assert found["flops_per_image"] == linear + attention
    token_bytes = 2 * 5 * 8 * 4
    # The linear layer's input, its output, and the attention's, which the GELU keeps too; a sum of each of 10 rows.
    assert found["saved_bytes"] == 3 * token_bytes + 10 * 4


def test_the_limit_has_the_products_of_the_model() -> None:
    batch_size = 2
    _, flops = step_counts.matmuls(TINY)
    model = build_mae(our_config(TINY))
    batch = batch_of(batch_size)
    images = normalize(batch.images, AUGMENT.mean, AUGMENT.std)
    counted = step_counts.counts(lambda: model(images, batch.kept_ids, batch.masked_ids).sum(), model, batch_size)
    # 2 encoder layers of 50 tokens, 3 heads of 32; one decoder layer from all to all, one from 147 queries to 197.
    pairs = 2 * 96 * 50 * 50 + 64 * (197 * 197 + 147 * 197)
    assert counted["flops_per_image"] - flops / batch_size == 7 * 2 * pairs


def row(table: str, name: str, kind: str, precision: str, x_first: float | None, **more: Any) -> dict[str, Any]:
    found = {"table": table, "name": name, "kind": kind, "precision": precision, "x_first": x_first}
    return {"peak_bytes": None, "flops_per_image": None, "saved_bytes": None} | found | more


def test_goals_compare_rows_of_one_table_and_precision() -> None:
    rows = [
        row("base: fast", OURS, "ours", "fp32", 1.0, peak_bytes=90),
        row("base: fast", "fast", "peer", "fp32", 0.8, peak_bytes=100),
        row("base: small", OURS, "ours", "fp32", 1.0, peak_bytes=80),
        row("base: small", "small", "peer", "fp32", 0.5, peak_bytes=64),
        row("base: broken", "broken", "peer", "fp32", None),
        row("base: limit", OURS, "ours", "fp32", 1.0, flops_per_image=90.0),
        row("base: limit", LIMIT, "limit", "fp32", 1.5, flops_per_image=80.0),
        row("base: decoder", OURS, "ours", "fp32", 1.0),
        row("base: decoder", CROSS, "variant", "fp32", 2.0),
        row("large: fast", "fast", "peer", "fp32", 50.0, peak_bytes=1),
        row("large: encoder", WITH_MASKS, "variant", "fp32", 1.0, saved_bytes=24),
        row("large: encoder", OURS, "ours", "fp32", 4.0, saved_bytes=10),
        row("large: decoder depth 1", SHALLOW, "variant", "fp32", 5.0),
        row("loop", BARE, "variant", "fp32", 1.0, cpu_x_first=1.0),
        row("loop", UNDER_RAY, "variant", "fp32", 1 / 1.02, cpu_x_first=1 / 1.1),
        row("loop, a CPU spared", UNDER_RAY, "variant", "fp32", 1 / 1.5, cpu_x_first=1.0),
    ]
    found = {goal.name: goal for goal in step_goals.all_goals(rows)}
    assert found["ViT-B fp32: x the fastest peer (fast)"].measured == 1.25
    memory = found["ViT-B fp32: memory / the smallest peer's (small)"]
    assert memory.measured == 1.25
    assert not memory.met
    limit = found["ViT-B fp32: of the matmul-only limit, FLOP/s"]
    assert limit.measured == pytest.approx(0.75)
    assert not limit.met
    assert found["ViT-L encoder without mask tokens against with, x in time"].measured == 4.0
    assert not found["ViT-L encoder without mask tokens against with, x in activations"].met
    assert found["ViT-L with decoder depth 1 besides, x in time"].measured == 5.0
    assert found["ViT-B fp32: cross decoder, x our own default"].measured == 2.0
    assert found["Ray Train and the loop, all CPUs: share of a step"].measured == pytest.approx(0.02)
    assert found["Ray Train and the loop, all CPUs: share of a step"].met
    assert found["Ray Train and the loop, all CPUs: share of a step's CPU time"].measured == pytest.approx(0.1)
    assert not found["Ray Train and the loop, a CPU spared: share of a step"].met
    assert found["Ray Train and the loop, a CPU spared: share of a step's CPU time"].met
    assert not found["ViT-B bf16: x the fastest peer (no peer ran)"].met


def test_each_turn_is_compared_with_the_first_rows_of_the_same_round() -> None:
    table = step_rows.Table("base: again", [TINY, TINY], Plan(num_turns=3, num_steps=2))
    ours = [{"seconds": seconds, "cpu_seconds": 1.0} for seconds in (1.0, 10.0, 4.0)]
    peer = [{"seconds": seconds, "cpu_seconds": 2.0} for seconds in (2.0, 20.0, 4.0)]
    found = step_rows.row(table, 1, [ours, peer], {"loss": 1.0})
    assert (found["lowest_x_first"], found["x_first"], found["highest_x_first"]) == (0.5, 0.5, 1.0)
    assert found["cpu_x_first"] == 0.5
    assert found["images_per_s"] == 2 * 2 / 4.0
    failed = step_rows.row(table, 1, [ours, peer[:1]], {})
    assert failed["x_first"] is None
    assert failed["images_per_s"] is None


@pytest.mark.slow
def test_rows_take_turns_and_one_that_does_not_run_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    log.touch()
    nobody = Spec("nobody's", "peer", "nobody", "tiny", batch_size=2)
    table = step_rows.Table("base: again", [TINY, replace(TINY, name="again"), nobody], Plan(2, 1))
    rows = step_rows.measure(table, log)
    for row in rows[:2]:
        assert row["not_measured"] is None
        assert row["images_per_s"] > 0
        assert row["images_per_cpu_s"] > 0
        assert row["peak_bytes"] > 10**8
        assert 0.9 < row["first_loss"] < 1.5  # targets have variance 1
    assert rows[0]["x_first"] == 1.0
    assert rows[1]["x_first"] > 0
    assert rows[2]["not_measured"] == "KeyError: 'nobody'"
    assert "Traceback" in log.read_text()
    step.print_report({"machine": step.machine(1, 0.0, []), "rows": rows, "goals": []})
    assert "nobody's, tiny fp32: not measured: KeyError: 'nobody'" in capsys.readouterr().out


def comes_to_stop(process: psutil.Process) -> bool:
    deadline = time.monotonic() + 10
    while process.status() != psutil.STATUS_STOPPED and time.monotonic() < deadline:
        time.sleep(0.01)
    return process.status() == psutil.STATUS_STOPPED


def test_a_process_is_stopped_except_when_it_is_its_turn(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    with Contender(TINY, Plan(2, 1), False, log) as contender:
        contender.start()
        process = psutil.Process(contender.pid)
        assert comes_to_stop(process)
        contender.turn()
        assert comes_to_stop(process)
        assert contender.said == {}
        contender.turn()
        assert contender.said["loss"] > 0
    assert not process.is_running()


@pytest.mark.ray
def test_the_loop_under_ray(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    bare = Spec(BARE, "variant", "bare", "tiny", batch_size=2)
    loop = replace(bare, name=LOOP, builder="loop")
    under_ray = replace(bare, name=UNDER_RAY, builder="ray")
    rows = step_rows.measure(step_rows.Table("loop", [bare, loop, under_ray], Plan(2, 2), count=False), log)
    for row in rows:
        assert row["not_measured"] is None
        assert row["x_first"] > 0
        assert row["cpu_x_first"] > 0
        assert row["first_loss"] == pytest.approx(rows[0]["first_loss"], rel=1e-5)
