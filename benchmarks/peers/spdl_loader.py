"""SPDL's pipeline of threads with FFmpeg's decoder and filters."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import spdl.io
from spdl.pipeline import PipelineBuilder

from benchmarks.peers.contender import Data, Epoch
from benchmarks.peers.torch_loaders import SCALE, SIZE


def spdl_images(data: Data) -> Epoch:
    """Paths, aggregated to batches, decoded a batch a thread; crop, bicubic scale and flip are FFmpeg filters."""
    paths = sorted(str(path) for path in Path(data.folder).glob("*/*"))
    pipeline = (
        PipelineBuilder()
        .add_source(_shuffled_for_ever(paths))
        .aggregate(data.batch_size, drop_last=True)
        .pipe(decode_batch, concurrency=data.num_cpus)
        .add_sink(2)
        .build(num_threads=data.num_cpus)
    )
    pipeline.start()

    def epoch() -> Iterator[int]:
        for _ in range(data.num_batches):
            yield len(pipeline.get_item())

    return epoch


def decode_batch(paths: list[str]) -> Any:
    """Images uint8 [B, 3, H, W]."""
    frames = []
    for path in paths:
        packets = spdl.io.demux_image(path)
        frames.append(spdl.io.decode_packets(packets, filter_desc=_filters(packets.width, packets.height)))
    return spdl.io.to_torch(spdl.io.convert_frames(frames)).permute(0, 3, 1, 2)


def _filters(width: int, height: int) -> str:
    crop = ""
    for _ in range(10):
        area = width * height * random.uniform(*SCALE)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            crop = f"crop=w={w}:h={h}:x={random.randint(0, width - w)}:y={random.randint(0, height - h)},"
            break
    flip = "hflip," if random.random() < 0.5 else ""
    return f"{crop}scale=w={SIZE}:h={SIZE}:flags=bicubic,{flip}format=pix_fmts=rgb24"


def _shuffled_for_ever(paths: list[str]) -> Iterator[str]:
    while True:
        yield from random.sample(paths, len(paths))
