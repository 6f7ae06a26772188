"""The same masked autoencoder as others have built it, with our weights: from images and noise to a loss."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.peers.step_models import AUGMENT, SIZES, Spec, our_config
from pipeline.config import num_kept_patches, num_patches
from trainer.config import ModelConfig
from trainer.mae import build_mae
from trainer.vit import NORM_EPS, patchify, position_embedding

PATCH, GRID, NUM_PATCHES, NUM_KEPT = AUGMENT.patch_size, (14, 14), num_patches(AUGMENT), num_kept_patches(AUGMENT)


def build_peer(spec: Spec) -> nn.Module:
    """A peer's model; called with images and noise it gives the loss, a scalar."""
    build, renamed = {
        "transformers": (Transformers, transformers_names),
        "lightly": (Lightly, lightly_names),
        "timm": (Timm, dict),
    }[spec.builder]
    model = build(SIZES[spec.size])
    model.load_state_dict(renamed(build_mae(our_config(spec)).state_dict()))
    return model


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
                mask_ratio=AUGMENT.mask_ratio,
                norm_pix_loss=True,
                layer_norm_eps=NORM_EPS,
            )
        )

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        loss: Tensor = self.model(images, noise=noise).loss
        return loss


class Lightly(nn.Module):
    """Lightly's modules, put together as its own MAE benchmark does."""

    def __init__(self, size: ModelConfig) -> None:
        super().__init__()
        from lightly.models.modules import MaskedVisionTransformerDecoderTIMM, MaskedVisionTransformerTIMM
        from timm.models.vision_transformer import VisionTransformer

        vit = VisionTransformer(embed_dim=size.embed_dim, depth=size.depth, num_heads=size.num_heads, num_classes=0)
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        # Its examples never use it, and an unused weight gets no gradient.
        self.backbone.mask_token.requires_grad_(False)
        self.decoder_embed = nn.Linear(size.embed_dim, size.decoder_embed_dim)
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            num_patches=NUM_PATCHES,
            embed_dim=size.decoder_embed_dim,
            depth=size.decoder_depth,
            num_heads=size.decoder_num_heads,
        )
        self.prediction_head = nn.Linear(size.decoder_embed_dim, 3 * PATCH**2)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        from lightly.models import utils

        order = noise.argsort(dim=1) + 1  # 0 is the class token
        masked = order[:, NUM_KEPT:]
        kept = torch.cat([torch.zeros_like(order[:, :1]), order[:, :NUM_KEPT]], dim=1)
        embedded = self.decoder_embed(self.backbone.encode(images=images, idx_keep=kept))
        tokens = embedded.new_zeros(len(images), NUM_PATCHES + 1, embedded.shape[-1])
        tokens = utils.set_at_index(tokens, kept, embedded)
        decoded = self.decoder(tokens, idx_mask=masked)
        predicted = self.prediction_head(utils.get_at_index(decoded, masked))
        target = utils.get_at_index(utils.patchify(images, PATCH), masked - 1)
        return nn.functional.mse_loss(predicted.float(), utils.normalize_mean_var(target))


class Timm(nn.Module):
    """timm's blocks put together as the paper's figure 1: embed all, drop, encode, unshuffle, decode all."""

    def __init__(self, size: ModelConfig) -> None:
        super().__init__()
        from timm.layers import PatchEmbed
        from timm.models.vision_transformer import Block

        width, decoder_width = size.embed_dim, size.decoder_embed_dim
        norm = partial(nn.LayerNorm, eps=NORM_EPS)
        self.patch_embed = PatchEmbed(AUGMENT.image_size[0], PATCH, 3, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.register_buffer("pos_embed", position_embedding(width, *GRID))
        self.register_buffer("decoder_pos_embed", position_embedding(decoder_width, *GRID))
        self.blocks, self.decoder_blocks = (
            nn.Sequential(*(Block(dim, heads, 4, qkv_bias=True, norm_layer=norm) for _ in range(depth)))
            for dim, heads, depth in (
                (width, size.num_heads, size.depth),
                (decoder_width, size.decoder_num_heads, size.decoder_depth),
            )
        )
        self.norm, self.decoder_norm = norm(width), norm(decoder_width)
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.decoder_pred = nn.Linear(decoder_width, 3 * PATCH**2)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        positions, decoder_positions = self.get_buffer("pos_embed"), self.get_buffer("decoder_pos_embed")
        order = noise.argsort(dim=1)
        tokens = self.patch_embed(images) + positions[:, 1:]
        kept = torch.gather(tokens, 1, order[:, :NUM_KEPT, None].expand(-1, -1, tokens.shape[-1]))
        first = (self.cls_token + positions[:, :1]).expand(len(images), -1, -1)
        encoded = self.decoder_embed(self.norm(self.blocks(torch.cat([first, kept], dim=1))))
        masks = self.mask_token.expand(len(images), NUM_PATCHES - NUM_KEPT, -1).to(encoded.dtype)
        shuffled = torch.cat([encoded[:, 1:], masks], dim=1)
        restore = order.argsort(dim=1)
        whole = torch.gather(shuffled, 1, restore[:, :, None].expand(-1, -1, shuffled.shape[-1]))
        decoded = self.decoder_blocks(torch.cat([encoded[:, :1], whole], dim=1) + decoder_positions)
        predicted = self.decoder_pred(self.decoder_norm(decoded))[:, 1:].float()
        target = patchify(images, PATCH)
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
        error = (predicted - (target - mean) / (variance + 1e-6).sqrt()).square().mean(dim=-1)
        mask = torch.ones_like(noise).scatter(1, order[:, :NUM_KEPT], 0)
        return (error * mask).sum() / mask.sum()


def transformers_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the names that transformers gives them."""
    renamed = {}
    for name, tensor in state.items():
        if name.startswith(("blocks.", "decoder_blocks.")):
            stack, index, rest = name.split(".", 2)
            prefix = f"model.{'vit.layers' if stack == 'blocks' else 'decoder.decoder_layers'}.{index}"
            rest = rest.replace("norm1", "layernorm_before").replace("norm2", "layernorm_after")
            if rest.startswith("attn.qkv"):
                for part, chunk in zip("qkv", tensor.chunk(3), strict=True):
                    renamed[f"{prefix}.attention.{part}_proj.{rest.rsplit('.', 1)[1]}"] = chunk
                continue
            renamed[f"{prefix}.{rest.replace('attn.proj', 'attention.o_proj')}"] = tensor
        elif name.startswith(("decoder_", "mask_token")):
            renamed[f"model.decoder.{name}"] = tensor
        else:
            place = name.replace("patch_embed.proj", "embeddings.patch_embeddings.projection")
            place = place.replace("pos_embed", "embeddings.position_embeddings")
            place = place.replace("cls_token", "embeddings.cls_token").replace("norm.", "layernorm.")
            renamed[f"model.vit.{place}"] = tensor
    return renamed


def lightly_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the names that lightly's modules give them."""
    places = {
        "decoder_blocks.": "decoder.blocks.",
        "decoder_norm.": "decoder.norm.",
        "decoder_pos_embed": "decoder.pos_embed",
        "decoder_pred.": "prediction_head.",
        "decoder_embed.": "decoder_embed.",
        "mask_token": "decoder.mask_token",
    }
    renamed = {}
    for name, tensor in state.items():
        place = next((place for place in places if name.startswith(place)), None)
        new = f"backbone.vit.{name}" if place is None else name.replace(place, places[place], 1)
        renamed[new] = tensor
    # The encoder has one too, for other methods.
    return renamed | {"backbone.mask_token": torch.zeros_like(state["cls_token"])}
