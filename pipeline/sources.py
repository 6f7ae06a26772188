"""Where images come from: an image folder, a flat folder, a tar; on local disk or in a bucket.

A source lists its images once, in the order of their paths, and then reads any one of them. It is picklable, so that
worker processes read on their own.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from typing import Protocol

from pipeline.config import StoreConfig
from pipeline.errors import SourceError, StoreNotFoundError, StoreRefusedError
from pipeline.listing import Listing, SampleRef, SourceFile, is_image, list_images, printable
from pipeline.store import Store
from pipeline.tar_members import tar_members, unreadable

_COMPRESSED_TAR = re.compile(r"\.(tgz|tbz2?|txz|tzst|tar\.(gz|bz2|xz|zst))$", re.IGNORECASE)
_WEBDATASET_LABELS = (".cls", ".json", ".txt")


class Source(Protocol):
    """A place that images come from. Picklable, without its listing."""

    def scan(self) -> Listing:
        """List all images. Raises SourceError where there are none, or their layout is unclear."""

    def read(self, ref: SampleRef) -> bytes:
        """The bytes of one image. An OSError makes it a bad sample; any other error stops the run."""


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
            return list_images(self._walk("", ()), self.root)
        except OSError as error:
            raise SourceError(f"cannot list {error.filename}: {error.strerror}; make it readable") from error

    def read(self, ref: SampleRef) -> bytes:
        """Read one file. Raises OSError."""
        with open(os.path.join(self.root, ref.path), "rb") as file:
            return file.read()

    def _walk(self, folder: str, parents: tuple[tuple[int, int], ...]) -> Iterator[SourceFile]:
        """Files below `folder`; `parents` are the folders on the way, so that a link to one of them ends there."""
        path = os.path.join(self.root, folder)
        status = os.stat(path)
        here = (status.st_dev, status.st_ino)
        if here in parents:
            return
        with os.scandir(path) as entries:
            for entry in entries:
                name = f"{folder}/{entry.name}" if folder else entry.name
                # A link to itself is an error to `is_dir`, and no folder to `isdir`.
                if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                    if not entry.name.startswith("."):
                        yield from self._walk(name, (*parents, here))
                    continue
                try:
                    status = entry.stat()
                except OSError:  # a broken link: reading it will give the reason
                    yield SourceFile(name, 0)
                else:
                    # A pipe or a device would hang us: ignored, as a file of no known kind.
                    yield SourceFile(name if stat.S_ISREG(status.st_mode) else f"{name}/.", status.st_size)


class BucketSource:
    """A folder in a bucket, laid out like a local one."""

    def __init__(self, url: str, store_config: StoreConfig = StoreConfig()) -> None:  # noqa: B008 (frozen)
        self.store = Store(url, store_config)

    def __str__(self) -> str:
        return str(self.store)

    def scan(self) -> Listing:
        """List the objects below the URL. Raises SourceError, StoreError."""
        files = (SourceFile(entry.path, entry.num_bytes) for entry in self.store.list())
        return list_images(files, str(self))

    def read(self, ref: SampleRef) -> bytes:
        """Read one object.

        Raises:
            OSError: this object is gone, refused, archived, or has a name that the store does not take.
            StoreError: the bucket is gone, refuses us altogether, or does not answer.
        """
        try:
            return self.store.read(ref.path)
        except (StoreNotFoundError, StoreRefusedError) as error:
            self.store.check_readable()  # or it is not this object's fault
            raise OSError(str(error)) from error
        except ValueError as error:
            raise OSError(str(error)) from error


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
        files = list(tar_members(self.store, self.name, self._block_bytes))
        _refuse_webdataset(files, str(self))
        return list_images(files, str(self))

    def read(self, ref: SampleRef) -> bytes:
        """Read one member.

        Raises:
            OSError: there is nothing to read: it is a link that leads nowhere, or stored sparse.
            StoreError: the tar is gone, refused, or does not come.
        """
        if (error := unreadable(ref.offset)) is not None:
            raise error
        return self.store.read_range(self.name, ref.offset, ref.num_bytes)


def _refuse_webdataset(files: list[SourceFile], where: str) -> None:
    """Raise SourceError if there are labels beside images, which would be ignored."""
    labels = [file.path for file in files if os.path.splitext(file.path)[1].lower() in _WEBDATASET_LABELS]
    images = {os.path.splitext(file.path)[0]: file.path for file in files if labels and is_image(file.path)}
    for label in labels:
        stem = os.path.splitext(label)[0]
        if stem in images:
            raise SourceError(
                f"{where} looks like a WebDataset tar: {printable(label)} lies beside {printable(images[stem])}, "
                f"and what it says of the image would be lost. Give class/name.jpg; or, to leave such files out, "
                f"unpack the tar and give the folder"
            )
