"""Labels that are written down as text: numbers or names -> positions in a list of classes."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import replace

from pipeline.config import StoreConfig
from pipeline.errors import SourceError
from pipeline.listing import Listing
from pipeline.store import Store

# More would be something else than classes, and the manifest would not stay small.
MAX_CLASSES = 2**20


def are_numbers(texts: Collection[str]) -> bool:
    """Whether all labels are whole numbers from 0."""
    return all(text.isascii() and text.isdecimal() for text in texts)


def class_ids(
    texts: Collection[str], classes: tuple[str, ...] | None, where: str
) -> tuple[dict[str, int], tuple[str, ...]]:
    """The label of each text, and the names of all classes.

    Numbers are labels as they are, and positions in `classes` if these are given. Names are looked up in
    `classes`, or numbered in their order.

    Args:
        texts: all that occur.
        classes: names in the order of the labels, if they are known.
        where: names the source, for errors.

    Raises:
        SourceError: a number or a name is not in `classes`, or there are too many.
    """
    if are_numbers(texts):
        numbers = {text: int(text) for text in texts}
        highest = max(numbers.values())
        if highest >= (len(classes) if classes else MAX_CLASSES):
            limit = f"the classes file has {len(classes)} names" if classes else f"there may be {MAX_CLASSES} classes"
            raise SourceError(f"{where} has the label {highest}, but {limit}, counted from 0; correct one of them")
        return numbers, classes or tuple(str(number) for number in range(highest + 1))
    names = classes or tuple(sorted(texts))
    positions = {name: position for position, name in enumerate(names)}
    for text in sorted(texts):
        if text not in positions:
            raise SourceError(f"{where} has the class {text!r}, which is not in the classes file; add it there")
    if len(names) > MAX_CLASSES:
        raise SourceError(f"{where} has {len(names)} classes; there may be {MAX_CLASSES}: are they captions?")
    return {text: positions[text] for text in texts}, names


def split_url(url: str, store_config: StoreConfig) -> tuple[Store, str]:
    """The folder that a file is in, and its name there."""
    parent, _, name = (url if "://" in url else os.path.abspath(url)).rpartition("/")
    return Store(parent or "/", store_config), name


def read_lines(path: str, store_config: StoreConfig) -> list[str]:
    """The lines of a text file, a local one or at a URL, without blank ones.

    Raises:
        SourceError: it is no UTF-8 text, or empty.
        StoreError: it is missing or cannot be read.
    """
    store, name = split_url(path, store_config)
    try:
        text = store.read(name).decode()
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not a text file in UTF-8 ({error}); give one line a class or a label") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise SourceError(f"{path} is empty; give one line a class or a label")
    return lines


def read_classes(path: str, store_config: StoreConfig) -> tuple[str, ...]:
    """Class names, one a line in the order of the labels. Raises SourceError, StoreError."""
    names = tuple(read_lines(path, store_config))
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise SourceError(f"{path} names the class {twice!r} twice; each line must be another class")
    return names


def with_classes(listing: Listing, classes: tuple[str, ...], where: str) -> Listing:
    """The same images, their labels being positions in `classes`. Raises SourceError."""
    if listing.classes is None:
        raise SourceError(f"{where} has no labels, so a classes file says nothing; leave it out")
    used = sorted({ref.label for ref in listing.refs})
    ids, _ = class_ids([listing.classes[label] for label in used], classes, where)
    refs = tuple(replace(ref, label=ids[listing.classes[ref.label]]) for ref in listing.refs)
    return replace(listing, refs=refs, classes=classes)
