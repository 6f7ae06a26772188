"""The classifier, its optimizers and its groups against timm's and torch's own."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.optim import Lars as TimmLars
from tiny_evaluations import tiny_finetune
from tiny_runs import CPU, run_ranks
from torch.distributed.tensor import DTensor

from pipeline.config import AugmentConfig
from trainer import parallel
from trainer.config import ParallelConfig
from trainer.evaluate.classifier import BatchNorm, Classifier
from trainer.evaluate.config import ClassifierConfig
from trainer.evaluate.lars import Lars
from trainer.evaluate.optim import layer_groups
from trainer.sharding import shard_model
from trainer.vit import Block, position_embedding

AUGMENT = AugmentConfig(image_size=(32, 48), patch_size=8)


def classifier(augment: AugmentConfig = AUGMENT, **fields: Any) -> Classifier:
    config = ClassifierConfig(embed_dim=32, depth=3, num_heads=2, num_classes=5, head_std=0.5, **fields)
    model = Classifier(config, augment)
    model.init_weights(seed=3)
    return model


def timm_classifier(pool: str) -> Any:
    return timm.models.vision_transformer.VisionTransformer(
        img_size=(32, 48), patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5, global_pool=pool,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
    )  # fmt: skip


@pytest.mark.parametrize(("pool", "theirs"), [("mean", "avg"), ("class", "token")])
def test_its_scores_are_those_of_timm(pool: Any, theirs: str) -> None:
    ours, reference = classifier(pool=pool), timm_classifier(theirs).eval()
    reference.load_state_dict(ours.state_dict())
    images = torch.randn(4, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours(images), reference(images), rtol=1e-4, atol=1e-5)


def test_a_probe_is_timms_class_token_through_a_batch_norm() -> None:
    ours, reference = classifier(pool="class", frozen_encoder=True), timm_classifier("token").eval()
    encoder = {name: value for name, value in ours.state_dict().items() if not name.startswith("head_norm")}
    reference.load_state_dict(encoder)
    norm = torch.nn.BatchNorm1d(32, affine=False, eps=1e-6)
    images = torch.randn(6, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        images = images * 1.5
        features = reference.forward_head(reference.forward_features(images), pre_logits=True)
        expected = reference.head(norm(features))
        torch.testing.assert_close(ours(images, None, 4), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.head_norm.running_var, norm.running_var, rtol=1e-3, atol=1e-6)
    ours.eval()
    torch.testing.assert_close(ours(images), reference.head(norm.eval()(features)), rtol=1e-3, atol=1e-4)
    assert [name for name, parameter in ours.named_parameters() if parameter.requires_grad] == [
        "head.weight",
        "head.bias",
    ]


def test_batch_norm_is_over_the_images_of_all_ranks() -> None:
    expected = torch.nn.functional.batch_norm(_features(), None, None, training=True, eps=1e-6)
    for world_size, rows in ((1, [range(7)]), (2, [range(3), range(3, 7)])):
        found = run_ranks(_normalised_share, world_size, [list(share) for share in rows])
        torch.testing.assert_close(torch.cat([torch.tensor(part) for part in found]), expected)


def _features() -> torch.Tensor:
    return torch.randn(7, 5, generator=torch.Generator().manual_seed(0)) * 3 + 2


def _normalised_share(rows: list[list[int]]) -> list[Any]:
    return BatchNorm(5)(_features()[rows[parallel.rank()]]).tolist()


def test_a_larger_image_has_the_places_of_the_smaller_one() -> None:
    # On a grid twice as fine, the mean of four patches lies where the coarse patch does.
    fine = classifier(AugmentConfig(image_size=(64, 96), patch_size=8))
    fine.place_positions((4, 6))
    coarse = position_embedding(32, 4, 6)
    assert torch.equal(fine.pos_embed[0, 0], coarse[0, 0])
    means = fine.pos_embed[0, 1:].detach().view(4, 2, 6, 2, 32).mean(dim=(1, 3))
    slow = slice(4, 8)  # the frequencies that hardly change from patch to patch
    torch.testing.assert_close(means[..., slow], coarse[0, 1:].view(4, 6, 32)[..., slow], rtol=0.02, atol=0.05)
    same = classifier()
    same.place_positions((4, 6))
    assert torch.equal(same.pos_embed, coarse)


def test_drop_path_scales_attention_and_mlp_image_by_image() -> None:
    block = Block(8, 2, 2.0)
    tokens = torch.randn(3, 4, 8)
    scales = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 1.0]])
    found = block(tokens, branch_scales=scales)
    assert torch.equal(found[0], tokens[0])
    torch.testing.assert_close(found[1], tokens[1] + 2 * block.attn(block.norm1(tokens[1:2]))[0])
    torch.testing.assert_close(found[2], block(tokens[2:])[0])


def test_layers_decay_by_the_published_rule() -> None:
    model = classifier(pool="mean")
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {
        names[parameter]: (group["lr_scale"], group["weight_decay"])
        for group in layer_groups(model, depth=3, weight_decay=0.05, layer_decay=0.5)
        for parameter in group["params"]
    }
    assert set(found) == set(names.values())
    assert found["cls_token"] == found["pos_embed"] == found["patch_embed.proj.bias"] == (0.0625, 0.0)
    assert found["patch_embed.proj.weight"] == (0.0625, 0.05)
    assert found["blocks.0.attn.qkv.weight"] == (0.125, 0.05)
    assert found["blocks.1.norm1.weight"] == (0.25, 0.0)
    assert found["blocks.2.mlp.fc2.weight"] == (0.5, 0.05)
    assert found["fc_norm.weight"] == found["head.bias"] == (1.0, 0.0)
    assert found["head.weight"] == (1.0, 0.05)


def test_only_the_head_of_a_probe_is_trained() -> None:
    model = classifier(pool="class", frozen_encoder=True)
    groups = layer_groups(model, depth=3, weight_decay=0.0, layer_decay=1.0)
    assert sum(len(group["params"]) for group in groups) == 2


def _linear() -> torch.nn.Linear:
    layer = torch.nn.Linear(6, 5)
    generator = torch.Generator().manual_seed(4)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return layer


def _gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator) for shape in ((5, 6), (5,))]


def test_lars_is_timms() -> None:
    ours, theirs = _linear(), _linear()
    optimizer = Lars(ours.parameters(), lr=3.0, momentum=0.9, weight_decay=0.01)
    weight, bias = theirs.parameters()
    reference = TimmLars(
        [
            {"params": [weight], "weight_decay": 0.01, "always_adapt": True},
            {"params": [bias], "weight_decay": 0.0, "always_adapt": False},
        ],
        lr=3.0,
        momentum=0.9,
    )
    for step in range(5):
        for model, tool in ((ours, optimizer), (theirs, reference)):
            for parameter, gradient in zip(model.parameters(), _gradients(step), strict=True):
                parameter.grad = gradient.clone()
            tool.step()
    for parameter, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-6)


def test_lars_skips_and_clips_as_fused_optimizers_do() -> None:
    layers = [_linear(), _linear()]
    optimizers = [Lars(layer.parameters(), lr=1.0) for layer in layers]
    for scale, layer, optimizer in zip((1.0, 4.0), layers, optimizers, strict=True):
        for parameter, gradient in zip(layer.parameters(), _gradients(0), strict=True):
            parameter.grad = gradient * scale
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(0.0), torch.tensor(scale)
        optimizer.step()
    torch.testing.assert_close(layers[0].weight, layers[1].weight)
    torch.testing.assert_close(layers[0].bias, layers[1].bias)
    before = copy.deepcopy([layers[0].state_dict(), optimizers[0].state_dict()["state"]])
    layers[0].weight.grad.fill_(float("nan"))
    optimizers[0].found_inf = torch.tensor(1.0)
    optimizers[0].step()
    assert torch.equal(layers[0].weight, before[0]["weight"])
    assert torch.equal(optimizers[0].state_dict()["state"][0]["momentum_buffer"], before[1][0]["momentum_buffer"])


@pytest.mark.slow
def test_lars_takes_the_norms_of_whole_tensors() -> None:
    expected = _lars_steps()
    for found in run_ranks(_lars_steps, 2):  # 5 rows on two ranks: 3 and 2
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected))


def _lars_steps() -> list[Any]:
    model = torch.nn.Sequential(_linear())
    with parallel.process_mesh(CPU) as mesh:
        shard_model(model, ParallelConfig(precision="fp32"), mesh)
        optimizer = Lars(model.parameters(), lr=3.0, weight_decay=0.01)
        for step in range(3):
            # Of an identity matrix the layer makes weight.T + bias, so this loss has the gradient that is multiplied
            # in; the same on all ranks, and so their mean.
            (model(torch.eye(6)) * _gradients(step)[0].T).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        weight = model[0].weight
        whole: list[Any] = (weight.full_tensor() if isinstance(weight, DTensor) else weight).tolist()
        return whole


def test_the_head_begins_where_the_paper_has_it() -> None:
    config = tiny_finetune()
    wide = ClassifierConfig(embed_dim=256, depth=1, num_heads=4, num_classes=1000, head_std=2e-5)
    model = Classifier(wide, config.data.augment)
    model.init_weights(seed=0)
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.02)
    assert not model.head.bias.any()
    assert torch.equal(model.pos_embed, position_embedding(256, 4, 4))
