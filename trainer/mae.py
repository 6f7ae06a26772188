"""The masked autoencoder: encode what is visible, predict what was removed.

There are two decoders: MAE's, in which visible and mask tokens attend to each other, and CrossMAE's, in which each mask
token looks for itself at what the encoder's blocks made of the visible patches.

Four savings change nothing in the result: only visible patches are embedded; the decoder works in the mask's own
order (visible tokens, then mask tokens), so nothing is shuffled back; its last block computes queries, MLP and
prediction for removed patches only; targets are gathered for removed patches only.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from pipeline.config import AugmentConfig
from trainer.config import ModelConfig, TrainConfig, num_predicted_patches
from trainer.initial import assign, initial_value
from trainer.vit import (
    Block,
    CrossBlock,
    LayerNorm,
    Linear,
    PatchEmbed,
    patchify,
    position_embedding,
    unpatchify,
)


class MAE(nn.Module):
    """A masked autoencoder with the parameter names of the published weights.

    Source:
        He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners", section 3 and appendix A.1; for the cross
        decoder Fu et al. 2024, "Rethinking Patch Dependence for Masked Autoencoders", section 3.
    """

    pos_embed: Tensor
    decoder_pos_embed: Tensor

    def __init__(self, model: ModelConfig, augment: AugmentConfig) -> None:
        super().__init__()
        self.patch_size = augment.patch_size
        self.grid = (augment.image_size[0] // self.patch_size, augment.image_size[1] // self.patch_size)
        self.norm_pix_loss = model.norm_pix_loss
        self.num_predicted = num_predicted_patches(model, augment)
        self.cross = model.decoder == "cross"
        self.masking_in_encoder = model.masking_in_encoder
        width, decoder_width = model.embed_dim, model.decoder_embed_dim

        self.patch_embed = PatchEmbed(self.patch_size, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        # Buffers, not frozen parameters: nothing to shard, gather or give to the optimizer.
        self.register_buffer("pos_embed", position_embedding(width, *self.grid))
        self.blocks = nn.ModuleList(Block(width, model.num_heads, model.mlp_ratio) for _ in range(model.depth))
        self.norm = LayerNorm(width)

        # In the encoder or in the decoder, wherever removed patches come in.
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width if self.masking_in_encoder else decoder_width))
        self.register_buffer("decoder_pos_embed", position_embedding(decoder_width, *self.grid))
        heads, decoder_depth = model.decoder_num_heads, range(model.decoder_depth)
        if self.cross:
            self.feature_weights = nn.Parameter(torch.zeros(model.decoder_depth, model.depth + 1))
            cross = (CrossBlock(decoder_width, width, heads, model.mlp_ratio) for _ in decoder_depth)
            self.decoder_blocks = nn.ModuleList(cross)
        else:
            self.decoder_embed = Linear(width, decoder_width)
            self.decoder_blocks = nn.ModuleList(Block(decoder_width, heads, model.mlp_ratio) for _ in decoder_depth)
        self.decoder_norm = LayerNorm(decoder_width)
        self.decoder_pred = Linear(decoder_width, 3 * self.patch_size**2)

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        kept_ids: Int[Tensor, "B K"],
        masked_ids: Int[Tensor, "B M"],
        *,
        predict: bool = False,
    ) -> Float[Tensor, " B"] | Float[Tensor, "B M P"]:
        """The loss of each image, or the prediction that the loss is about.

        Everything that touches a parameter is called from here, which is where FSDP2 gathers them.

        Args:
            images: normalised pixels, see `normalize`; float32 whatever the parameters' precision, as the target
                is made of them.
            kept_ids: the visible patches of each image, row-major in the grid.
            masked_ids: the removed ones, in random order; with `kept_ids`, each patch once.
            predict: return what is predicted for the removed patches in place of the loss.

        Returns:
            In float32, or wider if images are: the mean square error over each image's removed patches (the first
            ones, if `predict_ratio` says so), or the predictions in the order of `masked_ids`, patches laid out as by
            `patchify`.
        """
        patches = patchify(images.to(torch.promote_types(images.dtype, torch.float32)), self.patch_size)
        features = self._encode(_take(patches, kept_ids), kept_ids, masked_ids)
        if self.cross:
            masked_ids = masked_ids if predict else masked_ids[:, : self.num_predicted]
            predicted = self._decode_cross(features, masked_ids).to(patches.dtype)
        else:
            predicted = self._decode(features[-1], kept_ids, masked_ids).to(patches.dtype)
        if predict:
            return predicted
        target = _take(patches, masked_ids)  # [B, M, P]
        if self.norm_pix_loss:
            mean, std = _patch_statistics(target)
            target = (target - mean) / std
        return (predicted - target).square().mean(dim=(1, 2))

    @torch.no_grad()
    def reconstruct(
        self,
        images: Float[Tensor, "B C H W"],
        kept_ids: Int[Tensor, "B K"],
        masked_ids: Int[Tensor, "B M"],
    ) -> Float[Tensor, "B C H W"]:
        """The images with their removed patches as the model predicts them, in the same normalised pixel space.

        With `norm_pix_loss` a prediction lacks its patch's mean and contrast; they are taken from the original
        patch.
        """
        predicted = self(images, kept_ids, masked_ids, predict=True)
        patches = patchify(images, self.patch_size)
        if self.norm_pix_loss:
            mean, std = _patch_statistics(_take(patches, masked_ids))
            predicted = predicted * std + mean
        # Visible patches stay: no loss ever trained what the decoder says about them.
        patches = patches.scatter(1, _wide(masked_ids, patches.shape[-1]), predicted)
        return unpatchify(patches, self.patch_size, rows=self.grid[0])

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter and buffer, also those that `to_empty` left undefined.

        Each parameter has a generator of its own, keyed by seed and name: no value depends on torch's global
        state, on the device, on how the model is sharded, or on which other parameters there are.
        """
        for embedding in (self.pos_embed, self.decoder_pos_embed):
            embedding.copy_(position_embedding(embedding.shape[-1], *self.grid))
        for name, parameter in self.named_parameters():
            assign(parameter, initial_value(name, parameter.shape, seed, patch_values=3 * self.patch_size**2))

    def _encode(self, patches: Tensor, kept_ids: Tensor, masked_ids: Tensor) -> list[Tensor]:
        """Visible patches [B, K, P] -> the tokens before and after each block, the last ones normalised.

        Only the last ones for a decoder that needs no others. Tokens are the class token, the visible patches, and with
        `masking_in_encoder` the removed ones: [B, T, D].
        """
        tokens = self.patch_embed(patches)
        positions = self.pos_embed.to(tokens.dtype)
        class_token = self.cls_token.to(tokens.dtype) + positions[:, :1]
        parts = [class_token.expand(len(tokens), -1, -1), tokens + positions[0, 1:][kept_ids]]
        if self.masking_in_encoder:
            parts.append(self.mask_token.to(tokens.dtype) + positions[0, 1:][masked_ids])
        tokens = torch.cat(parts, dim=1)
        features = [tokens]
        for block in self.blocks:
            tokens = block(tokens)
            features.append(tokens)
        normalised = self.norm(tokens)
        return [*features[:-1], normalised] if self.cross else [normalised]

    def _decode(self, latent: Tensor, kept_ids: Tensor, masked_ids: Tensor) -> Tensor:
        """Latent [B, T, D] -> predictions [B, M, P] of the removed patches."""
        embedded = self.decoder_embed(latent)
        positions = self.decoder_pos_embed.to(embedded.dtype)
        if self.masking_in_encoder:
            places = torch.cat([kept_ids, masked_ids], dim=1) + 1
            tokens = torch.cat([embedded[:, :1] + positions[:, :1], embedded[:, 1:] + positions[0][places]], dim=1)
        else:
            class_token = embedded[:, :1] + positions[:, :1]
            visible = embedded[:, 1:] + positions[0, 1:][kept_ids]
            removed = self.mask_token.to(embedded.dtype) + positions[0, 1:][masked_ids]  # [B, M, decoder D]
            tokens = torch.cat([class_token, visible, removed], dim=1)
        *earlier, last = self.decoder_blocks
        for block in earlier:
            tokens = block(tokens)
        tokens = last(tokens, num_queries=masked_ids.shape[1])
        predicted: Tensor = self.decoder_pred(self.decoder_norm(tokens))
        return predicted

    def _decode_cross(self, features: list[Tensor], masked_ids: Tensor) -> Tensor:
        """The encoder's tokens at all depths, each [B, T, D] -> predictions [B, M, P] of removed patches."""
        stacked = torch.stack(features)  # [1 + depth, B, T, D]
        contexts = (self.feature_weights.to(stacked.dtype) @ stacked.flatten(1)).view(-1, *stacked.shape[1:])
        positions = self.decoder_pos_embed.to(stacked.dtype)
        tokens = self.mask_token.to(stacked.dtype) + positions[0, 1:][masked_ids]  # [B, M, decoder D]
        for block, context in zip(self.decoder_blocks, contexts, strict=True):
            tokens = block(tokens, context)
        predicted: Tensor = self.decoder_pred(self.decoder_norm(tokens))
        return predicted


def build_mae(config: TrainConfig) -> MAE:
    """The model that a run starts from: the same weights on every rank of every world size.

    Args:
        config: `model` and `data.augment` shape it, `data.seed` keys its initial weights.

    Returns:
        float32 on the CPU. Torch's global generator is neither read nor advanced.
    """
    with torch.device("meta"):
        model = MAE(config.model, config.data.augment)
    model.to_empty(device="cpu")
    model.init_weights(config.data.seed)
    return model


def normalize(
    images: UInt8[Tensor, "B C H W"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Tensor, "B C H W"]:
    """Pixels in 0..255 to float32 with each channel's `mean` subtracted and divided by its `std` (of [0, 1] images)."""
    # Channel by channel with Python numbers: a tensor made of them would be copied to the GPU, and wait for it.
    channels = [
        channel.float().mul_(1 / (255 * scale)).sub_(shift / scale)
        for channel, shift, scale in zip(images.unbind(1), mean, std, strict=True)
    ]
    return torch.stack(channels, dim=1)


def _wide(ids: Tensor, width: int) -> Tensor:
    return ids[:, :, None].expand(-1, -1, width)  # [B, K] -> [B, K, P]


def _take(patches: Tensor, ids: Tensor) -> Tensor:
    return patches.gather(1, _wide(ids, patches.shape[-1]))  # [B, N, P] -> [B, K, P]


def _patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each patch [B, N, 1], from the unbiased variance + 1e-6."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True, correction=1)
    return mean, (variance + 1e-6).sqrt()
