"""DALI's own pipeline over the shards, and the limit: its ROI JPEG decode alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import nvidia.dali
from nvidia.dali.plugin.pytorch import DALIGenericIterator
from PIL import Image

from benchmarks.peers.contender import Data, Epoch
from benchmarks.peers.torch_loaders import MEAN, SCALE, SIZE, STD

dali: Any = nvidia.dali
fn, types = dali.fn, dali.types


def webdataset_reader(data: Data) -> Epoch:
    """`fn.readers.webdataset` with our `.idx` files, the fused decode and crop, cubic resize, normalised floats."""
    batches = _iterate(data)

    def epoch() -> Iterator[int]:
        for _ in range(data.num_batches):
            yield len(next(batches)[0]["images"])

    return epoch


def roi_decode(data: Data) -> Epoch:
    """Random boxes of JPEGs in memory, decoded and dropped."""
    paths = sorted(str(path) for path in Path(data.folder).glob("*/*"))
    encoded = [np.fromfile(path, np.uint8) for path in paths]
    boxes = [_box(path) for path in paths]
    order = np.random.default_rng(0).permutation(len(paths))[: data.num_batches * data.batch_size]
    pipe = dali.Pipeline(
        batch_size=data.batch_size,
        num_threads=data.num_cpus,
        device_id=None,
        prefetch_queue_depth=2,
        exec_dynamic=True,
        set_affinity=False,
    )
    batches = iter(np.resize(order, (10_000, data.batch_size)))

    def feed() -> tuple[list[Any], list[Any], list[Any]]:
        rows = next(batches)
        return [encoded[row] for row in rows], [boxes[row][0] for row in rows], [boxes[row][1] for row in rows]

    with pipe:
        images, start, shape = fn.external_source(source=feed, num_outputs=3)
        pipe.set_outputs(
            fn.decoders.image_slice(
                images, start=start, shape=shape, axis_names="HW", adjust_orientation=False, output_type=types.RGB
            )
        )
    pipe.build()

    def epoch() -> Iterator[int]:
        for _ in range(data.num_batches):
            yield len(pipe.run()[0])

    return epoch


def _box(path: str) -> tuple[Any, Any]:
    """RandomResizedCrop's first try that fits: (top, left), (height, width)."""
    with Image.open(path) as image:
        width, height = image.size
    rng = random.Random(path)
    for _ in range(10):
        area, ratio = width * height * rng.uniform(*SCALE), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            top, left = rng.randint(0, height - h), rng.randint(0, width - w)
            return np.array([top, left], np.int32), np.array([h, w], np.int32)
    return np.array([0, 0], np.int32), np.array([height, width], np.int32)


def _iterate(data: Data) -> Any:
    tars = data.tars()
    pipe = dali.Pipeline(
        batch_size=data.batch_size, num_threads=data.num_cpus, device_id=None, prefetch_queue_depth=2, seed=0
    )
    with pipe:
        encoded, labels = fn.readers.webdataset(
            paths=tars,
            index_paths=[tar.removesuffix(".tar") + ".idx" for tar in tars],
            ext=["jpg;jpeg", "cls"],
            missing_component_behavior="error",
            random_shuffle=True,
            initial_fill=1000,
            name="reader",
        )
        images = fn.decoders.image_random_crop(
            encoded, random_area=SCALE, random_aspect_ratio=(3 / 4, 4 / 3), num_attempts=10, output_type=types.RGB
        )
        images = fn.resize(images, size=(SIZE, SIZE), interp_type=types.INTERP_CUBIC, antialias=True)
        images = fn.crop_mirror_normalize(
            images,
            mirror=fn.random.coin_flip(),
            mean=[255 * value for value in MEAN],
            std=[255 * value for value in STD],
            dtype=types.FLOAT,
            output_layout="CHW",
        )
        pipe.set_outputs(images, fn.pad(labels))
    return DALIGenericIterator([pipe], ["images", "labels"], size=-1)
