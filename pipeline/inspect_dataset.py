"""A dataset in numbers, and a sheet of its images."""

from __future__ import annotations

import io
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from pipeline.config import require
from pipeline.dataset import Dataset
from pipeline.manifest import ShardIndex, read_idx, read_index

CELL_PIXELS = 160
CAPTION_PIXELS = 16

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Spread:
    """Smallest, middle and largest of some numbers."""

    min: int
    median: int
    max: int


@dataclass(frozen=True)
class DatasetSummary:
    """What `tarmac inspect` prints. Sizes in bytes, heights and widths in pixels as stored."""

    url: str
    num_samples: int
    num_bytes: int
    num_shards: int
    shard_bytes: Spread
    shard_samples: Spread
    image_bytes: Spread
    heights: Spread
    widths: Spread
    formats: dict[str, int]
    num_classes: int | None
    class_samples: Spread | None
    smallest_class: str | None
    largest_class: str | None
    num_bad_samples: int
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def inspect_dataset(dataset: Dataset, *, num_threads: int = 8) -> DatasetSummary:
    """Read all indexes and add up what they say.

    Raises:
        ValueError: no threads.
        ShardError: an index is missing or damaged.
        StoreError: the store does not answer or refuses us.
    """
    require(num_threads >= 1, f"num_threads ({num_threads}) must be at least 1")
    manifest = dataset.manifest
    num_classes = None if manifest.classes is None else len(manifest.classes)
    heights, widths, labels = (np.zeros(0, np.int64) for _ in range(3))
    image_kib = np.zeros(0, np.int64)
    smallest, largest = 2**63 - 1, 0
    formats: Counter[str] = Counter()
    with ThreadPoolExecutor(num_threads) as threads:
        for index, names in threads.map(lambda shard: _read(dataset, shard), range(len(manifest.shards))):
            heights = _added(heights, index.height)
            widths = _added(widths, index.width)
            image_kib = _added(image_kib, index.num_bytes // 1024)
            smallest = min(smallest, int(index.num_bytes.min()))
            largest = max(largest, int(index.num_bytes.max()))
            formats += names
            if num_classes is not None:
                labels = _added(labels, index.label)
    if num_classes is not None:
        labels = np.pad(labels, (0, num_classes - len(labels)))
    named = manifest.classes or ()
    return DatasetSummary(
        url=str(dataset.store),
        num_samples=manifest.num_samples,
        num_bytes=manifest.num_bytes,
        num_shards=len(manifest.shards),
        shard_bytes=_spread(np.array([shard.num_bytes for shard in manifest.shards])),
        shard_samples=_spread(dataset.samples_per_shard),
        image_bytes=Spread(smallest, max(smallest, _spread_of_counts(image_kib).median * 1024), largest),
        heights=_spread_of_counts(heights),
        widths=_spread_of_counts(widths),
        formats=dict(sorted(formats.items())),
        num_classes=num_classes,
        class_samples=None if num_classes is None else _spread(labels),
        smallest_class=named[int(labels.argmin())] if named else None,
        largest_class=named[int(labels.argmax())] if named else None,
        num_bad_samples=len(manifest.bad_samples),
        settings=manifest.settings,
    )


def _read(dataset: Dataset, shard: int) -> tuple[ShardIndex, Counter[str]]:
    info = dataset.manifest.shards[shard]
    lines = read_idx(dataset.store, info)
    return read_index(dataset.store, info), Counter(line.partition(" ")[0] for line in lines[1:])


def _added(counts: Counts, values: npt.NDArray[Any]) -> Counts:
    """How often each value occurred: [max + 1]. Small, where the values themselves would be one a sample."""
    more = np.bincount(values, minlength=len(counts)).astype(np.int64)
    more[: len(counts)] += counts
    return more


def _spread(values: npt.NDArray[Any]) -> Spread:
    return Spread(int(values.min()), int(np.sort(values)[len(values) // 2]), int(values.max()))


def _spread_of_counts(counts: Counts) -> Spread:
    """The spread of the values that `counts` counts."""
    present = np.flatnonzero(counts)
    median = np.searchsorted(np.cumsum(counts), counts.sum() // 2, side="right")
    return Spread(int(present[0]), int(median), int(present[-1]))


def draw_grid(dataset: Dataset, num_samples: int, seed: int = 0) -> Image.Image:
    """A sheet of random samples with their class names, or ids where there are none.

    Args:
        dataset: where they come from.
        num_samples: how many, at most; at least 1.
        seed: which.

    Raises:
        ValueError: no samples are asked for.
        ShardError: a sample is damaged.
        StoreError: the store does not answer or refuses us.
    """
    require(num_samples >= 1, f"num_samples ({num_samples}) must be at least 1")
    num_samples = min(num_samples, dataset.num_samples)
    ids = np.random.default_rng(seed).choice(dataset.num_samples, num_samples, replace=False)
    num_columns = int(np.ceil(np.sqrt(num_samples)))
    num_rows = -(-num_samples // num_columns)
    cell_height = CELL_PIXELS + CAPTION_PIXELS
    sheet = Image.new("RGB", (num_columns * CELL_PIXELS, num_rows * cell_height), "white")
    draw = ImageDraw.Draw(sheet)
    for position, sample_id in enumerate(ids.tolist()):
        left, top = position % num_columns * CELL_PIXELS, position // num_columns * cell_height
        with Image.open(io.BytesIO(dataset.sample_bytes(sample_id))) as image:
            small = image.convert("RGB")
        small.thumbnail((CELL_PIXELS - 4, CELL_PIXELS - 4))
        sheet.paste(small, (left + (CELL_PIXELS - small.width) // 2, top + (CELL_PIXELS - small.height) // 2))
        draw.text((left + 4, top + CELL_PIXELS), _caption(dataset, sample_id), fill="black")
    return sheet


def _caption(dataset: Dataset, sample_id: int) -> str:
    shards, rows = dataset.locate([sample_id])
    label = int(dataset.index(int(shards[0])).label[rows[0]])
    name = str(sample_id) if dataset.classes is None else dataset.classes[label]
    return name if len(name) <= 24 else f"{name[:23]}…"
