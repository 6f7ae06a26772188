"""A pretrained encoder with a linear head: fine-tuned as a whole, or probed."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.config import AugmentConfig
from trainer.evaluate.config import ClassifierConfig
from trainer.initial import assign, initial_value, keyed_generator
from trainer.vit import NORM_EPS, Block, PatchEmbed, patchify, position_embedding

_PROBE_NORM_EPS = 1e-6
_PROBE_NORM_MOMENTUM = 0.1


class Classifier(nn.Module):
    """A vision transformer that names an image's class, with the parameter names of timm's.

    Nothing in it is random: drop path comes in as `branch_scales`.

    Source:
        He et al. 2022, appendix A.1: fine-tuning sees the mean of the patches' tokens or the class token, linear
        probing the class token through a batch norm without affine parameters.
    """

    def __init__(self, model: ClassifierConfig, augment: AugmentConfig) -> None:
        super().__init__()
        assert model.num_classes is not None
        width = model.embed_dim
        self.patch_size = augment.patch_size
        self.grid = (augment.image_size[0] // self.patch_size, augment.image_size[1] // self.patch_size)
        self.pool, self.frozen, self.head_std = model.pool, model.frozen_encoder, model.head_std

        self.patch_embed = PatchEmbed(self.patch_size, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        # Fixed in pretraining, a parameter here: fine-tuning moves it, as it moves all that it was given.
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], width))
        self.blocks = nn.ModuleList(Block(width, model.num_heads, model.mlp_ratio) for _ in range(model.depth))
        if self.pool == "mean":
            self.fc_norm = nn.LayerNorm(width, eps=NORM_EPS)
        else:
            self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        if self.frozen:
            self.requires_grad_(False)
            self.head_norm = BatchNorm(width)
        self.head = nn.Linear(width, model.num_classes)

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        branch_scales: Float[Tensor, "B L 2"] | None = None,
        num_parts: int = 1,
    ) -> Float[Tensor, "B classes"]:
        """The score of each class.

        Args:
            images: normalised pixels.
            branch_scales: of each block's attention and MLP, see `Block`; None leaves nothing out.
            num_parts: a frozen encoder takes the images in this many parts, for less memory. The same on every rank.
        """
        if self.frozen:
            with torch.no_grad():
                parts = [self._features(part, None) for part in images.tensor_split(num_parts)]
            features = self.head_norm(torch.cat(parts).float())
        else:
            features = self._features(images, branch_scales)
        scores: Tensor = self.head(features.to(self.head.weight.dtype))
        return scores.float()

    def _features(self, images: Tensor, branch_scales: Tensor | None) -> Tensor:
        """Images [B, C, H, W] -> what the head is about [B, D]."""
        patches = self.patch_embed(patchify(images, self.patch_size))
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.pos_embed
        for number, block in enumerate(self.blocks):
            tokens = block(tokens, branch_scales=None if branch_scales is None else branch_scales[:, number])
        if self.pool == "mean":
            features: Tensor = self.fc_norm(tokens[:, 1:].mean(dim=1))
        else:
            features = self.norm(tokens)[:, 0]
        return features

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter and buffer: an encoder as pretraining begins with, and a head that knows nothing."""
        for name, parameter in self.named_parameters():
            if name == "pos_embed":
                value = position_embedding(parameter.shape[-1], *self.grid)
            elif name == "head.weight":
                value = torch.empty(parameter.shape, device="cpu")
                value.normal_(std=self.head_std, generator=keyed_generator(name, seed))
            else:
                value = initial_value(name, parameter.shape, seed, patch_values=3 * self.patch_size**2)
            assign(parameter, value)
        if self.frozen:
            self.head_norm.reset()

    def pretrained_names(self) -> set[str]:
        """Parameters that a pretraining checkpoint has: all but the head, the norm before it, and the positions."""
        ours = ("pos_embed", "fc_norm.", "head.")
        return {name for name, _ in self.named_parameters() if not name.startswith(ours)}

    @torch.no_grad()
    def place_positions(self, pretrained_grid: tuple[int, int]) -> None:
        """Take the position embedding from pretraining on images of another size, in patches.

        A patch gets the embedding of its place in the whole image, between those of the pretraining's patches: what
        the encoder learned about places then holds. A larger sin-cos grid would have places that it never met.

        Source:
            Dosovitskiy et al. 2021, section 3.2; bicubic as in the published fine-tuning at 448 pixels.
        """
        embedding = position_embedding(self.pos_embed.shape[-1], *pretrained_grid)
        if pretrained_grid != self.grid:
            places = embedding[:, 1:].transpose(1, 2).reshape(1, -1, *pretrained_grid)  # [1, D, rows, columns]
            places = F.interpolate(places, size=self.grid, mode="bicubic", align_corners=False)
            embedding = torch.cat([embedding[:, :1], places.flatten(2).transpose(1, 2)], dim=1)
        assign(self.pos_embed, embedding)


class BatchNorm(nn.Module):
    """Batch norm without affine parameters, over the images of all ranks.

    What it is given needs no gradient, so the statistics need none either.

    Source:
        Ioffe & Szegedy 2015; before a linear probe Doersch et al. 2015.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def reset(self) -> None:
        """Forget every batch."""
        self.running_mean.zero_()
        self.running_var.fill_(1.0)

    @torch.no_grad()
    def forward(self, features: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """Normalise by the batch's statistics in training, and by their running means afterwards."""
        mean, variance = self._batch_statistics(features) if self.training else (self.running_mean, self.running_var)
        return (features - mean) * (variance + _PROBE_NORM_EPS).rsqrt()

    def _batch_statistics(self, features: Tensor) -> tuple[Tensor, Tensor]:
        count = torch.full((1,), len(features), dtype=torch.float64, device=features.device)
        wide = features.double()
        total = _over_ranks(torch.cat([wide.sum(dim=0), count]))
        mean, num = total[:-1] / total[-1], total[-1]
        variance = _over_ranks((wide - mean).square().sum(dim=0)) / num
        unbiased = variance * num / (num - 1).clamp(min=1)
        self.running_mean.lerp_(mean.float(), _PROBE_NORM_MOMENTUM)
        self.running_var.lerp_(unbiased.float(), _PROBE_NORM_MOMENTUM)
        return mean.float(), variance.float()


def _over_ranks(sums: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums
