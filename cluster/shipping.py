"""What goes to a cluster with a job: our three packages as they are installed here, and the pins of what they need."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

PACKAGES = ("pipeline", "trainer", "cluster")
CONSTRAINTS = "cluster/constraints.txt"
_EXTRA = "gpu"
"""Of our extras, the one that a job needs: the decoder."""
_RAY_EXTRA = "train"
"""Of Ray's, the one that a cluster may not have; it answers jobs only with `default`."""
_IN_WORKING_DIR = f"--constraint ${{RAY_RUNTIME_ENV_CREATE_WORKING_DIR}}/{CONSTRAINTS}"
"""pip puts the variable's value in; Ray sets it where it unpacks the job's code."""


def stage(target: Path) -> None:
    """Copy the code into an empty folder, and nothing else: neither caches nor hidden files.

    The cluster's image may have another Tarmac or none. The staged one is found first, and knows its version.
    """
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        shutil.copytree(Path(spec.origin).parent, target / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    information = target / f"tarmac-{version()}.dist-info"
    information.mkdir()
    installed = metadata.distribution("tarmac")  # seen from a checkout it may be an egg, with another file
    (information / "METADATA").write_text(installed.read_text("METADATA") or installed.read_text("PKG-INFO") or "")


def version() -> str:
    """Of Tarmac."""
    return metadata.version("tarmac")


def runtime_env(staged: Path, *, pinned: bool) -> dict[str, Any]:
    """Ray's description of a job's environment.

    Args:
        staged: a folder made by `stage`.
        pinned: install what we need in the versions of constraints.txt, unless they are there; otherwise the job
            takes what the cluster has.
    """
    environment: dict[str, Any] = {"working_dir": str(staged)}
    if pinned:
        constraints = (staged / CONSTRAINTS).read_bytes()
        # Ray keeps an environment by its list: other constraints must make another list.
        digest = f"# constraints {hashlib.sha256(constraints).hexdigest()[:16]}"
        environment["pip"] = {"packages": [digest, _IN_WORKING_DIR, *pins(constraints.decode())]}
    return environment


def pins(constraints: str) -> list[str]:
    """Our own dependencies and Ray Train's, in the versions that the constraints have. Ray itself is the cluster's."""
    versions = {}
    for line in constraints.splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            versions[canonicalize_name(pin.name)] = pin.specifier
    wanted = _required("tarmac", _EXTRA) - {canonicalize_name("ray")}
    wanted |= _required("ray", _RAY_EXTRA) - _required("ray", "")
    return sorted(f"{name}{versions[name]}" for name in wanted)


def _required(distribution: str, extra: str) -> set[NormalizedName]:
    """What an installed distribution needs with one of its extras, or with none ("")."""
    needed = (Requirement(text) for text in metadata.requires(distribution) or ())
    return {canonicalize_name(one.name) for one in needed if not one.marker or one.marker.evaluate({"extra": extra})}
