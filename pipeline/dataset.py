"""A dataset as its readers see it: sample ids, where they lie, and their bytes."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Self

import google_crc32c
import numpy as np
import numpy.typing as npt

from pipeline.cache import ShardCache
from pipeline.config import DataConfig, StoreConfig
from pipeline.errors import ShardError, StoreChangedError, StoreNotFoundError
from pipeline.manifest import Manifest, ShardIndex, read_index, read_manifest, tar_path
from pipeline.order import Order
from pipeline.store import Store
from pipeline.store_backend import Pin

Int64 = npt.NDArray[np.int64]
_Load = Callable[[int], ShardIndex]

# A lane reads from one shard, or from two where a window crosses a border: 256 lanes on one rank need up to 512
# indexes, 120 MB with shards of 256 MiB and images of 110 kB.
INDEX_CACHE_BYTES = 128 * 2**20


class Dataset:
    """A finished dataset. Usable from threads.

    Args:
        store: the dataset's URL.
        manifest: what it holds.
        index_cache_bytes: of shard indexes kept in memory, about 100 bytes a sample.
    """

    def __init__(self, store: Store, manifest: Manifest, *, index_cache_bytes: int = INDEX_CACHE_BYTES) -> None:
        self.store = store
        self.manifest = manifest
        self.samples_per_shard: Int64 = np.array([shard.num_samples for shard in manifest.shards], np.int64)
        self._ends = np.cumsum(self.samples_per_shard)
        self._indexes = _IndexCache(index_cache_bytes)
        self._order: tuple[DataConfig, Order] | None = None
        self._pins: dict[int, Pin] = {}  # of the shards that were read
        self.cache: ShardCache | None = None

    def __reduce__(self) -> tuple[type[Self], tuple[Store, Manifest]]:
        return type(self), (self.store, self.manifest)

    def cached(self, folder: str, max_bytes: int) -> Self:
        """This dataset, with a folder of the node that keeps what is read of its shards.

        Args:
            folder: on a local disk; other processes may share it.
            max_bytes: what it may take, for all datasets in it.

        Raises:
            ValueError: the folder cannot be written.
        """
        cached = copy.copy(self)
        cached.cache = ShardCache(folder, max_bytes, self.manifest.digest())
        return cached

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
        """The encoded image of one sample, in one ranged read, or a second one if its crc does not match.

        Raises:
            ValueError: there is no such sample.
            ShardError: the shard is missing or cut off there, or the bytes do not match their crc.
            StoreError: the store does not answer or refuses us.
        """
        (shard,), (row,) = self.locate([sample_id])
        rows = self.index(int(shard)).rows(int(row), int(row) + 1)
        ((data, damage),) = self.read_rows(int(shard), rows)
        if damage is not None:
            where = f"{self.store}/{tar_path(self.manifest.shards[shard].name)}"
            raise ShardError(
                f"{where}, sample {rows.keys[0]!r} (id {sample_id}): {damage}; run `tarmac verify {self.store}` to see "
                f"what else is damaged"
            )
        return bytes(data)

    def read_rows(self, shard: int, rows: ShardIndex) -> list[tuple[memoryview, str | None]]:
        """Consecutive rows of a shard in one ranged read, and each one that does not match its crc once more.

        Args:
            shard: its position in the manifest.
            rows: those rows of its index.

        Returns:
            Of each row its bytes, views into those read; and how they are damaged, or None.

        Raises:
            ShardError: the shard is missing, or ends before.
            StoreError: the store does not answer or refuses us.
        """
        first, stop = int(rows.offset[0]), int(rows.offset[-1] + rows.num_bytes[-1])
        whole = memoryview(self._read_cached(shard, first, stop - first))
        found: list[tuple[memoryview, str | None]] = []
        columns = (column.tolist() for column in (rows.offset, rows.num_bytes, rows.crc32c))
        for offset, num_bytes, crc in zip(*columns, strict=True):
            data, damage = whole[offset - first : offset - first + num_bytes], None
            if _crc32c(data) != crc:
                if self.cache is not None:
                    self.cache.drop(shard, offset, num_bytes)
                again = self._read_range(shard, offset, num_bytes)
                data, found_crc = memoryview(again), google_crc32c.value(again)
                damage = None if found_crc == crc else f"crc32c {found_crc:08x} must be {crc:08x}"
            found.append((data, damage))
        return found

    def _read_cached(self, shard: int, offset: int, num_bytes: int) -> bytes | memoryview:
        shard_bytes = self.manifest.shards[shard].num_bytes
        if self.cache is None or offset + num_bytes > shard_bytes:
            return self._read_range(shard, offset, num_bytes)
        return self.cache.read(shard, shard_bytes, offset, num_bytes, partial(self._read_range, shard))

    def _read_range(self, shard: int, offset: int, num_bytes: int) -> bytes:
        info = self.manifest.shards[shard]
        path = tar_path(info.name)
        remedy = f"run `tarmac verify {self.store}` and restore the shard"
        try:
            data = self.store.read_range(path, offset, num_bytes, self._pins.setdefault(shard, Pin()))
            if len(data) == num_bytes:
                return data
            found = self.store.size(path)
        except StoreNotFoundError as error:
            raise ShardError(
                f"{self.store}/{path} is missing; it should hold {info.num_bytes} bytes; {remedy}"
            ) from error
        except StoreChangedError as error:
            raise ShardError(
                f"{error}; the dataset was written anew while it was read: restore it, or start a new run"
            ) from error
        raise ShardError(
            f"{self.store}/{path} should hold {info.num_bytes} bytes and holds {found}; a read of {num_bytes} bytes at "
            f"{offset} returned {len(data)}; {remedy}"
        )

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


def _crc32c(data: memoryview) -> int:
    # The library takes an array's bytes where they lie; a memoryview it does not take, and a copy costs as much again.
    return int(google_crc32c.value(np.frombuffer(data, np.uint8)))


class _IndexCache:
    """Least-recently-used indexes. The lock guards the table, never a read: different shards load side by side."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._lock = threading.Lock()
        self._futures: OrderedDict[int, Future[ShardIndex]] = OrderedDict()
        self._sizes: dict[int, int] = {}  # bytes of those that are loaded

    def get(self, shard: int, load: _Load) -> ShardIndex:
        """The cached index, or `load(shard)`, called once however many threads ask; a failure is not kept."""
        with self._lock:
            future = self._futures.get(shard)
            if future is not None:
                self._futures.move_to_end(shard)
            else:
                self._futures[shard] = mine = Future[ShardIndex]()
        if future is not None:
            return future.result()
        try:
            index = load(shard)
        except BaseException as error:
            with self._lock:
                del self._futures[shard]
            mine.set_exception(error)
            raise
        mine.set_result(index)
        self._keep(shard, index.memory_bytes)
        return index

    def _keep(self, shard: int, num_bytes: int) -> None:
        """Count a loaded index, and drop the ones that were not used for longest until all fit."""
        with self._lock:
            self._sizes[shard] = num_bytes
            total = sum(self._sizes.values())
            for oldest in [other for other in self._futures if other in self._sizes and other != shard]:
                if total <= self._capacity_bytes:
                    break
                del self._futures[oldest]
                total -= self._sizes.pop(oldest)


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
