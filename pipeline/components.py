"""WebDataset's rule: files with the same key, side by side in a tar, are the components of one sample.

Source: webdataset's `base_plus_ext`: the key is the path up to the first dot of the file's name.
"""

from __future__ import annotations

import os
from collections import Counter

from pipeline.errors import SourceError
from pipeline.labels import class_ids
from pipeline.listing import (
    IMAGE_EXTENSIONS,
    Listing,
    SourceFile,
    ignored_kind,
    is_hidden,
    is_image,
    most_common,
    printable,
    sample_refs,
)
from pipeline.tar_members import MAX_LABEL_BYTES

LABEL_EXTENSION = "cls"


def split_name(path: str) -> tuple[str, str]:
    """The key of a component, and what it is (`jpg`, `cls`, `seg.png`)."""
    folder, slash, name = path.rpartition("/")
    stem, _, extension = name.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def label_text(data: bytes, where: str) -> str:
    """What a `.cls` says: a number or a name. Raises SourceError."""
    try:
        text = data.decode().strip()
    except UnicodeDecodeError:
        text = ""
    if not text or len(data) > MAX_LABEL_BYTES or "\n" in text:
        raise SourceError(f"{where} holds {data[:40]!r}, which is no label; it must be one line, a number or a name")
    return text


def list_components(files: list[SourceFile], where: str) -> Listing | None:
    """List labelled samples: an image and its `.cls`; the rest is ignored. None if there are no labels.

    Raises:
        SourceError: a sample has two images, an image has no label while others have one, or a label makes no sense.
    """
    images, labels, ignored = _sorted_out(files)
    if not labels.keys() & images.keys():
        _refuse_dots(files, where)
        return None
    found, texts = [], []
    for sample, components in sorted(images.items()):
        if len(components) > 1:
            names = " and ".join(printable(file.path) for file in components)
            raise SourceError(f"{where} has two images in one sample ({names}), and one of them must go")
        if sample not in labels:
            path = printable(components[0].path)
            raise SourceError(f"{where} has no .cls beside {path}, but has others; label all images or none")
        found.append(components[0])
        texts.append(label_text(labels.pop(sample).text, f"{where}: {printable(sample[0])}.cls"))
    if labels:
        ignored[LABEL_EXTENSION] += len(labels)
    ids, classes = class_ids(set(texts), None, where)
    return Listing(sample_refs(found, [ids[text] for text in texts]), classes, most_common(ignored))


_Sample = tuple[str, str]  # key and archive


def _sorted_out(
    files: list[SourceFile],
) -> tuple[dict[_Sample, list[SourceFile]], dict[_Sample, SourceFile], Counter[str]]:
    """The images and the labels of all samples, and how many other files of each kind there are."""
    images: dict[_Sample, list[SourceFile]] = {}
    labels: dict[_Sample, SourceFile] = {}
    ignored: Counter[str] = Counter()
    for file in files:
        key, extension = split_name(file.path)
        if not is_hidden(file.path) and extension in IMAGE_EXTENSIONS:
            images.setdefault((key, file.archive), []).append(file)
        elif not is_hidden(file.path) and extension == LABEL_EXTENSION:
            labels[key, file.archive] = file
        else:
            ignored[ignored_kind(file.path)] += 1
    return images, labels, ignored


def _refuse_dots(files: list[SourceFile], where: str) -> None:
    """Raise SourceError if labels lie beside images whose names have more dots, which no WebDataset reader joins."""
    stems = {os.path.splitext(file.path)[0] for file in files if is_image(file.path)}
    for file in files:
        stem, extension = os.path.splitext(file.path)
        if extension.lower() == f".{LABEL_EXTENSION}" and stem in stems:
            raise SourceError(
                f"{where} has {printable(file.path)} beside an image, but a WebDataset key ends at the first dot, so "
                f"its label would be lost; rename them without further dots"
            )
