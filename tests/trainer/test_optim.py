import dataclasses

import pytest
import torch

from pipeline.config import AugmentConfig, DataConfig
from trainer.config import ModelConfig, OptimConfig, TrainConfig
from trainer.mae import build_mae
from trainer.optim import build_optimizer, learning_rate, parameter_groups

CONFIG = TrainConfig(
    data=DataConfig(global_batch_size=512, num_lanes=8, augment=AugmentConfig(image_size=(16, 16), patch_size=4)),
    model=ModelConfig(embed_dim=16, depth=1, num_heads=2, decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2),
    optim=OptimConfig(base_lr=1e-3, num_steps=100, warmup_fraction=0.1),
)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.0),  # warm-up starts at 0
        (1, 2e-4),
        (5, 1e-3),
        (10, 2e-3),  # 1e-3 * 512 / 256
        (25, 1.8660254e-3),  # a sixth of the way down: (1 + cos 30 degrees) / 2
        (55, 1e-3),  # half way
        (70, 5e-4),  # two thirds: (1 + cos 120 degrees) / 2
        (100, 0.0),
    ],
)
def test_schedule_against_literals(step, expected):
    assert learning_rate(CONFIG, step, 100) == pytest.approx(expected, rel=1e-7, abs=1e-12)


def test_schedule_of_the_paper():
    # Batch 4096 and 1.5e-4 a 256: peak 2.4e-3 after 40 of 800 epochs, of 1,281,167 / 4096 steps each.
    config, steps = TrainConfig(), 250_228
    assert learning_rate(config, steps * 40 // 800, steps) == pytest.approx(2.4e-3, rel=2e-4)
    assert learning_rate(config, steps * 20 // 800, steps) == pytest.approx(1.2e-3, rel=2e-4)
    assert learning_rate(config, steps * 420 // 800, steps) == pytest.approx(1.2e-3, rel=2e-4)


def test_schedule_has_a_floor_and_may_skip_the_warm_up():
    optim = OptimConfig(base_lr=1e-3, min_lr=1e-4, warmup_fraction=0.0)
    config = dataclasses.replace(CONFIG, optim=optim)
    assert learning_rate(config, 0, 10) == pytest.approx(2e-3)
    assert learning_rate(config, 5, 10) == pytest.approx(1.05e-3)
    assert learning_rate(config, 10, 10) == pytest.approx(1e-4)


def test_groups_decay_matrices_and_tokens_only():
    model = build_mae(CONFIG)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, plain = ([names[p] for p in group["params"]] for group in parameter_groups(model, 0.05))
    assert set(decayed) == {
        "cls_token",
        "mask_token",
        "patch_embed.proj.weight",
        "decoder_embed.weight",
        "decoder_pred.weight",
        *(
            f"{stack}.0.{layer}.weight"
            for stack in ("blocks", "decoder_blocks")
            for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        ),
    }
    assert sorted(decayed + plain) == sorted(names.values())
    assert all(name.endswith(".bias") or "norm" in name for name in plain)


def test_adamw_decays_what_has_no_gradient_of_its_own():
    model = build_mae(CONFIG)
    optimizer = build_optimizer(CONFIG, model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    optimizer.step()
    after = dict(model.named_parameters())
    for name in ("cls_token", "blocks.0.attn.qkv.weight"):
        torch.testing.assert_close(after[name], before[name] * (1 - 0.5 * 0.05))
    for name in ("norm.weight", "patch_embed.proj.bias"):
        assert torch.equal(after[name], before[name])
    assert optimizer.defaults["betas"] == (0.9, 0.95)
