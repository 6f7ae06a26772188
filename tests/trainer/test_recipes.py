import json

import pytest

from pipeline.config import num_kept_patches, num_patches
from trainer import recipes
from trainer.config import TrainConfig, check_world, from_dict, num_steps, peak_lr, to_dict

IMAGENET = 1_281_167
PAPER = ("mae_base_800ep", "mae_large_800ep", "mae_large_1600ep", "mae_huge_1600ep")


@pytest.mark.parametrize("name", recipes.names())
def test_recipe_is_whole(name):
    config = recipes.get(name)
    assert isinstance(config, TrainConfig)
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config
    for world_size in (1, 2):
        check_world(config, world_size)
    text = getattr(recipes, name).__doc__
    for word in ("Command:", f"tarmac pretrain {name}", "Hardware:", "Hours:", "Expected:"):
        assert word in text, f"{name}'s docstring lacks {word}"


def test_names_are_known():
    assert set(recipes.names()) >= {*PAPER, "imagenet_tiny", "cifar_tiny", "demo"}


def test_unknown_recipe_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown recipe 'mae_bse'; known are .*mae_base_800ep.*demo"):
        recipes.get("mae_bse")


@pytest.mark.parametrize("name", PAPER)
def test_paper_recipes_are_the_papers(name):
    config = recipes.get(name)
    assert config.data.global_batch_size == 4096
    assert peak_lr(config) == pytest.approx(2.4e-3)
    assert (config.optim.betas, config.optim.weight_decay, config.optim.min_lr) == ((0.9, 0.95), 0.05, 0.0)
    assert config.optim.warmup_fraction * config.optim.num_epochs == pytest.approx(40)
    assert config.model.norm_pix_loss
    decoder = (config.model.decoder_embed_dim, config.model.decoder_depth, config.model.decoder_num_heads)
    assert decoder == (512, 8, 16)
    augment = config.data.augment
    kept = (num_kept_patches(augment), num_patches(augment))
    assert kept == ((64, 256) if "huge" in name else (49, 196))
    epochs = int(name.rsplit("_", 1)[1].removesuffix("ep"))
    assert num_steps(config, IMAGENET) == pytest.approx(epochs * 312.8, rel=1e-4)
    for world_size in (8, 64, 256):
        check_world(config, world_size)
