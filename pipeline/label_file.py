"""Labels of images in a file beside them, such as the ground truth of ImageNet's validation set."""

from __future__ import annotations

import os
from dataclasses import replace

from pipeline.errors import SourceError
from pipeline.labels import are_numbers, class_ids
from pipeline.listing import Listing, printable


def with_labels(listing: Listing, lines: list[str], classes: tuple[str, ...] | None, where: str) -> Listing:
    """The same images with the labels of a file.

    Args:
        listing: images in the order of their paths; classes that it has are replaced.
        lines: a label for each image in the order of its names, or `name label` lines in any order.
        classes: names in the order of the labels, if they are known.
        where: the file, for errors.

    Raises:
        SourceError: the file does not fit the images or the classes.
    """
    values = _values(listing, lines, where)
    numbers = sorted({int(value) for value in values}) if are_numbers(set(values)) else [0]
    if numbers[0] == 0:
        ids, names = class_ids(set(values), classes, where)
        labels = [ids[value] for value in values]
    else:
        labels, names = _counted_from_1([int(value) for value in values], classes, where)
    refs = tuple(replace(ref, label=label) for ref, label in zip(listing.refs, labels, strict=True))
    return replace(listing, refs=refs, classes=names)


def _values(listing: Listing, lines: list[str], where: str) -> list[str]:
    """Each image's label as it is written."""
    pairs = [line.replace(",", " ").rsplit(maxsplit=1) for line in lines]
    if {len(pair) for pair in pairs} == {1}:
        if len(lines) != len(listing.refs):
            raise SourceError(f"{where} has {len(lines)} labels for {len(listing.refs)} images; give each image one")
        order = sorted(range(len(lines)), key=lambda i: (_name(listing.refs[i].path), i))
        values = [""] * len(lines)
        for position, (value,) in zip(order, pairs, strict=True):
            values[position] = value
        return values
    by_name: dict[str, str] = {}
    for line, pair in zip(lines, pairs, strict=True):
        if len(pair) != 2:
            raise SourceError(f"{where} has the line {line!r}; each must be a label, or each a name and a label")
        name = _stem(pair[0])
        if by_name.setdefault(name, pair[1]) != pair[1]:
            raise SourceError(f"{where} gives {name} two labels, {by_name[name]} and {pair[1]}; leave one out")
    for ref in listing.refs:
        if _stem(ref.path) not in by_name:
            raise SourceError(f"{where} has no label for {printable(ref.path)}; label all images")
    return [by_name[_stem(ref.path)] for ref in listing.refs]


def _counted_from_1(ids: list[int], classes: tuple[str, ...] | None, where: str) -> tuple[list[int], tuple[str, ...]]:
    """Labels of ids without a 0, as in ILSVRC's development kit.

    These number the classes in an order of their own. With their names, the labels follow the names' alphabetical
    order, which is the order of class folders: so a validation set fits its training set.
    """
    if classes is None:
        _, names = class_ids({str(i) for i in ids}, None, where)
        return [i - 1 for i in ids], names[1:]
    if max(ids) != len(classes):
        raise SourceError(
            f"{where} has labels from {min(ids)} to {max(ids)} and the classes file {len(classes)} names: it is "
            f"unclear whether they count from 0 or from 1; give as many names as the highest label, or a label 0"
        )
    names = tuple(sorted(classes))
    positions = {name: position for position, name in enumerate(names)}
    return [positions[classes[i - 1]] for i in ids], names


def _name(path: str) -> str:
    return os.path.basename(path)


def _stem(path: str) -> str:
    return os.path.splitext(_name(path))[0]
