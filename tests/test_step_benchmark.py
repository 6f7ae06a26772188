"""The step benchmark: peers compute what ours computes, operations are counted right, and a row that fails says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import step
from benchmarks.peers import step_counts, step_goals, step_rows
from benchmarks.peers.step_models import AUGMENT, Spec, batch_of, images_of, noise_of, our_config
from benchmarks.peers.step_peers import build_peer
from benchmarks.peers.step_rows import BARE, CROSS, LIMIT, OURS, SHALLOW, UNDER_RAY, WITH_MASKS
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
    found = step_counts.time_matmuls(TINY, 1, True)
    model = build_mae(our_config(TINY))
    batch = batch_of(batch_size)
    images = normalize(batch.images, AUGMENT.mean, AUGMENT.std)
    counted = step_counts.counts(lambda: model(images, batch.kept_ids, batch.masked_ids).sum(), model, batch_size)
    # 2 encoder layers of 50 tokens, 3 heads of 32; one decoder layer from all to all, one from 147 queries to 197.
    pairs = 2 * 96 * 50 * 50 + 64 * (197 * 197 + 147 * 197)
    assert counted["flops_per_image"] - found["flops_per_image"] == 7 * 2 * pairs


def row(table: str, name: str, kind: str, precision: str, images_per_s: float | None, **more: Any) -> dict[str, Any]:
    empty = {"peak_bytes": None, "flops_per_s": None, "saved_bytes": None}
    found = {"table": table, "name": name, "kind": kind, "precision": precision, "images_per_s": images_per_s}
    return empty | found | more


def test_goals_compare_rows_of_one_size_and_precision() -> None:
    rows = [
        row("base", OURS, "ours", "fp32", 3.0, peak_bytes=80, flops_per_s=90.0),
        row("base", "fast", "peer", "fp32", 2.0, peak_bytes=100),
        row("base", "small", "peer", "fp32", 1.0, peak_bytes=64),
        row("base", "broken", "peer", "fp32", None),
        row("base", LIMIT, "limit", "fp32", 9.0, flops_per_s=120.0),
        row("base", CROSS, "variant", "fp32", 6.0),
        row("large", "fast", "peer", "fp32", 50.0, peak_bytes=1),
        row("large", OURS, "ours", "fp32", 8.0, saved_bytes=10),
        row("large", WITH_MASKS, "variant", "fp32", 2.0, saved_bytes=24),
        row("large", SHALLOW, "variant", "fp32", 10.0),
        row("loop", BARE, "variant", "fp32", 1.02, images_per_cpu_s=0.55),
        row("loop", UNDER_RAY, "variant", "fp32", 1.0, images_per_cpu_s=0.5),
    ]
    found = {goal.name: goal for goal in step_goals.all_goals(rows)}
    assert found["ViT-B fp32: x the fastest peer (fast)"].measured == 1.5
    memory = found["ViT-B fp32: memory / the smallest peer's (small)"]
    assert memory.measured == 1.25
    assert not memory.met
    limit = found["ViT-B fp32: of the matmul-only limit, FLOP/s"]
    assert limit.measured == 0.75
    assert not limit.met
    assert found["ViT-L encoder without mask tokens against with, x in time"].measured == 4.0
    assert not found["ViT-L encoder without mask tokens against with, x in activations"].met
    assert found["ViT-L with decoder depth 1 besides, x in time"].measured == 5.0
    assert found["ViT-B fp32: cross decoder, x our own default"].measured == 2.0
    assert found["Ray Train and the loop, share of a step"].measured == pytest.approx(0.02)
    assert found["Ray Train and the loop, share of a step"].met
    assert found["Ray Train and the loop, share of a step's CPU time"].measured == pytest.approx(0.1)
    assert not found["ViT-B bf16: x the fastest peer (no peer ran)"].met


@pytest.mark.slow
def test_a_row_that_does_not_run_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    log.touch()
    nobody = Spec("nobody's", "peer", "nobody", "tiny", batch_size=2)
    table = step_rows.Table("base", [TINY, nobody], num_rounds=1, num_steps=1)
    rows = step_rows.measure(table, "", log)
    assert rows[0]["not_measured"] is None
    assert rows[0]["images_per_s"] > 0
    assert rows[0]["images_per_cpu_s"] > 0
    assert rows[0]["peak_bytes"] > 10**8
    assert 0.9 < rows[0]["first_loss"] < 1.5  # targets have variance 1
    assert rows[1]["not_measured"] == "KeyError: 'nobody'"
    assert "Traceback" in log.read_text()
    step.print_report({"machine": step.machine(1, 0.0, []), "rows": rows, "goals": []})
    assert "nobody's, tiny fp32: not measured: KeyError: 'nobody'" in capsys.readouterr().out


@pytest.mark.ray
def test_the_loop_under_ray(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    spec = Spec(UNDER_RAY, "variant", "ray", "tiny", batch_size=2)
    found = step_rows.run(spec, 3, False, log)
    assert len(found["seconds"]) == 3
    assert all(seconds > 0 for seconds in found["seconds"] + found["cpu_seconds"])
    bare = step_rows.run(Spec(BARE, "variant", "bare", "tiny", batch_size=2), 1, False, log)
    assert found["loss"] == pytest.approx(bare["loss"], rel=1e-5)
