"""The record that makes a directory a checkpoint: written last, with every file's size and checksum."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import google_crc32c

from trainer.errors import CheckpointError

CHECKPOINTS = "checkpoints"
COMMIT = "commit.json"
DAMAGED = "commit.damaged.json"
"""What `set_aside` makes of the record of a checkpoint that does not verify."""
VERSION = 1

_DIRECTORY = re.compile(r"step_(\d{9,})")


class DamagedCommitError(CheckpointError):
    """A commit record does not hold what it should."""


@dataclass(frozen=True)
class FileRecord:
    """A file of a checkpoint: its length, and its CRC-32C as eight hexadecimal digits."""

    num_bytes: int
    crc32c: str


@dataclass(frozen=True)
class Commit:
    """A checkpoint that was written to its end."""

    step: int
    """Completed optimizer updates."""
    samples_seen: int
    world_size: int
    """Ranks that wrote it; any number may read it."""
    files: Mapping[str, FileRecord]
    version: int = VERSION

    @property
    def directory(self) -> str:
        """Where it lies, from the run's URL."""
        return step_directory(self.step)

    @property
    def num_bytes(self) -> int:
        """Size of all its files."""
        return sum(record.num_bytes for record in self.files.values())

    def to_json(self) -> bytes:
        """The bytes of commit.json, which vouch for themselves too."""
        body = asdict(self)
        return json.dumps(body | {"crc32c": _checksum(body)}, indent=1, sort_keys=True).encode()


def step_directory(step: int) -> str:
    """Directory of the checkpoint of `step`, from the run's URL."""
    return f"{CHECKPOINTS}/step_{step:09d}"


def step_of(directory: str) -> int | None:
    """The step of a directory below the run's URL, or None if it is not named like a checkpoint."""
    parent, _, name = directory.rpartition("/")
    match = _DIRECTORY.fullmatch(name)
    return int(match[1]) if parent == CHECKPOINTS and match else None


def parse_commit(data: bytes, directory: str) -> Commit:
    """The commit of `directory`.

    Raises:
        DamagedCommitError: it is not whole, not true to its own checksum, or of another directory.
        CheckpointError: it is of a format that this code does not know.
    """
    try:
        body: dict[str, Any] = json.loads(data)
        checksum = body.pop("crc32c")
        if checksum != _checksum(body):
            raise DamagedCommitError(f"says crc32c {checksum} of itself and has {_checksum(body)}")
        if body["version"] != VERSION:
            raise CheckpointError(
                f"{directory}/{COMMIT} has format version {body['version']} and this code reads {VERSION}; "
                "update tarmac to go on with this run"
            )
        files = {name: FileRecord(**record) for name, record in body.pop("files").items()}
        commit = Commit(**body, files=files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCommitError(f"is not a commit record ({error})") from error
    if commit.directory != directory:
        raise DamagedCommitError(f"is the commit of {commit.directory}")
    return commit


def _checksum(body: dict[str, Any]) -> str:
    return hex_crc32c(google_crc32c.value(json.dumps(body, sort_keys=True).encode()))


def hex_crc32c(value: int) -> str:
    """A CRC-32C as commit.json has it."""
    return f"{value:08x}"
