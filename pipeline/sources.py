"""Where images come from: folders of images, tars and parquet files; on local disk or in a bucket.

A source lists its images once, in the order of their paths, and then reads any one of them. It is picklable, so that
worker processes read on their own.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from typing import Protocol

from pipeline.archives import is_tar, list_tars, mixed_error, read_member
from pipeline.config import StoreConfig
from pipeline.errors import SourceError, StoreNotFoundError, StoreRefusedError
from pipeline.label_file import with_labels
from pipeline.labels import read_classes, read_lines, split_url, with_classes
from pipeline.listing import Listing, SampleRef, SourceFile, is_image, list_images
from pipeline.store import Store
from pipeline.tables import RowGroups, is_table, list_tables

_COMPRESSED_TAR = re.compile(r"\.(tgz|tbz2?|txz|tzst|tar\.(gz|bz2|xz|zst))$", re.IGNORECASE)


class Source(Protocol):
    """A place that images come from. Picklable, without its listing."""

    def scan(self) -> Listing:
        """List all images. Raises SourceError where there are none, or their layout is unclear."""

    def read(self, ref: SampleRef) -> bytes:
        """The bytes of one image. An OSError makes it a bad sample; any other error stops the run."""


def open_source(
    location: str,
    store_config: StoreConfig = StoreConfig(),  # noqa: B008 (frozen)
    *,
    labels: str | None = None,
    classes: str | None = None,
) -> Source:
    """The source at `location`: a folder of images, tars or parquet files, or one of these.

    All of them as a bare path or any fsspec URL.

    Args:
        location: where it is.
        store_config: how patient requests are.
        labels: a text file, a path or a URL, of the images' labels: one a line in the order of their names, or a name
            and its label a line. Numbers may count from 1, as ImageNet's do.
        classes: a text file, a path or a URL, of class names, one a line in the order of the labels.

    Raises:
        SourceError: there is nothing there, or nothing that images are read from.
    """
    source = _open(location, store_config)
    return source if labels is None and classes is None else LabelledSource(source, store_config, labels, classes)


def _open(location: str, store_config: StoreConfig) -> Source:
    local = location.removeprefix("file://")
    if _COMPRESSED_TAR.search(location):
        raise SourceError(
            f"{location} is a compressed tar, which has no random access; decompress it (for example with "
            f"`gunzip`) or unpack it into a folder"
        )
    if "://" in local:
        of_url = TarSource if is_tar(location) else TableSource if is_table(location) else BucketSource
        return of_url(location, store_config)
    if os.path.isdir(local):
        return FolderSource(local)
    if not os.path.exists(local):
        raise SourceError(f"{location} does not exist; give a folder of images or a tar of images")
    if is_table(local):
        return TableSource(local, store_config)
    if not is_tar(local):
        raise SourceError(f"{location} is a file, not a folder and not a .tar or .parquet; give one of these")
    return TarSource(local, store_config)


class FolderSource:
    """A local folder: `class/name.jpg`, images without labels, tars, or parquet files. Links are followed."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.store = Store(os.path.abspath(root))
        self._groups = RowGroups(self.store)

    def __str__(self) -> str:
        return self.root

    def scan(self) -> Listing:
        """List the images below the folder. Raises SourceError."""
        try:
            files = list(self._walk("", ()))
        except OSError as error:
            raise SourceError(f"cannot list {error.filename}: {error.strerror}; make it readable") from error
        return _list_folder(self.store, files, self.root)

    def read(self, ref: SampleRef) -> bytes:
        """Read one file, or a part of one. Raises OSError; StoreError, SourceError where an archive fails."""
        if ref.group >= 0:
            return self._groups.read(ref)
        if ref.archive:
            return read_member(self.store, ref.archive, ref)
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
        self._groups = RowGroups(self.store)

    def __str__(self) -> str:
        return str(self.store)

    def scan(self) -> Listing:
        """List the objects below the URL. Raises SourceError, StoreError."""
        files = [SourceFile(entry.path, entry.num_bytes) for entry in self.store.list()]
        return _list_folder(self.store, files, str(self))

    def read(self, ref: SampleRef) -> bytes:
        """Read one object, or a part of one.

        Raises:
            OSError: this object is gone, refused, archived, or has a name that the store does not take.
            StoreError: the bucket is gone, refuses us altogether, or does not answer; or an archive does not come.
            SourceError: a parquet file is damaged.
        """
        if ref.group >= 0:
            return self._groups.read(ref)
        if ref.archive:
            return read_member(self.store, ref.archive, ref)
        try:
            return self.store.read(ref.path)
        except (StoreNotFoundError, StoreRefusedError) as error:
            self.store.check_readable()  # or it is not this object's fault
            raise OSError(str(error)) from error
        except ValueError as error:
            raise OSError(str(error)) from error


class TarSource:
    """A tar of images, `class/name.jpg`, flat or with `.cls`: one pass over its headers, then a ranged read each."""

    def __init__(self, url: str, store_config: StoreConfig = StoreConfig()) -> None:  # noqa: B008 (frozen)
        self.store, self.name = split_url(url, store_config)

    def __str__(self) -> str:
        return f"{self.store}/{self.name}"

    def scan(self) -> Listing:
        """List the images in the tar. Raises SourceError, StoreError."""
        return list_tars(self.store, [self.name], str(self))

    def read(self, ref: SampleRef) -> bytes:
        """Read one member.

        Raises:
            OSError: there is nothing to read: it is a link that leads nowhere, or stored sparse.
            StoreError: the tar is gone, refused, or does not come.
        """
        return read_member(self.store, self.name, ref)


class TableSource:
    """A parquet file with images in it."""

    def __init__(self, url: str, store_config: StoreConfig = StoreConfig()) -> None:  # noqa: B008 (frozen)
        self.store, self.name = split_url(url, store_config)
        self._groups = RowGroups(self.store)

    def __str__(self) -> str:
        return f"{self.store}/{self.name}"

    def scan(self) -> Listing:
        """List the images in the file. Raises SourceError, StoreError."""
        return list_tables(self.store, [self.name], str(self))

    def read(self, ref: SampleRef) -> bytes:
        """Read one row. Raises OSError where it is empty, SourceError, StoreError."""
        return self._groups.read(ref)


class LabelledSource:
    """A source whose labels, or the names of these, are written down in files."""

    def __init__(self, source: Source, store_config: StoreConfig, labels: str | None, classes: str | None) -> None:
        self.source, self._store_config, self._labels, self._classes = source, store_config, labels, classes

    def __str__(self) -> str:
        return str(self.source)

    def scan(self) -> Listing:
        """List the images, and give them their labels. Raises SourceError, StoreError."""
        classes = None if self._classes is None else read_classes(self._classes, self._store_config)
        listing = self.source.scan()
        if self._labels is not None:
            return with_labels(listing, read_lines(self._labels, self._store_config), classes, self._labels)
        return listing if classes is None else with_classes(listing, classes, str(self))

    def read(self, ref: SampleRef) -> bytes:
        """Read one image, as the source does."""
        return self.source.read(ref)


def _list_folder(store: Store, files: list[SourceFile], where: str) -> Listing:
    """List the images of a folder, or those in its tars, or parquet files. Raises SourceError where it is unclear."""
    tars = sorted(file.path for file in files if is_tar(file.path))
    image = next((file.path for file in files if is_image(file.path)), None)
    if tars and image is not None:
        raise mixed_error(where, image, tars[0])
    if tars:
        return list_tars(store, tars, where)
    # Beside images, or beside tars, parquet files are mostly what a downloader noted down.
    tables = sorted(file.path for file in files if is_table(file.path)) if image is None else []
    return list_tables(store, tables, where) if tables else list_images(files, where)
