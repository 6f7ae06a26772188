"""Shards on a disk of the node, block by block: bounded, and shared by all processes that name the same folder.

    <folder>/<digest of the manifest>/<shard>-<block>     BLOCK_BYTES of a tar, the last one of a shard fewer
    <folder>/used                                         bytes that are taken, changed under a lock

A dataset that is written anew has another digest, so its blocks are never taken for the old ones. A block appears
whole, by renaming; one that a crash or the disk damaged is found by the samples' checksums, dropped, and fetched again.

Training reads each block about once an epoch, in another order each time. Then the block that was used last is as
good as any other, and to throw one out for another would only cost a write: a full cache keeps what it has, and
makes room by forgetting datasets that nobody has used for KEPT_S.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np

logger = logging.getLogger(__name__)

BLOCK_BYTES = 4 * 2**20
KEPT_S = 3600.0
_TOUCH_S = 60.0
# Another process that fetches the same block is waited for so long; then it is fetched twice.
_LOCK_S = 10.0
_POLL_S = 0.02
_PART = ".part"
_DIGITS = 20

Fetch = Callable[[int, int], bytes]
"""(offset, num_bytes) -> the shard's bytes there, from the store."""


class ShardCache:
    """The blocks of one dataset's shards in a folder of the node. Usable from threads and processes.

    Whatever the folder does (full, read-only, gone, damaged), reads go on from the store.

    Args:
        folder: on a local disk; made if it is not there.
        max_bytes: what all datasets in the folder may take together.
        digest: of the dataset's manifest.

    Raises:
        ValueError: the folder cannot be made or written.
    """

    def __init__(self, folder: str, max_bytes: int, digest: str) -> None:
        self._root, self._home = Path(folder), Path(folder) / digest[:32]
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._touched = 0.0
        self._writes = True
        self.hit_bytes = 0
        """Bytes that came from the folder."""
        self.num_dropped = 0
        """Blocks that were damaged."""
        try:
            self._home.mkdir(parents=True, exist_ok=True)
            self._recount()
        except OSError as error:
            raise ValueError(
                f"data.cache_dir ({folder}) must be a folder that can be written ({error.strerror}); name another one, "
                "or leave it out"
            ) from error

    def read(self, shard: int, shard_bytes: int, offset: int, num_bytes: int, fetch: Fetch) -> bytes | memoryview:
        """Bytes of a shard: from its blocks here, and where one is missing from the store, as whole blocks.

        Args:
            shard: its position in the manifest.
            shard_bytes: its length.
            offset: first byte.
            num_bytes: how many; they lie within the shard.
            fetch: reads from the store; what it raises comes through, and fewer bytes than asked for come back.
        """
        self._touch()
        found = np.empty(num_bytes, np.uint8).data  # a bytearray would be filled with zeros first
        blocks = range(offset // BLOCK_BYTES, (offset + num_bytes - 1) // BLOCK_BYTES + 1)
        missing = [block for block in blocks if not self._read_block(shard, block, offset, found)]
        for first, stop in _runs(missing):
            with ExitStack() as stack:
                parts = {block: stack.enter_context(self._locked(shard, block)) for block in range(first, stop)}
                # Others may have been faster.
                still = [block for block in parts if not self._read_block(shard, block, offset, found)]
                for low, high in _runs(still):
                    begin, end = low * BLOCK_BYTES, min(high * BLOCK_BYTES, shard_bytes)
                    data = memoryview(fetch(begin, end - begin))
                    if len(data) < end - begin:
                        return fetch(offset, num_bytes)  # the shard is not what it should be: the reader finds out
                    for block in range(low, high):
                        whole = data[block * BLOCK_BYTES - begin :][:BLOCK_BYTES]
                        _copy(whole, block * BLOCK_BYTES, found, offset)
                        self._keep(parts[block], shard, block, whole)
        return found

    def drop(self, shard: int, offset: int, num_bytes: int) -> None:
        """Forget the blocks that hold these bytes: they are damaged."""
        for block in range(offset // BLOCK_BYTES, (offset + num_bytes - 1) // BLOCK_BYTES + 1):
            with suppress(OSError), self._budget() as budget:
                size = self._path(shard, block).stat().st_size
                self._path(shard, block).unlink()
                _add(budget, -size)
                self.num_dropped += 1
                logger.warning("a damaged block of shard %d was dropped from the cache in %s", shard, self._root)

    def _path(self, shard: int, block: int) -> Path:
        return self._home / f"{shard:06d}-{block:05d}"

    def _read_block(self, shard: int, block: int, offset: int, found: memoryview) -> bool:
        """Copy what a block has of `found`, which begins at `offset` of the shard; False if it is not there, whole."""
        begin = block * BLOCK_BYTES
        low, high = max(begin, offset), min(begin + BLOCK_BYTES, offset + len(found))
        try:
            file = os.open(self._path(shard, block), os.O_RDONLY)
        except OSError:
            return False
        try:
            whole = os.preadv(file, [found[low - offset : high - offset]], low - begin) == high - low
        except OSError:
            return False
        finally:
            os.close(file)
        if whole:
            with self._lock:
                self.hit_bytes += high - low
        return whole

    @contextmanager
    def _locked(self, shard: int, block: int) -> Iterator[int | None]:
        """The file that is to become the block, locked against other threads and processes; None without."""
        path = self._path(shard, block).with_suffix(_PART)
        file = None
        if self._writes:
            try:
                file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError as error:
                self._give_up(error)
        try:
            yield file if file is not None and _lock(file, path) else None
        finally:
            if file is not None:
                os.close(file)

    def _keep(self, part: int | None, shard: int, block: int, data: memoryview) -> None:
        """Write a block and make it visible, if there is room."""
        if part is None:
            return
        path = self._path(shard, block)
        try:
            if not self._reserve(len(data)):
                path.with_suffix(_PART).unlink(missing_ok=True)
                return
            try:
                os.ftruncate(part, 0)
                if os.pwrite(part, data, 0) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                path.with_suffix(_PART).replace(path)
            except OSError:
                with self._budget() as budget:
                    path.with_suffix(_PART).unlink(missing_ok=True)
                    _add(budget, -len(data))
                raise
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if self._writes:
            logger.warning("nothing more is written to the cache in %s: %s; reads go on", self._root, error)
        self._writes = False

    def _touch(self) -> None:
        """Say now and then that the dataset is in use."""
        now = time.time()
        if now - self._touched > _TOUCH_S:
            self._touched = now
            with suppress(OSError):
                os.utime(self._home)

    def _reserve(self, num_bytes: int) -> bool:
        """Take so many bytes of the budget; False if there are not as many."""
        with self._budget() as budget:
            missing = _add(budget, num_bytes) - self._max_bytes
            if missing > 0:
                missing = _add(budget, -self._forget(missing)) - self._max_bytes
            if missing > 0:
                _add(budget, -num_bytes)
            return missing <= 0

    def _recount(self) -> None:
        """Count what there is: processes that were killed took more than they wrote, or left half a block."""
        with self._budget() as budget:
            used = 0
            for home in self._homes():
                for entry in os.scandir(home):
                    with suppress(FileNotFoundError):
                        if entry.name.endswith(_PART) and _is_left(entry.path):
                            os.unlink(entry.path)
                        else:
                            used += BLOCK_BYTES if entry.name.endswith(_PART) else entry.stat().st_size
            os.ftruncate(budget, 0)
            _add(budget, used)

    def _forget(self, num_bytes: int) -> int:
        """Remove datasets that are not in use, the oldest first, until so many bytes are free; how many were freed."""
        freed = 0
        homes = [(home.stat().st_mtime, home) for home in self._homes() if home != self._home]
        for used_at, home in sorted(homes):
            if freed >= num_bytes or time.time() - used_at < KEPT_S:
                break
            freed += sum(entry.stat().st_size for entry in os.scandir(home) if not entry.name.endswith(_PART))
            shutil.rmtree(home, ignore_errors=True)
        return freed

    def _homes(self) -> list[Path]:
        return [path for path in self._root.iterdir() if path.is_dir()]

    @contextmanager
    def _budget(self) -> Iterator[int]:
        """The open file with the bytes in use, locked against other threads and processes."""
        file = os.open(self._root / "used", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)  # held for moments; the system frees it if its holder dies
            yield file
        finally:
            os.close(file)


def _copy(data: memoryview, begin: int, found: memoryview, offset: int) -> None:
    """Copy what `data`, which begins at `begin` of the shard, has of `found`, which begins at `offset`."""
    low, high = max(begin, offset), min(begin + len(data), offset + len(found))
    found[low - offset : high - offset] = data[low - begin : high - begin]


def _runs(blocks: list[int]) -> Iterator[tuple[int, int]]:
    """[first, stop) of each run of consecutive numbers."""
    at = 0
    while at < len(blocks):
        stop = at + 1
        while stop < len(blocks) and blocks[stop] == blocks[stop - 1] + 1:
            stop += 1
        yield blocks[at], blocks[stop - 1] + 1
        at = stop


def _add(budget: int, num_bytes: int) -> int:
    """Add to the number in an open file; its new value. A process that is killed leaves the old one or the new one."""
    used = max(int(os.pread(budget, _DIGITS, 0) or b"0") + num_bytes, 0)
    os.pwrite(budget, b"%0*d" % (_DIGITS, used), 0)
    return used


def _lock(file: int, path: Path) -> bool:
    """Lock an open file within _LOCK_S; False also if it is no longer the one at `path`."""
    end = time.monotonic() + _LOCK_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Renamed by the one before us: it is the block now, and must not be written again.
            return os.fstat(file).st_ino == path.stat().st_ino
        except FileNotFoundError:
            return False
        except OSError:
            if time.monotonic() > end:
                return False
            time.sleep(_POLL_S)


def _is_left(path: str) -> bool:
    """Whether nobody is writing this file any more."""
    file = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(file)
