"""A dataset as its readers see it: sample ids, where they lie, and their bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Self

import google_crc32c
import numpy as np
import numpy.typing as npt

from pipeline.config import DataConfig, StoreConfig
from pipeline.errors import ShardError, StoreNotFoundError
from pipeline.manifest import Manifest, ShardIndex, read_index, read_manifest, tar_path
from pipeline.order import Order
from pipeline.store import Store

Int64 = npt.NDArray[np.int64]
_Load = Callable[[int], ShardIndex]

# A lane reads from one shard, or from two where a window crosses a border: 256 lanes on one rank need up to 512.
MAX_CACHED_INDEXES = 1024


class Dataset:
    """A finished dataset. Usable from threads.

    Args:
        store: the dataset's URL.
        manifest: what it holds.
        max_cached_indexes: shard indexes kept in memory, about 100 bytes a sample each.
    """

    def __init__(self, store: Store, manifest: Manifest, *, max_cached_indexes: int = MAX_CACHED_INDEXES) -> None:
        self.store = store
        self.manifest = manifest
        self.samples_per_shard: Int64 = np.array([shard.num_samples for shard in manifest.shards], np.int64)
        self._ends = np.cumsum(self.samples_per_shard)
        self._indexes = _IndexCache(max_cached_indexes)
        self._order: tuple[DataConfig, Order] | None = None

    def __reduce__(self) -> tuple[type[Self], tuple[Store, Manifest]]:
        return type(self), (self.store, self.manifest)

    @property
    def url(self) -> str:
        """Where the dataset lies."""
        return self.store.url

    @property
    def num_samples(self) -> int:
        """Samples N; ids are the integers in [0, N)."""
        return self.manifest.num_samples

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names in the order of the labels; None for a dataset without labels."""
        return self.manifest.classes

    def step_sample_ids(self, config: DataConfig, step: int) -> Int64:
        """The ids that step `step` trains on, in position order: [G] int64, whatever the world size."""
        cached = self._order
        if cached is None or cached[0] != config:
            self._order = cached = (config, Order(self.samples_per_shard, config))
        return cached[1].step_sample_ids(step)

    def locate(self, sample_ids: npt.ArrayLike) -> tuple[Int64, Int64]:
        """The shard of each sample, and its row there.

        Args:
            sample_ids: [n] integers in [0, N).

        Returns:
            shard [n], row [n], both int64.

        Raises:
            ValueError: an id is outside [0, N).
        """
        ids = np.asarray(sample_ids, np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= self.num_samples):
            wrong = ids[(ids < 0) | (ids >= self.num_samples)][0]
            raise ValueError(f"sample id ({wrong}) must be in [0, {self.num_samples})")
        shards = np.searchsorted(self._ends, ids, side="right").astype(np.int64)
        rows = ids - (self._ends[shards] - self.samples_per_shard[shards])
        return shards, rows

    def index(self, shard: int) -> ShardIndex:
        """The index of the shard at position `shard` of the manifest; read on first use.

        Raises:
            ShardError: it is missing or damaged.
            StoreError: the store does not answer or refuses us.
        """
        return self._indexes.get(shard, self._read_index)

    def sample_bytes(self, sample_id: int) -> bytes:
        """The encoded image of one sample, in one ranged read.

        Raises:
            ValueError: there is no such sample.
            ShardError: the shard is missing or cut off there, or the bytes do not match their crc.
            StoreError: the store does not answer or refuses us.
        """
        shards, rows = self.locate([sample_id])
        info, row = self.manifest.shards[shards[0]], rows[0]
        index = self.index(int(shards[0]))
        offset, num_bytes = int(index.offset[row]), int(index.num_bytes[row])
        where = f"{self.store}/{tar_path(info.name)}, sample {index.keys[row]!r} (id {sample_id})"
        remedy = f"run `tarmac verify {self.store}` to see what else is damaged"
        try:
            data = self.store.read_range(tar_path(info.name), offset, num_bytes)
        except StoreNotFoundError as error:
            raise ShardError(f"{where}: the shard is missing; {remedy} ({error})") from error
        if len(data) != num_bytes:
            raise ShardError(f"{where}: the shard ends after {len(data)} of {num_bytes} bytes; {remedy}")
        crc = google_crc32c.value(data)
        if crc != index.crc32c[row]:
            raise ShardError(f"{where}: crc32c {crc:08x} must be {index.crc32c[row]:08x}; {remedy}")
        return data

    def check_sizes(self) -> None:
        """Compare the shards' sizes in the store with the manifest, by one listing.

        Raises:
            ShardError: a shard is missing or has another size.
            StoreError: the store does not answer or refuses us.
        """
        sizes = {entry.path: entry.num_bytes for entry in self.store.list()}
        for info in self.manifest.shards:
            path = tar_path(info.name)
            found = f"has {sizes[path]} bytes" if path in sizes else "is missing"
            if sizes.get(path) != info.num_bytes:
                raise ShardError(
                    f"{self.store}/{path} {found} and must have {info.num_bytes}, as the manifest says; "
                    f"run `tarmac verify {self.store}` to see what else is damaged"
                )

    def _read_index(self, shard: int) -> ShardIndex:
        return read_index(self.store, self.manifest.shards[shard])


class _IndexCache:
    """Least-recently-used indexes. The lock guards the table, never a read: different shards load side by side."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._futures: OrderedDict[int, Future[ShardIndex]] = OrderedDict()

    def get(self, shard: int, load: _Load) -> ShardIndex:
        """The cached index, or `load(shard)`, called once however many threads ask; a failure is not kept."""
        with self._lock:
            future = self._futures.get(shard)
            if future is not None:
                self._futures.move_to_end(shard)
            else:
                mine: Future[ShardIndex] = Future()
                self._futures[shard] = mine
                while len(self._futures) > self._capacity:
                    self._futures.popitem(last=False)
        if future is not None:
            return future.result()
        try:
            index = load(shard)
        except BaseException as error:
            with self._lock:
                if self._futures.get(shard) is mine:
                    del self._futures[shard]
            mine.set_exception(error)
            raise
        mine.set_result(index)
        return index


def open_dataset(url: str, store_config: StoreConfig = StoreConfig()) -> Dataset:  # noqa: B008 (frozen)
    """Open the dataset at `url`: reads its manifest, nothing else.

    Args:
        url: any fsspec URL or bare path.
        store_config: how patient reads are.

    Raises:
        ManifestError: there is no finished dataset there.
        StoreError: the store does not answer or refuses us.
    """
    store = Store(url, store_config)
    return Dataset(store, read_manifest(store))
