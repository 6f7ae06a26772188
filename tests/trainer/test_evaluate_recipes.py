import json

import pytest

from pipeline.config import num_patches
from trainer.config import check_world, from_dict, num_steps, peak_lr, to_dict
from trainer.evaluate import recipes
from trainer.evaluate.config import EvaluateConfig

IMAGENET = 1_281_167
ENCODERS = {"base": (768, 12, 12), "large": (1024, 24, 16), "huge": (1280, 32, 16)}


@pytest.mark.parametrize("name", recipes.names())
def test_recipe_is_whole(name):
    config = recipes.get(name)
    assert isinstance(config, EvaluateConfig)
    assert from_dict(EvaluateConfig, json.loads(json.dumps(to_dict(config)))) == config
    for world_size in (1, 2):
        check_world(config, world_size)
    text = getattr(recipes, name).__doc__
    words = ("Command:", f"tarmac evaluate {name}", "--from", "--val", "Hardware:", "Hours:", "Expected:")
    for word in words:
        assert word in text, f"{name}'s docstring lacks {word}"
    assert any(word in text for word in ("[P", "not yet run by us"))


def test_names_are_known():
    sizes = ("base", "large", "huge")
    expected = {f"{kind}_{size}" for kind in ("finetune", "linear") for size in sizes} | {"finetune_huge_448"}
    assert set(recipes.names()) >= expected
    with pytest.raises(ValueError, match=r"unknown recipe 'mae_base_800ep'; known are finetune_base"):
        recipes.get("mae_base_800ep")


@pytest.mark.parametrize(
    ("name", "epochs", "peak", "layer_decay", "drop_path", "patches"),
    [
        ("finetune_base", 100, 2e-3, 0.65, 0.1, 196),
        ("finetune_large", 50, 4e-3, 0.75, 0.2, 196),
        ("finetune_huge", 50, 4e-3, 0.75, 0.3, 256),
        ("finetune_huge_448", 50, 4e-3, 0.75, 0.3, 1024),
    ],
)
def test_fine_tuning_is_the_papers(name, epochs, peak, layer_decay, drop_path, patches):
    config = recipes.get(name)
    optim, regularize = config.optim, config.regularize
    assert encoder_of(config) == ENCODERS[name.split("_")[1]]
    assert config.data.global_batch_size == 1024
    assert peak_lr(config) == pytest.approx(peak)
    assert num_steps(config, IMAGENET) == pytest.approx(epochs * 1251.14, rel=1e-4)
    assert optim.warmup_fraction * optim.num_epochs == pytest.approx(5)
    assert (optim.optimizer, optim.betas, optim.weight_decay, optim.min_lr) == ("adamw", (0.9, 0.999), 0.05, 1e-6)
    assert (optim.layer_decay, config.model.drop_path, num_patches(config.data.augment)) == (
        layer_decay,
        drop_path,
        patches,
    )
    assert (config.model.pool, config.model.head_std, config.model.frozen_encoder) == ("mean", 2e-5, False)
    assert (regularize.randaugment_magnitude, regularize.randaugment_std) == (9, 0.5)
    assert (regularize.erase_probability, regularize.label_smoothing) == (0.25, 0.1)
    assert (regularize.mixup_alpha, regularize.cutmix_alpha) == (0.8, 1.0)
    assert config.data.augment.crop_scale == (0.08, 1.0)
    assert config.validation.crop_fraction == (1.0 if "448" in name else 224 / 256)
    assert config.parallel.precision == "bf16"


@pytest.mark.parametrize(("name", "epochs"), [("linear_base", 90), ("linear_large", 50), ("linear_huge", 50)])
def test_linear_probing_is_the_papers(name, epochs):
    config = recipes.get(name)
    optim, regularize = config.optim, config.regularize
    assert encoder_of(config) == ENCODERS[name.split("_")[1]]
    assert config.data.global_batch_size == 16384
    assert peak_lr(config) == pytest.approx(6.4)
    assert num_steps(config, IMAGENET) == pytest.approx(epochs * 78.2, rel=1e-3)
    assert optim.warmup_fraction * optim.num_epochs == pytest.approx(10)
    assert (optim.optimizer, optim.momentum, optim.weight_decay, optim.min_lr) == ("lars", 0.9, 0.0, 0.0)
    assert (config.model.pool, config.model.head_std, config.model.frozen_encoder) == ("class", 0.01, True)
    strengths = (
        *(regularize.randaugment_magnitude, regularize.erase_probability, regularize.label_smoothing),
        *(regularize.mixup_alpha, regularize.cutmix_alpha, config.model.drop_path),
    )
    assert not any(strengths)
    assert (config.data.augment.crop_scale, config.data.augment.flip_probability) == ((0.08, 1.0), 0.5)


def encoder_of(config):
    assert config.model.mlp_ratio == 4.0
    return config.model.embed_dim, config.model.depth, config.model.num_heads


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        ("model", {"embed_dim": 100, "num_heads": 3}, r"model.embed_dim \(100\) must be divisible by model.num_heads"),
        ("model", {"num_classes": 1}, r"model.num_classes \(1\) must be at least 2"),
        ("model", {"drop_path": 1.0}, r"model.drop_path \(1.0\) must be in \[0, 1\)"),
        ("model", {"frozen_encoder": True, "drop_path": 0.1}, "must be 0 where model.frozen_encoder is on"),
        ("model", {"frozen_encoder": True, "drop_path": 0.0}, r"optim.layer_decay \(0.65\) must be 1 where"),
        ("optim", {"layer_decay": 0.0}, r"optim.layer_decay \(0.0\) must be in \(0, 1\]"),
        ("optim", {"min_lr": 1.0}, r"optim.min_lr \(1.0\) must be at most the peak"),
        ("regularize", {"randaugment_magnitude": 11.0}, r"regularize.randaugment_magnitude \(11.0\) must be in"),
        ("regularize", {"erase_probability": 1.5}, r"regularize.erase_probability \(1.5\) must be in \[0, 1\]"),
        ("validation", {"crop_fraction": 0.0}, r"validation.crop_fraction \(0.0\) must be in \(0, 1\]"),
        ("validation", {"every_epochs": 0}, r"validation.every_epochs \(0\) must be at least 1"),
        ("data", {"num_lanes": 1024}, r"data.num_lanes \(1024\) must be less than data.global_batch_size"),
        ("data", {"decode_device": "mixed"}, r"data.decode_device \('mixed'\) must be 'cpu'"),
    ],
)
def test_values_that_cannot_be_are_refused(section, fields, message):
    values = to_dict(recipes.get("finetune_base"))
    values[section] |= fields
    with pytest.raises(ValueError, match=message):
        from_dict(EvaluateConfig, values)
