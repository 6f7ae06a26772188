"""What a tar holds, as the folder would that it unpacks into: links followed, the last of several with one name."""

from __future__ import annotations

import errno
import tarfile
from collections.abc import Iterator
from typing import IO, NamedTuple, cast

from pipeline.errors import SourceError
from pipeline.listing import SourceFile
from pipeline.ranged_file import RangedFile
from pipeline.store import Store

# Instead of an offset, where there are no bytes to read.
NO_TARGET, SPARSE = -1, -2

# A label is a number or a name.
MAX_LABEL_BYTES = 1024

_TAR_BLOCK = 512
_REGULAR = (b"0", b"\0")
_MAX_LINKS = 40
_REASONS = {
    NO_TARGET: (errno.ENOENT, "a link to a file that is not in the tar"),
    SPARSE: (errno.ENOTSUP, "stored sparse, in pieces; make the tar anew without --sparse"),
}


class _Content(NamedTuple):
    num_bytes: int
    offset: int
    text: bytes = b""


class _Special(NamedTuple):
    """A pipe or a device."""


class _Link(NamedTuple):
    """A symbolic link, as it is written."""

    target: str


_Folder = dict[str, "_Folder | _Content | _Link | _Special"]
_Way = tuple[_Folder, ...]  # from the top of the tar down to a folder


def unreadable(offset: int) -> OSError | None:
    """Why a member at this `offset` cannot be read; None if it can."""
    return OSError(*_REASONS[offset]) if offset in _REASONS else None


def tar_members(store: Store, name: str, block_bytes: int, begin: int = 0) -> Iterator[SourceFile]:
    """The files in the tar `name`, by one pass over its headers, read `block_bytes` at a time.

    Links within the tar are followed, round no circles, and hidden folders skipped, as in a folder. A link that leads
    nowhere, or out of the tar, gives a file of 0 bytes at the offset NO_TARGET; a sparse file is at SPARSE.

    Args:
        store: where the tar is.
        name: its path there.
        block_bytes: what is read at a time.
        begin: where it starts, if it lies inside of another one.

    Raises:
        SourceError: it is not a whole uncompressed tar.
        StoreError: the store does not answer or refuses us.
    """
    top: _Folder = {}
    stream = RangedFile(store, name, block_bytes)
    stream.seek(begin)
    num_files = 0
    try:
        with tarfile.open(fileobj=cast("IO[bytes]", stream), mode="r:") as tar:
            while (member := _plain_file(tar, stream) or tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # or a million headers stay in memory
                _add(top, member, _label_text(stream, member))
                num_files += not member.isdir()
            end = tar.offset
        stream.seek(end)
        if any(stream.read(_TAR_BLOCK)):
            raise tarfile.ReadError("bad header")
    except tarfile.TarError as error:
        inner = f", in the tar at byte {begin}" if begin else ""
        raise SourceError(
            f"{store}/{name} is not a whole uncompressed tar: {error}, after {num_files} files{inner}; copy it anew, "
            f"or unpack what it holds into a folder"
        ) from error
    return _walk((top,), "", ())


def _plain_file(tar: tarfile.TarFile, stream: RangedFile) -> tarfile.TarInfo | None:
    """The next member, past which `tar` goes on, if its header says all of it; None leaves it to tarfile.

    Nearly all members of nearly all tars are such, and with tarfile, which looks for all that may be there, a listing
    takes half as long again.

    Source: POSIX.1-1988, ustar interchange format.
    """
    if tar.firstmember is not None or tar.pax_headers:  # type: ignore[attr-defined]
        return None
    stream.seek(tar.offset - 1)  # as tarfile does, to see whether all of the member before is there
    header = stream.read(1 + _TAR_BLOCK)[1:]
    # Other kinds have rules of their own; what is at 345 may be the rest of a name.
    if len(header) < _TAR_BLOCK or header[156:157] not in _REGULAR or header[345]:
        return None
    name, num_bytes, checksum = header[:100].partition(b"\0")[0], _octal(header[124:136]), header[148:156]
    if num_bytes < 0 or name.endswith(b"/") or sum(header) - sum(checksum) + 8 * ord(" ") != _octal(checksum):
        return None
    member = tarfile.TarInfo(name.decode("utf-8", "surrogateescape"))
    member.size, member.offset_data = num_bytes, tar.offset + _TAR_BLOCK
    tar.offset = member.offset_data + num_bytes + -num_bytes % _TAR_BLOCK
    return member


def _octal(field: bytes) -> int:
    """A number as all tars write it; -1 for other ways, and for what is none."""
    digits = field.rstrip(b" \0")
    return int(digits, 8) if digits.isdigit() and max(digits) < ord("8") else -1


def _label_text(stream: RangedFile, member: tarfile.TarInfo) -> bytes:
    """What a `.cls` holds, which lies in the block that its header came with. It is read to one byte too many."""
    if not (member.name.endswith(".cls") and member.isreg() and not member.issparse()):
        return b""
    stream.seek(member.offset_data)
    return stream.read(min(member.size, MAX_LABEL_BYTES + 1))


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]


def _add(top: _Folder, member: tarfile.TarInfo, text: bytes) -> None:
    """Put a member where unpacking it would."""
    *folders, name = _parts(member.name) or [""]
    if not name:  # the folder that was packed
        return
    folder = top
    for part in folders:
        inner = folder.get(part)
        if not isinstance(inner, dict):
            inner = folder[part] = {}
        folder = inner
    if member.isdir():
        if not isinstance(folder.get(name), dict):
            folder[name] = {}
    elif member.issym():
        folder[name] = _Link(member.linkname)
    elif member.islnk():
        folder[name] = _hard_link_target(top, member.linkname)
    elif member.issparse():
        folder[name] = _Content(0, SPARSE)
    else:
        folder[name] = _Content(member.size, member.offset_data, text) if member.isreg() else _Special()


def _hard_link_target(top: _Folder, path: str) -> _Content | _Link | _Special:
    """What is at `path` by now: a hard link shares it, whatever gets that name later."""
    found: _Folder | _Content | _Link | _Special | None = top
    for part in _parts(path):
        found = found.get(part) if isinstance(found, dict) else None
    return _Content(0, NO_TARGET) if found is None or isinstance(found, dict) else found


def _walk(way: _Way, prefix: str, parents: tuple[int, ...]) -> Iterator[SourceFile]:
    """Files in the last folder of `way`; `parents` came before it, so that a link to one of them ends there."""
    folder = way[-1]
    if id(folder) in parents:
        return
    for name, entry in folder.items():
        found: _Way | _Content | _Special | None
        if isinstance(entry, dict):
            found = (*way, entry)
        else:
            found = _follow(way, entry.target) if isinstance(entry, _Link) else entry
        if isinstance(found, _Content):
            yield SourceFile(f"{prefix}{name}", *found)
        elif isinstance(found, _Special):
            yield SourceFile(f"{prefix}{name}/.", 0)
        elif found is None:
            yield SourceFile(f"{prefix}{name}", 0, NO_TARGET)
        elif not name.startswith("."):
            yield from _walk(found, f"{prefix}{name}/", (*parents, id(folder)))


def _follow(way: _Way, target: str) -> _Way | _Content | _Special | None:
    """Where a link in the last folder of `way` leads: the way to a folder, a file, or None if out or nowhere."""
    waiting = _parts(target)[::-1]
    num_links = 0
    if target.startswith("/"):
        return None
    while waiting:
        part = waiting.pop()
        if part == "..":
            way = way[:-1]
            if not way:
                return None
            continue
        entry = way[-1].get(part)
        if isinstance(entry, _Link):
            num_links += 1
            if num_links > _MAX_LINKS or entry.target.startswith("/"):
                return None
            waiting += _parts(entry.target)[::-1]
        elif isinstance(entry, dict):
            way = (*way, entry)
        else:
            return None if waiting else entry
    return way
