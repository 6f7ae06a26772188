"""Tarmac's own loader, from a local disk and from S3."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from benchmarks.peers.contender import Data, Epoch
from pipeline import DataConfig, Loader, open_dataset

LANES = 8


def config(data: Data) -> DataConfig:
    """A rank's share of a run: 8 lanes, windows of 128, so about 1,000 images shuffled together."""
    lanes = next(lanes for lanes in range(LANES, 0, -1) if data.batch_size % lanes == 0)
    return DataConfig(global_batch_size=data.batch_size, num_lanes=lanes, num_decode_threads=data.num_cpus)


def local(data: Data) -> Epoch:
    """From the dataset on local disk."""
    return _epoch(data, data.dataset)


def from_s3(data: Data) -> Epoch:
    """From the same dataset on the S3 server."""
    return _epoch(data, data.s3_dataset)


def from_s3_cached(data: Data) -> Epoch:
    """From S3, with all of it in the node's cache."""
    return _epoch(data, data.s3_dataset, cache_dir=f"{data.dataset}-cache")


def first_batch(data: Data, batch: int) -> Callable[[], object]:
    """The dataset is opened and its manifest read within the time."""

    def first() -> object:
        loader = Loader(open_dataset(data.dataset), config(data), start_step=batch)
        next(loader)
        return loader

    return first


def _epoch(data: Data, url: str, cache_dir: str | None = None) -> Epoch:
    loader = Loader(open_dataset(url), replace(config(data), cache_dir=cache_dir))

    def epoch() -> Iterator[int]:
        for _ in range(data.num_batches):
            yield len(next(loader).images)

    return epoch
