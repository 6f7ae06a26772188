"""What is done to one image after its crop: RandAugment and random erasing, drawn from a generator of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageOps

from pipeline.hashing import hash64, stream_key

Fill = tuple[int, int, int]
_Operation = Callable[[Image.Image, float, Fill], Image.Image]

_STRONGEST = 10.0
_NUM_OPERATIONS = 2
_OPERATION_PROBABILITY = 0.5
_ERASED_AREA = (0.02, 1 / 3)
_ERASED_RATIO = (0.3, 1 / 0.3)
_ERASE_ATTEMPTS = 10


def keyed_generator(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """Random numbers for one (seed, purpose, counters), the same wherever and whenever they are drawn."""
    return np.random.Generator(np.random.Philox(key=int(hash64(stream_key(seed, purpose), *counters))))


def _enhanced(kind: Any) -> _Operation:
    return lambda image, strength, fill: kind(image).enhance(max(0.1, 1 + 0.9 * strength))


def _moved(matrix: Callable[[Image.Image, float], tuple[float, ...]]) -> _Operation:
    return lambda image, strength, fill: image.transform(
        image.size,
        Image.Transform.AFFINE,
        matrix(image, strength),
        resample=Image.Resampling.BICUBIC,
        fillcolor=fill,
    )


def _rotate(image: Image.Image, strength: float, fill: Fill) -> Image.Image:
    return image.rotate(30 * strength, resample=Image.Resampling.BICUBIC, fillcolor=fill)


def _posterize(image: Image.Image, strength: float, fill: Fill) -> Image.Image:
    return ImageOps.posterize(image, max(1, 4 - int(abs(strength) * 4)))  # no bit at all would be a black image


def _solarize(image: Image.Image, strength: float, fill: Fill) -> Image.Image:
    return ImageOps.solarize(image, 256 - int(abs(strength) * 256))


def _solarize_add(image: Image.Image, strength: float, fill: Fill) -> Image.Image:
    more = int(abs(strength) * 110)
    return image.point([min(255, value + more) if value < 128 else value for value in range(256)] * 3)


OPERATIONS: dict[str, _Operation] = {
    "AutoContrast": lambda image, strength, fill: ImageOps.autocontrast(image),
    "Equalize": lambda image, strength, fill: ImageOps.equalize(image),
    "Invert": lambda image, strength, fill: ImageOps.invert(image),
    "Rotate": _rotate,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
    "Color": _enhanced(ImageEnhance.Color),
    "Contrast": _enhanced(ImageEnhance.Contrast),
    "Brightness": _enhanced(ImageEnhance.Brightness),
    "Sharpness": _enhanced(ImageEnhance.Sharpness),
    "ShearX": _moved(lambda image, strength: (1, 0.3 * strength, 0, 0, 1, 0)),
    "ShearY": _moved(lambda image, strength: (1, 0, 0, 0.3 * strength, 1, 0)),
    "TranslateX": _moved(lambda image, strength: (1, 0, 0.45 * strength * image.width, 0, 1, 0)),
    "TranslateY": _moved(lambda image, strength: (1, 0, 0, 0, 1, 0.45 * strength * image.height)),
}
"""By name: (image, strength in [-1, 1], colour of what comes in from outside) -> image. A sign turns a movement or a
change of colour round, and means nothing to the others; each does more, the stronger it is."""


def draw_operations(generator: np.random.Generator, magnitude: float, std: float) -> list[tuple[str, float]]:
    """The operations of one image, in order, with their strengths.

    Source:
        Cubuk et al. 2020, "RandAugment", with the strengths that timm's `rand-m9-mstd0.5-inc1` has.
    """
    names, drawn = list(OPERATIONS), []
    for _ in range(_NUM_OPERATIONS):
        name = names[int(generator.integers(len(names)))]
        made = generator.random() < _OPERATION_PROBABILITY
        strength = float(np.clip(generator.normal(magnitude, std), 0, _STRONGEST)) / _STRONGEST
        sign = -1 if generator.random() < 0.5 else 1
        if made:
            drawn.append((name, sign * strength))
    return drawn


def randaugment(
    pixels: npt.NDArray[np.uint8], generator: np.random.Generator, magnitude: float, std: float, fill: Fill
) -> npt.NDArray[np.uint8]:
    """Apply two random operations to an image [H, W, 3]."""
    operations = draw_operations(generator, magnitude, std)
    if not operations:
        return pixels
    image = Image.fromarray(pixels)
    for name, strength in operations:
        image = OPERATIONS[name](image, strength, fill)
    return np.asarray(image)


def draw_rectangle(generator: np.random.Generator, height: int, width: int) -> tuple[slice, slice] | None:
    """Rows and columns to erase; None in the rare case that no rectangle fits.

    Source:
        Zhong et al. 2020, "Random erasing data augmentation", algorithm 1.
    """
    for _ in range(_ERASE_ATTEMPTS):
        area = generator.uniform(*_ERASED_AREA) * height * width
        ratio = math.exp(generator.uniform(math.log(_ERASED_RATIO[0]), math.log(_ERASED_RATIO[1])))
        rows, columns = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if rows < height and columns < width:
            top, left = int(generator.integers(height - rows + 1)), int(generator.integers(width - columns + 1))
            return slice(top, top + rows), slice(left, left + columns)
    return None


def erase(pixels: npt.NDArray[np.float32], generator: np.random.Generator, probability: float) -> None:
    """Replace a random rectangle of a normalised image [3, H, W] by normal noise, with that probability."""
    if generator.random() >= probability:
        return
    rectangle = draw_rectangle(generator, *pixels.shape[1:])
    if rectangle is not None:
        part = pixels[:, rectangle[0], rectangle[1]]
        part[...] = generator.standard_normal(part.shape, dtype=np.float32)
