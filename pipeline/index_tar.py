"""One tar that somebody else wrote: read once, and what its indexes say of it."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any, cast

import google_crc32c
import numpy as np

from pipeline.components import LABEL_EXTENSION, label_text, split_name
from pipeline.errors import SourceError
from pipeline.images import MAX_IMAGE_BYTES, BadImageError, measure_image
from pipeline.labels import MAX_CLASSES, are_numbers
from pipeline.listing import IMAGE_EXTENSIONS, ignored_kind, is_hidden, printable
from pipeline.manifest import UNLABELLED, BadSample, ShardIndex
from pipeline.ranged_file import HashedFile
from pipeline.shards import IDX_VERSION, Flag, StoppedError
from pipeline.store import Store
from pipeline.tar_members import MAX_LABEL_BYTES

READ_BYTES = 8 * 2**20

_TAR_BLOCK = 512


@dataclass
class _Sample:
    """The components with one key, as far as they came: what each is, its offset, its length and its path."""

    key: str
    parts: list[tuple[str, int, int, str]] = field(default_factory=list)
    image: int | None = None  # position in `parts`
    size: tuple[int, int] = (0, 0)
    crc32c: int = 0
    label: str | None = None
    damage: str | None = None


@dataclass
class TarRows:
    """What a tar holds.

    Args:
        where: its URL.
        samples: those that are good.
        bad_samples: images that cannot be trained on.
        ignored: files that are neither images nor labels, by kind.
        num_bytes: length of the tar.
        sha256: of the tar.
    """

    where: str
    samples: list[_Sample] = field(default_factory=list)
    bad_samples: list[BadSample] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    num_bytes: int = 0
    sha256: str = ""

    def label_texts(self) -> list[str] | None:
        """All labels that occur, sorted; None without labels. Raises SourceError if only some samples have one."""
        texts = {sample.label for sample in self.samples}
        if texts == {None}:
            return None
        for sample in self.samples:
            if sample.label is None:
                path = printable(sample.parts[sample.image or 0][3])
                raise SourceError(f"{self.where} has no .cls beside {path}, but has others; label all images or none")
        return sorted(cast("set[str]", texts))

    def index(self, label_ids: dict[str, int]) -> ShardIndex:
        """The parquet index's columns."""
        rows = [
            (*_image(sample)[1:3], sample.crc32c, *sample.size, label_ids[sample.label] if sample.label else UNLABELLED)
            for sample in self.samples
        ]
        dtypes = (np.int64, np.int64, np.uint32, np.int32, np.int32, np.int32)
        columns: list[Any] = list(zip(*rows, strict=True))
        arrays = [np.array(column, dtype) for column, dtype in zip(columns, dtypes, strict=True)]
        return ShardIndex(np.array([sample.key for sample in self.samples], np.dtypes.StringDType()), *arrays)

    def idx(self) -> bytes:
        """DALI's index, all components; the image comes first. Source: tools/wds2idx.py of DALI, format v1.2."""
        lines = [f"{IDX_VERSION} {len(self.samples)}"]
        for sample in self.samples:
            image = _image(sample)
            parts = [image, *(part for part in sample.parts if part is not image)]
            # Fields are set apart by spaces, and the path is there for messages only.
            fields = (f"{kind} {offset} {size} {'_'.join(path.split())}" for kind, offset, size, path in parts)
            lines.append(" ".join(fields))
        return "".join(f"{line}\n" for line in lines).encode()


def first_label_ids(texts: list[str] | None) -> dict[str, int]:
    """Labels as far as one tar tells: numbers are themselves, names are counted."""
    if texts is None:
        return {}
    if are_numbers(texts) and all(str(int(text)) == text and int(text) < MAX_CLASSES for text in texts):
        return {text: int(text) for text in texts}
    return {text: position for position, text in enumerate(texts)}


def read_tar(store: Store, path: str, max_bad: int, stop: Flag) -> TarRows:
    """Read a tar once, and look at each image's header.

    Args:
        store: the dataset's URL.
        path: the tar's path there.
        max_bad: it is given up after one more bad image than this.
        stop: give up when it is set.

    Raises:
        SourceError: it is not a whole uncompressed tar, or has a sample that is unclear.
        StoppedError: `stop` was set.
        StoreError: the store does not answer or refuses us.
    """
    rows = TarRows(f"{store}/{path}")
    file = HashedFile(store, path, READ_BYTES)
    keys: set[str] = set()
    try:
        with tarfile.open(fileobj=cast("IO[bytes]", file), mode="r:") as tar:
            for sample in _samples(tar, rows):
                if stop.is_set():
                    raise StoppedError
                if sample.key in keys:
                    raise SourceError(f"{rows.where} has the key {sample.key!r} twice; WebDataset keys must be unique")
                keys.add(sample.key)
                if sample.damage is None:
                    rows.samples.append(sample)
                    continue
                rows.bad_samples.append(BadSample(printable(f"{path}/{_image(sample)[3]}"), sample.damage))
                if len(rows.bad_samples) > max_bad:
                    return rows
            end = tar.offset
        file.seek(end)
        if any(file.read(_TAR_BLOCK)):
            raise tarfile.ReadError("bad header")
    except tarfile.TarError as error:
        raise SourceError(
            f"{rows.where} is not a whole uncompressed tar: {error}, after {len(keys)} samples; copy it anew, or "
            f"move it away"
        ) from error
    rows.sha256 = file.finish()
    rows.num_bytes = file.num_bytes
    return rows


def _samples(tar: tarfile.TarFile, rows: TarRows) -> Iterator[_Sample]:
    """The samples with an image, in the order of the tar; the rest is counted in `rows.ignored`."""
    sample = _Sample("")
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # or a million headers stay in memory
        if member.isdir():
            continue
        name = member.name.removeprefix("./")
        key, kind = split_name(name)
        if not member.isreg() or member.issparse() or is_hidden(name) or not kind:
            rows.ignored[ignored_kind(name if member.isreg() else f"{name}/.")] += 1
            continue
        if printable(key) != sample.key:
            if sample.image is not None:
                yield sample
            sample = _Sample(printable(key))
        sample.parts.append((printable(kind), member.offset_data, member.size, printable(name)))
        if kind in IMAGE_EXTENSIONS:
            _look_at_image(tar, member, sample, rows.where)
        elif kind == LABEL_EXTENSION:
            sample.label = label_text(_read(tar, member, MAX_LABEL_BYTES + 1), f"{rows.where}: {printable(name)}")
        else:
            rows.ignored[ignored_kind(name)] += 1
    if sample.image is not None:
        yield sample


def _look_at_image(tar: tarfile.TarFile, member: tarfile.TarInfo, sample: _Sample, where: str) -> None:
    if sample.image is not None:
        names = f"{_image(sample)[3]} and {printable(member.name)}"
        raise SourceError(f"{where} has two images in one sample ({names}), and it is unclear which is meant")
    sample.image = len(sample.parts) - 1
    if member.size > MAX_IMAGE_BYTES:
        sample.damage = f"{member.size} bytes are more than an image may have ({MAX_IMAGE_BYTES})"
        return
    data = _read(tar, member, member.size)
    if len(data) < member.size:
        raise tarfile.ReadError("unexpected end of data")
    sample.crc32c = google_crc32c.value(data)
    try:
        sample.size = measure_image(data)
    except BadImageError as error:
        sample.damage = str(error)


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo, num_bytes: int) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # a regular file
    return file.read(num_bytes)


def _image(sample: _Sample) -> tuple[str, int, int, str]:
    assert sample.image is not None
    return sample.parts[sample.image]
