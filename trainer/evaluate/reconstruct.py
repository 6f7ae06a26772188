"""Pictures of what a model makes of masked images."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pipeline.config import AugmentConfig, DataConfig
from trainer.mae import MAE, normalize
from trainer.vit import patchify, unpatchify

COLUMNS = ("masked", "reconstruction", "reconstruction + visible", "original")
SMALLEST_CELL = 160  # pixels; smaller images are magnified by whole numbers, so that their patches stay sharp
GAP = 6
HEADER = 26
HIDDEN = 128  # grey level of a patch that is not shown


def whole_image_config(data: DataConfig, num_samples: int, seed: int) -> DataConfig:
    """A loader's config whose first batch holds `num_samples` images, each in the largest crop of the model's shape.

    Args:
        data: of the run: image size, patch size and mask ratio are kept.
        num_samples: images of the batch.
        seed: chooses the images and their masks.
    """
    height, width = data.augment.image_size
    whole = replace(
        data.augment, crop_scale=(1.0, 1.0), crop_ratio=(width / height, width / height), flip_probability=0.0
    )
    return replace(
        data,
        augment=whole,
        global_batch_size=num_samples,
        crops_per_image=1,
        num_lanes=num_samples,
        seed=seed,
        micro_batch_size=None,
        decode_device="cpu",  # a picture of a GPU's run may be drawn without one
    )


@torch.no_grad()
def reconstruct_images(
    model: MAE,
    augment: AugmentConfig,
    images: UInt8[Tensor, "B C H W"],
    kept_ids: Int[Tensor, "B K"],
    masked_ids: Int[Tensor, "B M"],
) -> tuple[UInt8[Tensor, "B C H W"], UInt8[Tensor, "B C H W"], UInt8[Tensor, "B C H W"]]:
    """What the model sees, what it predicts, and both together.

    Args:
        model: on any device, sharded or not (then on every rank).
        augment: mean, std and patch size that the model was trained with.
        images: as the loader yields them.
        kept_ids: visible patches.
        masked_ids: removed patches.

    Returns:
        Three batches on the CPU: the visible patches on grey, the predicted ones on grey, and predicted and visible
        ones. With `norm_pix_loss`, mean and contrast of each predicted patch are the original's.
    """
    device = next(model.parameters()).device
    pixels = normalize(images.to(device), augment.mean, augment.std)
    both = _to_bytes(model.reconstruct(pixels, kept_ids.to(device), masked_ids.to(device)), augment)

    removed = _patch_mask(images.cpu(), masked_ids.cpu(), augment.patch_size)  # [B, 1, H, W]
    hidden = torch.full_like(both, HIDDEN)
    return torch.where(removed, hidden, both), torch.where(removed, both, hidden), both


def draw_reconstructions(
    model: MAE,
    augment: AugmentConfig,
    images: UInt8[Tensor, "B C H W"],
    kept_ids: Int[Tensor, "B K"],
    masked_ids: Int[Tensor, "B M"],
) -> Image.Image:
    """A picture with a row for each image: masked | reconstruction | reconstruction + visible | original.

    Args: as in `reconstruct_images`.
    """
    columns = (*reconstruct_images(model, augment, images, kept_ids, masked_ids), images.cpu())
    batch, _, height, width = images.shape
    zoom = -(-SMALLEST_CELL // width)
    cell_height, cell_width = height * zoom, width * zoom
    canvas = Image.new(
        "RGB",
        (GAP + len(columns) * (cell_width + GAP), HEADER + batch * (cell_height + GAP)),
        "white",
    )
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13)
    for j, (title, column) in enumerate(zip(COLUMNS, columns, strict=True)):
        left = GAP + j * (cell_width + GAP)
        pen.text((left + cell_width / 2, HEADER / 2), title, fill="black", font=font, anchor="mm")
        for i, image in enumerate(column):
            cell = Image.fromarray(image.permute(1, 2, 0).numpy())
            cell = cell.resize((cell_width, cell_height), Image.Resampling.NEAREST)
            canvas.paste(cell, (left, HEADER + i * (cell_height + GAP)))
    return canvas


def _to_bytes(pixels: Float[Tensor, "B C H W"], augment: AugmentConfig) -> UInt8[Tensor, "B C H W"]:
    """The inverse of `normalize`, rounded, on the CPU."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (augment.mean, augment.std))
    return ((pixels.float().cpu() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def _patch_mask(images: Tensor, masked_ids: Tensor, patch_size: int) -> Tensor:
    """True on the pixels of the patches `masked_ids` [B, M]: [B, 1, H, W]."""
    patches = patchify(torch.zeros_like(images[:, :1], dtype=torch.bool), patch_size)
    patches.scatter_(1, masked_ids[:, :, None].expand(-1, -1, patches.shape[-1]), True)
    return unpatchify(patches, patch_size, rows=images.shape[2] // patch_size)
