"""Every byte of one tar against its manifest and its index."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import IO, cast

import google_crc32c

from pipeline.components import LABEL_EXTENSION, split_name
from pipeline.errors import StoreNotFoundError
from pipeline.index_tar import READ_BYTES
from pipeline.listing import printable
from pipeline.manifest import Manifest, ShardIndex, ShardInfo, tar_path
from pipeline.ranged_file import HashedFile
from pipeline.store import Store


def tar_problems(store: Store, info: ShardInfo, index: ShardIndex | None, manifest: Manifest) -> Iterator[str]:
    """What is wrong with a tar; without an index, its sha256 alone is compared. Raises StoreError."""
    file = HashedFile(store, tar_path(info.name), READ_BYTES)
    try:
        with tarfile.open(fileobj=cast("IO[bytes]", file), mode="r:") as tar:
            if index is not None and manifest.settings.get("indexed"):
                yield from _indexed_problems(tar, index, manifest.classes)
            elif index is not None:
                yield from _sample_problems(tar, index)
    except tarfile.TarError as error:
        yield f"cannot be read as a tar: {error}"
    except StoreNotFoundError:
        yield "is missing"
        return
    found = file.finish()
    if found != info.sha256:
        yield f"has sha256 {found}; the manifest says {info.sha256}"


def _sample_problems(tar: tarfile.TarFile, index: ShardIndex) -> Iterator[str]:
    """Compare the members of a tar of ours, in their order, with the rows of the index."""
    row = -1
    for member in tar:
        data = _read(tar, member)
        key, _, extension = member.name.partition(".")
        if extension == LABEL_EXTENSION:
            if row < 0 or data != str(index.label[row]).encode():
                yield f"{member.name} holds {data[:20]!r}, which is not the label in the index"
            continue
        row += 1
        if row >= len(index):
            continue
        where = f"sample {row} ({index.keys[row]})"
        if key != index.keys[row]:
            yield f"{where} is called {member.name}"
        if member.offset_data != index.offset[row] or len(data) != index.num_bytes[row]:
            yield f"{where} lies at {member.offset_data} with {len(data)} bytes, not where the index says"
        elif (crc := google_crc32c.value(data)) != index.crc32c[row]:
            yield f"{where} has crc32c {crc:08x}; the index says {index.crc32c[row]:08x}"
    if row + 1 != len(index):
        yield f"has {row + 1} images; the index says {len(index)}"


def _indexed_problems(tar: tarfile.TarFile, index: ShardIndex, classes: tuple[str, ...] | None) -> Iterator[str]:
    """Compare the members of somebody else's tar with the rows of the index, which need not name all of them."""
    rows = {key: row for row, key in enumerate(index.keys.tolist())}
    images = dict(zip(index.offset.tolist(), range(len(index)), strict=True))
    for member in tar:
        name = printable(member.name.removeprefix("./"))
        key, extension = split_name(name)
        if (row := images.pop(member.offset_data, None)) is not None and member.isreg():
            data = _read(tar, member)
            where = f"sample {row} ({index.keys[row]})"
            if key != index.keys[row] or len(data) != index.num_bytes[row]:
                yield f"{where} is {name} with {len(data)} bytes, which is not what the index says"
            elif (crc := google_crc32c.value(data)) != index.crc32c[row]:
                yield f"{where} has crc32c {crc:08x}; the index says {index.crc32c[row]:08x}"
        elif extension == LABEL_EXTENSION and classes is not None and key in rows and member.isreg():
            label = int(index.label[rows[key]])
            text = _read(tar, member).decode("utf-8", "backslashreplace").strip()
            if text != classes[label] and not (text.isdecimal() and int(text) == label):
                yield f"{name} holds {text[:20]!r}, which is not the label in the index"
    for row in images.values():
        yield f"sample {row} ({index.keys[row]}) is not in it"


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return b"" if file is None else file.read()
