"""Where images come from: an image folder, a flat folder, a tar; on local disk or in a bucket.

A source lists its images once, in the order of their paths, and then reads any one of them. It is picklable, so that
worker processes read on their own.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast

from pipeline.config import StoreConfig
from pipeline.errors import SourceError
from pipeline.store import Store

# What our image library decodes; a content that differs from the name is found out when it is decoded.
IMAGE_EXTENSIONS = frozenset(
    ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "tif", "tiff", "gif"),
)
# A USTAR name has 100 bytes: the key, a dot, and an extension of four letters at the most.
MAX_KEY_BYTES = 90

_SAFE_BYTES = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-/")
_COMPRESSED_TAR = re.compile(r"\.(tgz|tbz2?|txz|tzst|tar\.(gz|bz2|xz|zst))$", re.IGNORECASE)
_TAR_BLOCK = 512


@dataclass(frozen=True, slots=True)
class SampleRef:
    """One image of a source.

    Args:
        key: its name in the dataset, tar-safe and unique: letters, digits and `_-/%=`.
        path: its path in the source.
        num_bytes: its length.
        label: position in the listing's classes; -1 where there are none.
        offset: first byte in the archive; 0 for a file of its own.
    """

    key: str
    path: str
    num_bytes: int
    label: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Listing:
    """What a source holds, sorted by path; `num_ignored` files have no image extension, or are hidden."""

    refs: tuple[SampleRef, ...]
    classes: tuple[str, ...] | None
    num_ignored: int


class Source(Protocol):
    """A place that images come from. Picklable, without its listing."""

    def scan(self) -> Listing:
        """List all images. Raises SourceError where there are none, or their layout is unclear."""

    def read(self, ref: SampleRef) -> bytes:
        """The bytes of one image. An OSError makes it a bad sample; any other error stops the run."""


class _File(NamedTuple):
    path: str
    num_bytes: int
    offset: int


def open_source(location: str, store_config: StoreConfig = StoreConfig()) -> Source:  # noqa: B008 (frozen)
    """The source at `location`: a folder or a `.tar`, as a bare path or any fsspec URL.

    Raises:
        SourceError: there is nothing there, or nothing that images are read from.
    """
    local = location.removeprefix("file://")
    if _COMPRESSED_TAR.search(location):
        raise SourceError(
            f"{location} is a compressed tar, which has no random access; decompress it (for example with "
            f"`gunzip`) or unpack it into a folder"
        )
    if "://" in local:
        is_tar = location.endswith(".tar")
        return TarSource(location, store_config) if is_tar else BucketSource(location, store_config)
    if os.path.isdir(local):
        return FolderSource(local)
    if not os.path.exists(local):
        raise SourceError(f"{location} does not exist; give a folder of images or a tar of images")
    if not local.endswith(".tar"):
        raise SourceError(f"{location} is a file, not a folder and not a .tar; give a folder or a tar of images")
    return TarSource(local, store_config)


class FolderSource:
    """A local folder: `class/name.jpg`, or images without labels side by side. Links are followed."""

    def __init__(self, root: str) -> None:
        self.root = root

    def __str__(self) -> str:
        return self.root

    def scan(self) -> Listing:
        """List the images below the folder. Raises SourceError."""
        try:
            return _list_images(self._walk("", ()), self.root)
        except OSError as error:
            raise SourceError(f"cannot list {error.filename}: {error.strerror}; make it readable") from error

    def read(self, ref: SampleRef) -> bytes:
        """Read one file. Raises OSError."""
        with open(os.path.join(self.root, ref.path), "rb") as file:
            return file.read()

    def _walk(self, folder: str, parents: tuple[tuple[int, int], ...]) -> Iterator[_File]:
        """Files below `folder`; `parents` are the folders on the way, so that a link to one of them ends there."""
        path = os.path.join(self.root, folder)
        status = os.stat(path)
        here = (status.st_dev, status.st_ino)
        if here in parents:
            return
        with os.scandir(path) as entries:
            for entry in entries:
                name = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir():
                    if not entry.name.startswith("."):
                        yield from self._walk(name, (*parents, here))
                    continue
                try:
                    status = entry.stat()
                except OSError:  # a broken link: reading it will give the reason
                    yield _File(name, 0, 0)
                else:
                    # A pipe or a device would hang us: ignored, as a file of no known kind.
                    yield _File(name if stat.S_ISREG(status.st_mode) else f"{name}/.", status.st_size, 0)


class BucketSource:
    """A folder in a bucket, laid out like a local one."""

    def __init__(self, url: str, store_config: StoreConfig = StoreConfig()) -> None:  # noqa: B008 (frozen)
        self.store = Store(url, store_config)

    def __str__(self) -> str:
        return str(self.store)

    def scan(self) -> Listing:
        """List the objects below the URL. Raises SourceError, StoreError."""
        files = (_File(entry.path, entry.num_bytes, 0) for entry in self.store.list())
        return _list_images(files, str(self))

    def read(self, ref: SampleRef) -> bytes:
        """Read one object. Raises StoreError."""
        return self.store.read(ref.path)


class TarSource:
    """A tar of images, `class/name.jpg` or flat: one pass over its headers, then a ranged read an image."""

    def __init__(self, url: str, store_config: StoreConfig = StoreConfig()) -> None:  # noqa: B008 (frozen)
        parent, _, self.name = os.path.abspath(url).rpartition("/") if "://" not in url else url.rpartition("/")
        self.store = Store(parent or "/", store_config)
        # A header is skipped to on local disk; in a bucket a jump costs more than the bytes jumped over.
        self._block_bytes = 2**23 if "://" in self.store.url else 2**16

    def __str__(self) -> str:
        return f"{self.store}/{self.name}"

    def scan(self) -> Listing:
        """List the images in the tar. Raises SourceError, StoreError."""
        return _list_images(self._members(), str(self))

    def read(self, ref: SampleRef) -> bytes:
        """Read one member. Raises StoreError."""
        return self.store.read_range(self.name, ref.offset, ref.num_bytes)

    def _members(self) -> list[_File]:
        """The files in the tar; of several with one name the last, as when it is unpacked."""
        stream = _RangedFile(self.store, self.name, self._block_bytes)
        files: dict[str, _File] = {}
        try:
            with tarfile.open(fileobj=cast("io.BytesIO", stream), mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # or a million headers stay in memory
                    path = "/".join(part for part in member.name.split("/") if part not in ("", "."))
                    if member.isreg() and not member.issparse():
                        files[path] = _File(path, member.size, member.offset_data)
                    elif member.islnk() and member.linkname in files:
                        files[path] = files[member.linkname]._replace(path=path)
                end = tar.offset
            stream.seek(end)
            if any(stream.read(_TAR_BLOCK)):
                raise tarfile.ReadError("bad header")
        except tarfile.TarError as error:
            raise SourceError(
                f"{self} is not a whole uncompressed tar: {error}, after {len(files)} files; copy it anew, or "
                f"unpack what it holds into a folder"
            ) from error
        return list(files.values())


class _RangedFile:
    """An object as a seekable file: one buffered block, read when something outside of it is wanted."""

    def __init__(self, store: Store, path: str, block_bytes: int) -> None:
        self._store, self._path, self._block_bytes = store, path, block_bytes
        self._position = self._start = 0
        self._block = b""

    def seek(self, position: int) -> int:
        """Go to byte `position`."""
        self._position = position
        return position

    def tell(self) -> int:
        """Where the next read starts."""
        return self._position

    def read(self, num_bytes: int) -> bytes:
        """The next bytes, fewer only at the end of the object."""
        begin = self._position - self._start
        if not 0 <= begin <= begin + num_bytes <= len(self._block):
            self._start, begin = self._position, 0
            self._block = self._store.read_range(self._path, self._start, max(num_bytes, self._block_bytes))
        data = self._block[begin : begin + num_bytes]
        self._position += len(data)
        return data


def _list_images(files: Iterator[_File] | list[_File], where: str) -> Listing:
    """Sort out images from other files, find the classes, and name the samples."""
    images, num_ignored = [], 0
    for file in files:
        if _is_image(file.path):
            images.append(file)
        else:
            num_ignored += 1
    if not images:
        raise SourceError(
            f"{where} holds no images ({num_ignored} other files); give a folder or a tar with "
            f"class/name.jpg, or with images side by side. Image extensions are "
            f"{', '.join(sorted(IMAGE_EXTENSIONS))}"
        )
    images.sort()
    skip = _common_folder_length([image.path for image in images])
    folders = [image.path[skip:].partition("/")[0] if "/" in image.path[skip:] else None for image in images]
    if None in folders and set(folders) != {None}:
        flat = images[folders.index(None)].path
        nested = next(image.path for image, folder in zip(images, folders, strict=True) if folder)
        raise SourceError(
            f"{where} holds images both at its top ({printable(flat)}) and in folders ({printable(nested)}), so "
            f"it is unclear whether folders are classes; move the former into a folder, or the latter to the top"
        )
    names = sorted({folder for folder in folders if folder is not None})
    labels = {name: label for label, name in enumerate(names)}
    keys = _keys([image.path[skip:] for image in images])
    refs = tuple(
        SampleRef(key, image.path, image.num_bytes, -1 if folder is None else labels[folder], image.offset)
        for key, image, folder in zip(keys, images, folders, strict=True)
    )
    return Listing(refs, tuple(printable(name) for name in names) or None, num_ignored)


def printable(path: str) -> str:
    """`path` with bytes that are no UTF-8 written as escapes, fit for a log and for JSON."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _is_image(path: str) -> bool:
    """Whether a file is a candidate: by its extension, and neither it nor a folder above it is hidden."""
    hidden = any(part.startswith(".") for part in path.split("/"))
    return not hidden and os.path.splitext(path)[1][1:].lower() in IMAGE_EXTENSIONS


def _common_folder_length(paths: list[str]) -> int:
    """Length of a leading path that all share, which still leaves `class/name`; `paths` are sorted."""
    first, last = paths[0].split("/"), paths[-1].split("/")
    num_shared = min(path.count("/") for path in paths) - 1
    length = 0
    for part, other in zip(first[: max(num_shared, 0)], last, strict=False):
        if part != other:
            break
        length += len(part) + 1
    return length


def _keys(paths: list[str]) -> list[str]:
    """A tar-safe key for each path, no two alike.

    The path without its extension, with everything outside [A-Za-z0-9_-/] percent-encoded; so `=` is free to set
    apart an extension (where another file has the same name but for it) or a hash (where the name is too long).
    """
    keys: list[str] = []
    taken: set[str] = set()
    for path in paths:
        stem, extension = os.path.splitext(path)
        key = _percent_encoded(stem)
        if key in taken:
            key = f"{key}={_percent_encoded(extension[1:])}"
        if len(key) > MAX_KEY_BYTES:
            digest = hashlib.blake2b(os.fsencode(path), digest_size=12).hexdigest()
            key = f"{key[: MAX_KEY_BYTES - len(digest) - 1]}={digest}"
        taken.add(key)
        keys.append(key)
    return keys


def _percent_encoded(text: str) -> str:
    return "".join(chr(byte) if byte in _SAFE_BYTES else f"%{byte:02X}" for byte in os.fsencode(text))
