"""A few thousand photographs of ImageNet's size, cut from the ones that scikit-image and scikit-learn ship.

No download: both packages carry a handful of full photographs in their wheels. Crops of many sizes and places
become real JPEG files in one folder a subject, which is what `tarmac shard` takes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from PIL import Image

# Class folder -> files, relative to the package's folder. Drawings, scanned text and test patterns are left out.
PHOTOGRAPHS: dict[str, tuple[str, ...]] = {
    "astronaut": ("skimage/data/astronaut.png",),
    "bricks": ("skimage/data/brick.png",),
    "cameraman": ("skimage/data/camera.png",),
    "cat": ("skimage/data/chelsea.png",),
    "coffee": ("skimage/data/coffee.png",),
    "coins": ("skimage/data/coins.png",),
    "flower": ("sklearn/datasets/images/flower.jpg",),
    "galaxies": ("skimage/data/hubble_deep_field.jpg",),
    "grass": ("skimage/data/grass.png",),
    "gravel": ("skimage/data/gravel.png",),
    "moon": ("skimage/data/moon.png",),
    "motorcycle": ("skimage/data/motorcycle_left.png", "skimage/data/motorcycle_right.png"),
    "retina": ("skimage/data/retina.jpg",),
    "rocket": ("skimage/data/rocket.jpg",),
    "temple": ("sklearn/datasets/images/china.jpg",),
    "tissue": ("skimage/data/ihc.png",),
}
SIZES = ((500, 375), (500, 333), (375, 500), (500, 500))  # width, height: the common ones in ImageNet
SMALLEST_CROP = 0.4  # of the largest crop of the same shape


@dataclass(frozen=True)
class Crops:
    """Which crops of one photograph to write, and where."""

    source: Path
    folder: Path
    first: int
    """Number of the first crop in its folder."""
    num: int


def write_demo_photos(folder: Path, num_photos: int = 2000, num_processes: int = 2) -> Iterator[int]:
    """Write JPEGs as `<folder>/<class>/<class>_<number>.jpg`, the same bytes every time.

    Args:
        folder: made if absent; files of the same names are overwritten.
        num_photos: how many files in all, at least one a source photograph.
        num_processes: processes that cut and compress.

    Yields:
        The number of files written so far.

    Raises:
        FileNotFoundError: scikit-image or scikit-learn, or one of their photographs, is missing.
        ValueError: fewer files asked for than there are source photographs.
    """
    jobs = plan_crops(folder, num_photos)
    for name in PHOTOGRAPHS:
        (folder / name).mkdir(parents=True, exist_ok=True)
    written = 0
    # Spawned, so that a caller with threads (a server, a progress display) is safe.
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        for num in pool.map(_write_crops, jobs):
            written += num
            yield written


def plan_crops(folder: Path, num_photos: int) -> list[Crops]:
    """Share `num_photos` crops evenly among the source photographs."""
    sources = [(name, path) for name, paths in PHOTOGRAPHS.items() for path in paths]
    if num_photos < len(sources):
        raise ValueError(f"num_photos ({num_photos}) must be at least the {len(sources)} source photographs")
    jobs: list[Crops] = []
    next_in_class = dict.fromkeys(PHOTOGRAPHS, 0)
    for i, (name, path) in enumerate(sources):
        num = num_photos * (i + 1) // len(sources) - num_photos * i // len(sources)
        jobs.append(Crops(_source_path(path), folder / name, next_in_class[name], num))
        next_in_class[name] += num
    return jobs


def _source_path(path: str) -> Path:
    package, _, rest = path.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the demo photographs need the package {package}: pip install '.[demo]' in a checkout")
    source = Path(spec.submodule_search_locations[0]) / rest
    if not source.is_file():
        raise FileNotFoundError(f"{source} is not there: this release of {package} has other photographs")
    return source


def _write_crops(job: Crops) -> int:
    with Image.open(job.source) as image:
        photo = image.convert("L" if image.mode == "L" else "RGB")  # some ImageNet files are grayscale too
    for i in range(job.num):
        width, height = SIZES[i % len(SIZES)]
        box = crop_box(i // len(SIZES), photo.size, (width, height))
        crop = photo.resize((width, height), Image.Resampling.BICUBIC, box=box)
        path = job.folder / f"{job.folder.name}_{job.first + i:05d}.jpg"
        crop.save(path, quality=90)
    return job.num


def crop_box(i: int, photo_size: tuple[int, int], shape: tuple[int, int]) -> tuple[float, float, float, float]:
    """The `i`-th crop: left, top, right, bottom in pixels of the photograph.

    Sizes and places follow the Halton sequence, which covers the photograph evenly and never repeats.

    Args:
        i: number of the crop, from 0.
        photo_size: width and height of the photograph, in pixels.
        shape: width and height of the file to be made; only their ratio matters.

    Source:
        Halton 1964, Algorithm 247: Radical-inverse quasi-random point sequence.
    """
    photo_width, photo_height = photo_size
    largest = min(photo_width / shape[0], photo_height / shape[1])
    scale = largest * (1 - (1 - SMALLEST_CROP) * _halton(i, 2))
    width, height = shape[0] * scale, shape[1] * scale
    left = (photo_width - width) * _halton(i, 3)
    top = (photo_height - height) * _halton(i, 5)
    return left, top, min(left + width, photo_width), min(top + height, photo_height)


def _halton(i: int, base: int) -> float:
    value, digit = 0.0, 1.0
    while i:
        digit /= base
        value += digit * (i % base)
        i //= base
    return value
