"""Our augmented pixels against PIL's bicubic crop of the same boxes, and torchvision's beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode, functional

from benchmarks.peers.torch_loaders import decode
from pipeline.augment import draw_crops
from pipeline.config import AugmentConfig
from pipeline.decode import Decoder


def differences(folder: str, num_images: int) -> dict[str, float]:
    """Mean absolute difference to PIL, in units of the full range, of us and of torchvision on tensors.

    PIL crops and resizes as the official recipe does: one call, bicubic, antialiased.
    """
    config = AugmentConfig()
    paths = sorted(Path(folder).glob("*/*"))[:num_images]
    encoded = [path.read_bytes() for path in paths]
    sizes = np.array([Image.open(path).size for path in paths])
    zeros, ids = np.zeros(len(paths), np.int64), np.arange(len(paths))
    crops = draw_crops(config, 0, zeros, ids, sizes[:, 1], sizes[:, 0])
    decoder = Decoder(config, device="cpu", num_threads=2)
    ours = decoder.decode(encoded, crops)
    decoder.close()
    sums = {"ours": 0.0, "torchvision v2 on tensors": 0.0}
    for row, path in enumerate(paths):
        top, left, height, width = (int(side[row]) for side in (crops.top, crops.left, crops.height, crops.width))
        with Image.open(path) as image:
            crop = image.convert("RGB").crop((left, top, left + width, top + height))
        pil = torch.from_numpy(np.asarray(crop.resize(config.image_size, Image.Resampling.BICUBIC)).copy())
        pil = pil.permute(2, 0, 1)
        if crops.flip[row]:
            pil = pil.flip(2)
        theirs = functional.resized_crop(
            decode(encoded[row]), top, left, height, width, list(config.image_size), InterpolationMode.BICUBIC, True
        )
        theirs = theirs.flip(2) if crops.flip[row] else theirs
        for name, images in (("ours", ours[row]), ("torchvision v2 on tensors", theirs)):
            sums[name] += float((images.float() - pil.float()).abs().mean()) / 255
    return {name: value / len(paths) for name, value in sums.items()}
