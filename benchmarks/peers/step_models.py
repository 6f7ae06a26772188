"""The same masked autoencoder as others have built it: each a function from images and noise to a loss."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trainer import recipes
from trainer.config import ModelConfig, ParallelConfig, TrainConfig
from trainer.vit import patchify, position_embedding

MASK_RATIO = 0.75
SIZES = {
    "base": recipes.get("mae_base_800ep").model,
    "large": recipes.get("mae_large_800ep").model,
    "tiny": ModelConfig(
        embed_dim=192, depth=2, num_heads=3, decoder_embed_dim=128, decoder_depth=2, decoder_num_heads=4
    ),
}


@dataclass(frozen=True)
class Spec:
    """A row: who built the model, how large it is, and how it runs."""

    name: str
    kind: str
    """ours, peer or variant."""
    builder: str
    """ours, transformers, lightly or timm."""
    size: str = "base"
    precision: str = "fp32"
    compiled: bool = False
    batch_size: int = 16
    model: dict[str, Any] | None = None
    """Fields of ours that differ from the size's."""


def our_config(spec: Spec) -> TrainConfig:
    """Ours, as a run of one rank has it."""
    base = recipes.get("mae_base_800ep")
    data = replace(
        base.data, global_batch_size=spec.batch_size, num_lanes=1, micro_batch_size=None, decode_device="cpu"
    )
    parallel = ParallelConfig(precision="bf16" if spec.precision == "bf16" else "fp32", compile=spec.compiled)
    model = replace(SIZES[spec.size], **(spec.model or {}))
    return replace(base, data=data, model=model, parallel=parallel)


def images_and_noise(batch_size: int) -> tuple[Tensor, Tensor]:
    """Normalised images [B, 3, 224, 224] and noise [B, 196], always the same."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, 224, 224, generator=generator)
    return images, torch.rand(batch_size, 196, generator=generator)


def build_peer(spec: Spec) -> nn.Module:
    """A peer's model; called with images and noise it gives the loss, a scalar."""
    builders = {"transformers": Transformers, "lightly": Lightly, "timm": Timm}
    return builders[spec.builder](SIZES[spec.size])


class Transformers(nn.Module):
    """`ViTMAEForPreTraining` of transformers."""

    def __init__(self, size: ModelConfig) -> None:
        super().__init__()
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        self.model = ViTMAEForPreTraining(
            ViTMAEConfig(
                hidden_size=size.embed_dim,
                num_hidden_layers=size.depth,
                num_attention_heads=size.num_heads,
                intermediate_size=4 * size.embed_dim,
                decoder_hidden_size=size.decoder_embed_dim,
                decoder_num_hidden_layers=size.decoder_depth,
                decoder_num_attention_heads=size.decoder_num_heads,
                decoder_intermediate_size=4 * size.decoder_embed_dim,
                mask_ratio=MASK_RATIO,
                norm_pix_loss=True,
            )
        )

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        loss: Tensor = self.model(images, noise=noise).loss
        return loss


class Lightly(nn.Module):
    """Lightly's modules, put together as its MAE example does."""

    def __init__(self, size: ModelConfig) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
            from timm.models.vision_transformer import VisionTransformer

            vit = VisionTransformer(embed_dim=size.embed_dim, depth=size.depth, num_heads=size.num_heads, num_classes=0)
            self.backbone = MaskedVisionTransformerTIMM(vit=vit)
            self.decoder = MAEDecoderTIMM(
                num_patches=196,
                patch_size=16,
                embed_dim=size.embed_dim,
                decoder_embed_dim=size.decoder_embed_dim,
                decoder_depth=size.decoder_depth,
                decoder_num_heads=size.decoder_num_heads,
            )

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        from lightly.models import utils

        order = noise.argsort(dim=1) + 1  # 0 is the class token
        kept, masked = order[:, :49], order[:, 49:]
        kept = torch.cat([torch.zeros_like(kept[:, :1]), kept], dim=1)
        encoded = self.decoder.embed(self.backbone.encode(images=images, idx_keep=kept))
        tokens = utils.repeat_token(self.decoder.mask_token, (len(images), 197))
        tokens = utils.set_at_index(tokens, kept, encoded.type_as(tokens))
        predicted = self.decoder.predict(utils.get_at_index(self.decoder.decode(tokens), masked))
        target = utils.get_at_index(utils.patchify(images, 16), masked - 1)
        return nn.functional.mse_loss(predicted, _normalised(target))


class Timm(nn.Module):
    """timm's blocks put together as the paper's figure 1: embed all, drop, encode, unshuffle, decode all."""

    def __init__(self, size: ModelConfig) -> None:
        super().__init__()
        from timm.layers import PatchEmbed
        from timm.models.vision_transformer import Block

        width, decoder_width = size.embed_dim, size.decoder_embed_dim
        self.patch_embed = PatchEmbed(224, 16, 3, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.register_buffer("positions", position_embedding(width, 14, 14))
        self.register_buffer("decoder_positions", position_embedding(decoder_width, 14, 14))
        self.blocks = nn.Sequential(*(Block(width, size.num_heads, 4, qkv_bias=True) for _ in range(size.depth)))
        self.norm = nn.LayerNorm(width)
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.decoder_blocks = nn.Sequential(
            *(Block(decoder_width, size.decoder_num_heads, 4, qkv_bias=True) for _ in range(size.decoder_depth))
        )
        self.decoder_norm = nn.LayerNorm(decoder_width)
        self.decoder_pred = nn.Linear(decoder_width, 768)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        positions, decoder_positions = self.get_buffer("positions"), self.get_buffer("decoder_positions")
        order = noise.argsort(dim=1)
        restore = order.argsort(dim=1)
        tokens = self.patch_embed(images) + positions[:, 1:]
        kept = torch.gather(tokens, 1, order[:, :49, None].expand(-1, -1, tokens.shape[-1]))
        first = (self.cls_token + positions[:, :1]).expand(len(images), -1, -1)
        encoded = self.decoder_embed(self.norm(self.blocks(torch.cat([first, kept], dim=1))))
        masks = self.mask_token.expand(len(images), 147, -1).to(encoded.dtype)
        shuffled = torch.cat([encoded[:, 1:], masks], dim=1)
        whole = torch.gather(shuffled, 1, restore[:, :, None].expand(-1, -1, shuffled.shape[-1]))
        decoded = self.decoder_blocks(torch.cat([encoded[:, :1], whole], dim=1) + decoder_positions)
        predicted = self.decoder_pred(self.decoder_norm(decoded))[:, 1:].float()
        error = (predicted - _normalised(patchify(images, 16))).square().mean(dim=-1)
        mask = torch.ones_like(noise).scatter(1, order[:, :49], 0)
        return (error * mask).sum() / mask.sum()


def _normalised(target: Tensor) -> Tensor:
    variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
    return (target - mean) / (variance + 1e-6).sqrt()
