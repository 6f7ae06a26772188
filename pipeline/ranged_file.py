"""An object in a store as a file that libraries read: tarfile, pyarrow."""

from __future__ import annotations

import hashlib
import io
import os
from typing import Any

from pipeline.store import Store

# Read where the last jump was a long one: the next may be too.
AFTER_JUMP_BYTES = 2**16


class RangedFile(io.RawIOBase):
    """An object as a seekable file: one buffered block, read when something outside of it is wanted.

    Args:
        store: where the object is.
        path: its path there.
        block_bytes: read at a time; jumps of more than that are followed by small reads.
    """

    def __init__(self, store: Store, path: str, block_bytes: int) -> None:
        super().__init__()
        self._store, self._path, self._block_bytes = store, path, block_bytes
        self._position = self._start = 0
        self._block = b""
        self._num_bytes: int | None = None

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, position: int, whence: int = os.SEEK_SET, /) -> int:
        """Go to a byte. Raises StoreError where the end is meant and the store does not tell it."""
        if whence == os.SEEK_CUR:
            position += self._position
        elif whence == os.SEEK_END:
            position += self.size()
        self._position = position
        return position

    def tell(self) -> int:
        """Where the next read starts."""
        return self._position

    def size(self) -> int:
        """Length of the object in bytes, asked for once. Raises StoreError."""
        if self._num_bytes is None:
            self._num_bytes = self._store.size(self._path)
        return self._num_bytes

    def read(self, num_bytes: int = -1, /) -> bytes:
        """The next bytes, fewer only at the end of the object. Raises StoreError."""
        if num_bytes < 0:
            num_bytes = max(self.size() - self._position, 0)
        begin = self._position - self._start
        if not 0 <= begin <= begin + num_bytes <= len(self._block):
            is_jump = not -self._block_bytes <= begin - len(self._block) <= self._block_bytes
            ahead = min(AFTER_JUMP_BYTES, self._block_bytes) if is_jump else self._block_bytes
            self._start, begin = self._position, 0
            self._block = self._store.read_range(self._path, self._start, max(num_bytes, ahead))
        data = self._block[begin : begin + num_bytes]
        self._position += len(data)
        return data

    def readinto(self, buffer: Any, /) -> int:
        """Fill a buffer, as far as there are bytes."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class HashedFile:
    """An object read once, front to back, as a file that tarfile takes; and its sha256.

    Args:
        store: where the object is.
        path: its path there.
        block_bytes: read at a time.
    """

    def __init__(self, store: Store, path: str, block_bytes: int) -> None:
        self._store, self._path, self._block_bytes = store, path, block_bytes
        self._position = self._start = 0
        self._block = b""
        self._sha256 = hashlib.sha256()

    @property
    def num_bytes(self) -> int:
        """Bytes taken from the store so far."""
        return self._start + len(self._block)

    def seek(self, position: int, /) -> int:
        """Go on to a byte; there is no way back."""
        assert position >= self._start
        self._position = position
        return position

    def tell(self) -> int:
        """Where the next read starts."""
        return self._position

    def read(self, num_bytes: int, /) -> bytes:
        """The next bytes, fewer only at the end of the object. Raises StoreError."""
        while self.num_bytes < self._position + num_bytes and self._fetch():
            pass
        begin = self._position - self._start
        data = self._block[begin : begin + num_bytes]
        self._position += len(data)
        return data

    def finish(self) -> str:
        """Read what is left; the sha256 of all bytes, in hex. Raises StoreError."""
        self._position = self.num_bytes
        while self._fetch():
            self._position = self.num_bytes
        return self._sha256.hexdigest()

    def _fetch(self) -> bool:
        end = self.num_bytes
        block = self._store.read_range(self._path, end, self._block_bytes)
        self._sha256.update(block)
        kept = self._block[self._position - self._start :]
        self._block, self._start = kept + block, end - len(kept)
        return bool(block)
