import dataclasses
import math
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from benchmarks.peers.step_peers import transformers_names
from pipeline.config import AugmentConfig, DataConfig
from trainer.config import ModelConfig, TrainConfig
from trainer.mae import MAE, build_mae, normalize
from trainer.vit import patchify

TINY = ModelConfig(embed_dim=48, depth=3, num_heads=4, decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=2)


def config_of(model=TINY, image_size=(32, 32), patch_size=8, seed=0):
    augment = AugmentConfig(image_size=image_size, patch_size=patch_size)
    return TrainConfig(model=model, data=DataConfig(augment=augment, seed=seed))


def perturbed_mae(config):
    """A model none of whose tensors is all zeros or all ones: an error in any of them shows."""
    model = build_mae(config).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64), alpha=0.1)
    return model


def batch_of(config, batch=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)
    height, width = config.data.augment.image_size
    patch = config.data.augment.patch_size
    images = torch.randn(batch, 3, height, width, generator=generator, dtype=dtype)
    noise = torch.rand(batch, (height // patch) * (width // patch), generator=generator)
    order = noise.argsort(dim=1)
    num_kept = noise.shape[1] // 4
    return images, noise, order[:, :num_kept], order[:, num_kept:]


def in_transformers(tensors):
    return {name.removeprefix("model."): tensor for name, tensor in transformers_names(tensors).items()}


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_loss_and_gradients_equal_transformers(norm_pix_loss):
    model_config = ModelConfig(
        embed_dim=48, depth=3, num_heads=4, mlp_ratio=3.0, decoder_embed_dim=32, decoder_depth=2,
        decoder_num_heads=2, norm_pix_loss=norm_pix_loss,
    )  # fmt: skip
    config = config_of(model_config)
    ours = perturbed_mae(config)
    theirs = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=144,
            decoder_hidden_size=32, decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
            decoder_intermediate_size=96, image_size=32, patch_size=8, mask_ratio=0.75,
            norm_pix_loss=norm_pix_loss, layer_norm_eps=1e-6,
        )
    ).double()  # fmt: skip
    theirs.load_state_dict(in_transformers(ours.state_dict()))
    images, noise, kept_ids, masked_ids = batch_of(config)

    per_image = ours(images, kept_ids, masked_ids)
    assert per_image.shape == (3,)
    per_image.mean().backward()
    reference = theirs(images, noise=noise).loss
    reference.backward()

    torch.testing.assert_close(per_image.mean(), reference, rtol=1e-10, atol=0)
    gradients = in_transformers({name: p.grad for name, p in ours.named_parameters()})
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-10, msg=lambda m, n=name: n + m)


def naive_loss(model, images, kept_ids, masked_ids):
    """The paper's figure 1 word for word: embed all, drop, unshuffle, decode all, score the removed."""
    batch = len(images)
    everyone = torch.arange(batch)[:, None]
    tokens = model.patch_embed.proj(images).flatten(2).transpose(1, 2) + model.pos_embed[:, 1:]
    class_token = (model.cls_token + model.pos_embed[:, :1]).expand(batch, -1, -1)
    latent = model.norm(nn.Sequential(*model.blocks)(torch.cat([class_token, tokens[everyone, kept_ids]], dim=1)))
    visible = model.decoder_embed(latent)
    full = model.mask_token.repeat(batch, tokens.shape[1], 1)
    full[everyone, kept_ids] = visible[:, 1:]
    full = torch.cat([visible[:, :1], full], dim=1) + model.decoder_pos_embed
    predicted = model.decoder_pred(model.decoder_norm(nn.Sequential(*model.decoder_blocks)(full)))[:, 1:]
    target = patchify(images, model.patch_size)
    deviation = target - target.mean(-1, keepdim=True)
    target = deviation / (deviation.square().sum(-1, keepdim=True) / (target.shape[-1] - 1) + 1e-6).sqrt()
    mask = torch.ones(batch, tokens.shape[1], dtype=images.dtype)
    mask[everyone, kept_ids] = 0
    return ((predicted - target).square().mean(-1) * mask).sum(1) / mask.sum(1), predicted


@pytest.mark.parametrize("image_size", [(32, 32), (24, 48)])
def test_savings_change_neither_loss_nor_gradients(image_size):
    config = config_of(image_size=image_size)
    model = perturbed_mae(config)
    images, _, kept_ids, masked_ids = batch_of(config)
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)

    loss = model(images, kept_ids, masked_ids)
    gradients = torch.autograd.grad((loss * weights).sum(), list(model.parameters()))
    expected, predicted = naive_loss(model, images, kept_ids, masked_ids)
    reference = torch.autograd.grad((expected * weights).sum(), list(model.parameters()))

    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    for (name, _), ours, theirs in zip(model.named_parameters(), gradients, reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-10, msg=lambda m, n=name: n + m)
    torch.testing.assert_close(
        model(images, kept_ids, masked_ids, predict=True), predicted[torch.arange(3)[:, None], masked_ids]
    )


def naive_cross_prediction(model, images, kept_ids, masked_ids):
    """Section 3 of CrossMAE with torch's own attention: each mask token looks at the encoder's blocks, mixed."""
    batch, everyone = len(images), torch.arange(len(images))[:, None]
    tokens = model.patch_embed.proj(images).flatten(2).transpose(1, 2) + model.pos_embed[:, 1:]
    class_token = (model.cls_token + model.pos_embed[:, :1]).expand(batch, -1, -1)
    tokens = torch.cat([class_token, tokens[everyone, kept_ids]], dim=1)
    features = [tokens]
    for block in model.blocks:
        tokens = block(tokens)
        features.append(tokens)
    features[-1] = model.norm(tokens)
    queries = model.mask_token + model.decoder_pos_embed[0, 1:][masked_ids]
    for weights, block in zip(model.feature_weights, model.decoder_blocks, strict=True):
        context = block.norm_context(sum(weight * feature for weight, feature in zip(weights, features, strict=True)))
        key, value = block.attn.kv.weight.chunk(2)
        attended, _ = nn.functional.multi_head_attention_forward(
            block.norm1(queries).transpose(0, 1), *[context.transpose(0, 1)] * 2,
            queries.shape[-1], block.attn.num_heads, None, torch.cat([block.attn.q.bias, block.attn.kv.bias]),
            None, None, False, 0.0, block.attn.proj.weight, block.attn.proj.bias, use_separate_proj_weight=True,
            q_proj_weight=block.attn.q.weight, k_proj_weight=key, v_proj_weight=value,
        )  # fmt: skip
        queries = queries + attended.transpose(0, 1)
        queries = queries + block.mlp(block.norm2(queries))
    return model.decoder_pred(model.decoder_norm(queries))


CROSS = dataclasses.replace(TINY, decoder="cross")


@pytest.mark.parametrize(("predict_ratio", "num_predicted"), [(None, 12), (0.25, 4)])
def test_the_cross_decoder_against_torchs_own_attention(predict_ratio, num_predicted):
    model = perturbed_mae(config_of(dataclasses.replace(CROSS, predict_ratio=predict_ratio)))
    images, _, kept_ids, masked_ids = batch_of(config_of())
    expected = naive_cross_prediction(model, images, kept_ids, masked_ids)
    torch.testing.assert_close(model(images, kept_ids, masked_ids, predict=True), expected)
    target = patchify(images, 8)[torch.arange(3)[:, None], masked_ids]
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    loss = (expected - target)[:, :num_predicted].square().mean((1, 2))
    torch.testing.assert_close(model(images, kept_ids, masked_ids), loss)
    gradients = torch.autograd.grad(loss.sum(), list(model.parameters()))
    ours = torch.autograd.grad(model(images, kept_ids, masked_ids).sum(), list(model.parameters()))
    for (name, _), gradient, reference in zip(model.named_parameters(), ours, gradients, strict=True):
        torch.testing.assert_close(gradient, reference, msg=lambda m, n=name: n + m)


def test_a_patch_predicted_by_the_cross_decoder_depends_on_no_other():
    model = perturbed_mae(config_of(CROSS))
    images, _, kept_ids, masked_ids = batch_of(config_of())
    together = model(images, kept_ids, masked_ids, predict=True)
    torch.testing.assert_close(model(images, kept_ids, masked_ids[:, 3:5], predict=True), together[:, 3:5])


def naive_loss_with_mask_tokens(model, images, kept_ids, masked_ids):
    """Table 1c's slow encoder: removed patches become mask tokens in front of the encoder, nothing is dropped."""
    everyone = torch.arange(len(images))[:, None]
    tokens = model.patch_embed.proj(images).flatten(2).transpose(1, 2).clone()
    tokens[everyone, masked_ids] = model.mask_token
    tokens = torch.cat([model.cls_token.expand(len(images), -1, -1), tokens], dim=1) + model.pos_embed
    latent = model.norm(nn.Sequential(*model.blocks)(tokens))
    full = model.decoder_embed(latent) + model.decoder_pos_embed
    predicted = model.decoder_pred(model.decoder_norm(nn.Sequential(*model.decoder_blocks)(full)))[:, 1:]
    target = patchify(images, model.patch_size)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    return (predicted - target).square().mean(-1)[everyone, masked_ids].mean(1)


def test_mask_tokens_in_the_encoder_as_in_table_1c():
    model = perturbed_mae(config_of(dataclasses.replace(TINY, masking_in_encoder=True)))
    images, _, kept_ids, masked_ids = batch_of(config_of())
    loss, expected = (
        model(images, kept_ids, masked_ids),
        naive_loss_with_mask_tokens(model, images, kept_ids, masked_ids),
    )
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    ours, reference = (torch.autograd.grad(each.sum(), list(model.parameters())) for each in (loss, expected))
    for (name, _), gradient, other in zip(model.named_parameters(), ours, reference, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-6, atol=1e-10, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"predict_ratio": 0.25}, "needs model.decoder 'cross'"),
        ({"decoder": "cross", "masking_in_encoder": True}, "masking_in_encoder needs model.decoder 'self'"),
        ({"decoder": "cross", "predict_ratio": 0.01}, "must predict at least one patch"),
        ({"decoder": "cross", "predict_ratio": 0.9}, "at most those that data.augment.mask_ratio (0.75) removes"),
    ],
)
def test_decoders_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config_of(ModelConfig(**fields))


def test_loss_does_not_depend_on_the_order_of_the_masks():
    config = config_of()
    model = perturbed_mae(config)
    images, _, kept_ids, masked_ids = batch_of(config)
    shuffled = model(images, kept_ids.flip(1), masked_ids.roll(3, dims=1))
    torch.testing.assert_close(shuffled, model(images, kept_ids, masked_ids))


@pytest.mark.parametrize(
    ("width", "depth", "heads", "patch", "millions"),
    [(768, 12, 12, 16, 111.66), (1024, 24, 16, 16, 329.24), (1280, 32, 16, 14, 656.61)],
)
def test_parameter_counts_of_the_paper(width, depth, heads, patch, millions):
    with torch.device("meta"):
        model = MAE(ModelConfig(embed_dim=width, depth=depth, num_heads=heads), AugmentConfig(patch_size=patch))
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert round(count / 1e6, 2) == millions


def test_parameter_names_are_the_published_ones():
    names = set(build_mae(config_of()).state_dict())
    layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    modules = ["patch_embed.proj", "norm", "decoder_embed", "decoder_norm", "decoder_pred"]
    modules += [f"blocks.{i}.{layer}" for i in range(3) for layer in layers]
    modules += [f"decoder_blocks.{i}.{layer}" for i in range(2) for layer in layers]
    expected = {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    assert names == expected | {"cls_token", "pos_embed", "mask_token", "decoder_pos_embed"}


def test_initial_weights():
    model_config = ModelConfig(
        embed_dim=256, depth=2, num_heads=4, decoder_embed_dim=128, decoder_depth=1, decoder_num_heads=4
    )
    model = build_mae(config_of(model_config))
    fans = {
        "patch_embed.proj.weight": (192, 256),
        "blocks.0.attn.qkv.weight": (256, 768),  # one matrix, not three
        "blocks.1.attn.proj.weight": (256, 256),
        "blocks.1.mlp.fc1.weight": (256, 1024),
        "decoder_blocks.0.mlp.fc2.weight": (512, 128),
        "decoder_embed.weight": (256, 128),
        "decoder_pred.weight": (128, 192),
    }
    state = model.state_dict()
    for name, (fan_in, fan_out) in fans.items():
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert 0.99 * bound < state[name].abs().max() <= bound, name
        assert state[name].std() == pytest.approx(bound / math.sqrt(3), rel=0.02), name
        assert abs(state[name].mean()) < 0.02 * bound, name
    for name in ("cls_token", "mask_token"):
        assert state[name].std() == pytest.approx(0.02, rel=0.2)
    # The one bias that PyTorch's default is left to: uniform in 1 / sqrt(3 * 8 * 8) either side.
    bias = state["patch_embed.proj.bias"]
    assert 0.9 / math.sqrt(192) < bias.abs().max() <= 1 / math.sqrt(192)
    for name, tensor in state.items():
        if name.endswith("bias") and name != "patch_embed.proj.bias":
            assert not tensor.any(), name
        if "norm" in name and name.endswith("weight"):
            assert (tensor == 1).all(), name
    assert not torch.equal(state["blocks.0.mlp.fc1.weight"], state["blocks.1.mlp.fc1.weight"])


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = build_mae(config_of()).state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = build_mae(config_of()).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    # Another depth adds tensors and changes none; another seed changes every random one.
    deeper = ModelConfig(embed_dim=48, depth=4, num_heads=4, decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=2)
    third = build_mae(config_of(deeper)).state_dict()
    assert all(torch.equal(first[name], third[name]) for name in first)
    other = build_mae(config_of(seed=1)).state_dict()
    assert not torch.equal(first["cls_token"], other["cls_token"])
    assert torch.equal(first["pos_embed"], other["pos_embed"])


def test_normalize_against_literals():
    images = torch.tensor([0, 127, 255], dtype=torch.uint8).reshape(1, 3, 1, 1).expand(2, 3, 4, 5)
    pixels = normalize(images, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert pixels.dtype == torch.float32
    assert pixels.shape == images.shape
    expected = torch.tensor([-0.485 / 0.229, (127 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    torch.testing.assert_close(pixels[1, :, 3, 2], expected, atol=1e-6, rtol=0)


def test_targets_stay_float32_when_parameters_are_bfloat16():
    config = config_of()
    model = build_mae(config)
    images, _, kept_ids, masked_ids = batch_of(config, dtype=torch.float32)
    exact = model(images, kept_ids, masked_ids)
    loss = model.bfloat16()(images, kept_ids, masked_ids)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)


@pytest.fixture
def lone_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_model_trains_and_reconstructs(lone_rank):
    config = config_of()
    images, _, kept_ids, masked_ids = batch_of(config, dtype=torch.float32)
    plain = build_mae(config)
    expected = plain(images, kept_ids, masked_ids)
    picture = plain.reconstruct(images, kept_ids, masked_ids)

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    model = build_mae(config)
    for block in [*model.blocks, *model.decoder_blocks]:
        fully_shard(block, mesh=lone_rank, mp_policy=policy)
    fully_shard(model, mesh=lone_rank, mp_policy=policy)
    loss = model(images, kept_ids, masked_ids)
    loss.mean().backward()

    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
    torch.testing.assert_close(model.reconstruct(images, kept_ids, masked_ids), picture, atol=0.05, rtol=0.05)
