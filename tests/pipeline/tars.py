"""Tars as other tools write them, for several tests."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """A tar of (name, content), in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def samples(photos: Iterable[Path], labels: Iterable[str | None]) -> Iterator[tuple[str, bytes]]:
    """`000000.cls`, `000000.jpg`, `000000.json` and so on, in the order in which `tar --sort=name` has them."""
    for number, (photo, label) in enumerate(zip(photos, labels, strict=True)):
        if label is not None:
            yield f"{number:06d}.cls", label.encode()
        yield f"{number:06d}.jpg", photo.read_bytes()
        yield f"{number:06d}.json", b'{"caption": "a photograph"}'
