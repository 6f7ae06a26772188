"""The files of a source sorted out: which are images, what their classes are, and the names they get in a dataset."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.errors import SourceError

# What our image library decodes; a content that differs from the name is found out when it is decoded.
IMAGE_EXTENSIONS = frozenset(
    ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "tif", "tiff", "gif"),
)
# A USTAR name has 100 bytes: the key, a dot, and an extension of four letters at the most.
MAX_KEY_BYTES = 90
# The manifest names as many kinds of ignored files, so that it stays small whatever the files are called.
MAX_IGNORED_KINDS = 20

_SAFE_BYTES = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-/")


@dataclass(frozen=True, slots=True)
class SampleRef:
    """One image of a source.

    Args:
        key: its name in the dataset, tar-safe and unique: letters, digits and `_-/%=`.
        path: its path in the source.
        num_bytes: its length; about, where it is a row of a table.
        label: position in the listing's classes; -1 where there are none.
        offset: first byte in the archive; 0 for a file of its own, negative where there is nothing to read.
            In a table, its row in the row group.
        archive: the path of the archive that `path` lies in, where a source has several.
        group: the row group, in a table; -1 elsewhere.
    """

    key: str
    path: str
    num_bytes: int
    label: int
    offset: int = 0
    archive: str = ""
    group: int = -1

    @property
    def where(self) -> str:
        """The archive and the path in it, fit for a message."""
        if self.group >= 0:
            return printable(f"{self.archive}, row {self.offset} of row group {self.group}")
        return printable(f"{self.archive}/{self.path}" if self.archive else self.path)


@dataclass(frozen=True, slots=True)
class Listing:
    """What a source holds, its images sorted by path.

    Args:
        refs: the images.
        classes: names in the order of the labels; None without labels.
        ignored_extensions: how many files are no images, by extension in lower case; `(none)` without one,
            `(hidden)` for names that start with a dot, `(special)` for pipes and devices, `(other)` for the rarest.
    """

    refs: tuple[SampleRef, ...]
    classes: tuple[str, ...] | None
    ignored_extensions: dict[str, int] = field(default_factory=dict)

    @property
    def num_ignored_files(self) -> int:
        """Files that are no images."""
        return sum(self.ignored_extensions.values())


class SourceFile(NamedTuple):
    """A file of a source, by its path there, or in one of its archives; `text` is what a `.cls` in a tar holds.

    A path that ends in `/.` is a pipe or a device.
    """

    path: str
    num_bytes: int
    offset: int = 0
    text: bytes = b""
    archive: str = ""


def list_images(files: Iterable[SourceFile], where: str) -> Listing:
    """Sort out images from other files, find the classes, and name the samples.

    Raises:
        SourceError: there are no images, or it is unclear whether their folders are classes; `where` names the source.
    """
    images, ignored = [], Counter[str]()
    for file in files:
        if is_image(file.path):
            images.append(file)
        else:
            ignored[ignored_kind(file.path)] += 1
    if not images:
        raise SourceError(
            f"{where} holds no images ({ignored.total()} other files); give a folder or a tar with "
            f"class/name.jpg, or with images side by side. Image extensions are "
            f"{', '.join(sorted(IMAGE_EXTENSIONS))}"
        )
    images.sort()
    skip = _common_folder_length([image.path for image in images])
    folders = [_class_folder(image.path[skip:]) for image in images]
    if None in folders and set(folders) != {None}:
        flat = images[folders.index(None)].path
        nested = next(image.path for image, folder in zip(images, folders, strict=True) if folder is not None)
        raise SourceError(
            f"{where} holds images both at its top ({printable(flat)}) and in folders ({printable(nested)}), so "
            f"it is unclear whether folders are classes; move the former into a folder, or the latter to the top"
        )
    names = sorted({folder for folder in folders if folder is not None})
    labels = {name: label for label, name in enumerate(names)}
    refs = sample_refs(images, [-1 if folder is None else labels[folder] for folder in folders], skip)
    return Listing(refs, tuple(printable(name) for name in names) or None, most_common(ignored))


def sample_refs(images: list[SourceFile], labels: list[int], skip: int = 0) -> tuple[SampleRef, ...]:
    """Name the samples by their paths, less `skip` characters; by their archive too where paths occur twice."""
    paths = [image.path[skip:] for image in images]
    if len(set(paths)) < len(paths):
        paths = [f"{os.path.splitext(image.archive)[0]}/{path}" for image, path in zip(images, paths, strict=True)]
    return tuple(
        SampleRef(key, image.path, image.num_bytes, label, image.offset, image.archive)
        for key, image, label in zip(sample_keys(paths), images, labels, strict=True)
    )


def printable(path: str) -> str:
    """`path` with bytes that are no UTF-8 written as escapes, fit for a log and for JSON."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def is_image(path: str) -> bool:
    """Whether a file is a candidate: by its extension, and neither it nor a folder above it is hidden."""
    return not is_hidden(path) and os.path.splitext(path)[1][1:].lower() in IMAGE_EXTENSIONS


def is_hidden(path: str) -> bool:
    """Whether the file or a folder above it has a name that starts with a dot."""
    return any(part.startswith(".") for part in path.split("/"))


def ignored_kind(path: str) -> str:
    """What a file that is no image is counted under."""
    if path.endswith("/."):
        return "(special)"
    return "(hidden)" if is_hidden(path) else printable(os.path.splitext(path)[1][1:].lower()) or "(none)"


def most_common(ignored: Counter[str]) -> dict[str, int]:
    """The most frequent kinds, and the rest as `(other)`; in the order of their names, the same each time."""
    ranked = sorted(ignored.items(), key=lambda item: (-item[1], item[0]))
    kept = dict(sorted(ranked[:MAX_IGNORED_KINDS]))
    num_others = sum(count for _, count in ranked[MAX_IGNORED_KINDS:])
    return kept | ({"(other)": num_others} if num_others else {})


def _class_folder(path: str) -> str | None:
    """The folder that makes the class; None at the top. Object stores allow keys with empty parts."""
    folder, slash, _ = path.lstrip("/").partition("/")
    return folder if slash else None


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


def sample_keys(paths: list[str]) -> list[str]:
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
