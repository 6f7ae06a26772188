"""What the two kinds of manifests share: how many nodes a job needs, the command it runs, spot per cloud."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml

from cluster.config import JobConfig
from cluster.options import UsageError
from pipeline.urls import without_secrets

Cloud = Literal["aws", "gcp", "azure"]

DRAIN_S = {"aws": 90, "gcp": 10, "azure": 20}
"""Seconds of a spot node's notice that are given to draining: of 120 on EC2, 15 for pods of GKE, 30 on Azure."""

_NAME = re.compile(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?")
"""KubeRay makes names of pods and services of it by appending to it; GCP allows as much for labels."""
_QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?")
_REQUIREMENT = re.compile(r"://|\.whl$")
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Nodes:
    """The machines that a job's workers are on, all alike."""

    least: int
    most: int
    workers: int
    """On each."""
    num_cpus: int
    """For the workers of one."""
    num_gpus: int


def nodes_of(job: JobConfig, workers_per_node: int) -> Nodes:
    """The nodes for a job's workers.

    Raises:
        UsageError: the workers do not fill whole nodes.
    """
    for name, count in (("fewest", job.least_workers), ("most", job.num_workers)):
        if workers_per_node < 1 or count % workers_per_node:
            raise UsageError(
                f"--workers-per-node ({workers_per_node}) must be at least 1 and divide the {name} workers of "
                f"--num-workers ({count}): nodes are all alike"
            )
    num_cpus = math.ceil(job.cpus_per_worker * workers_per_node)
    num_gpus = int(job.gpus_per_worker * workers_per_node)
    least, most = job.least_workers // workers_per_node, job.num_workers // workers_per_node
    return Nodes(least, most, workers_per_node, num_cpus, num_gpus)


def pretrain_command(recipe: str, job: JobConfig, overrides: Sequence[str]) -> str:
    """The command that a person would type on the cluster.

    Args:
        recipe: its name.
        job: whose two URLs are taken.
        overrides: the rest of the command line, as it was given.
    """
    return shlex.join(("tarmac", "pretrain", recipe, "--data", job.data, "--run", job.run, *overrides))


def dump(document: dict[str, Any], heading: str) -> str:
    """YAML in the order of the document, under a comment."""
    comment = "".join(f"# {line}\n" for line in heading.splitlines())
    return comment + str(yaml.safe_dump(document, sort_keys=False, width=1000, allow_unicode=True))


def check_url(name: str, url: str) -> None:
    """Raise UsageError unless every node can read `url`, and it holds no secret."""
    parts = urlsplit(url)
    if "://" not in url or parts.scheme in ("file", "local", "memory"):
        raise UsageError(f"--{name} ({url}) must be a URL that all nodes reach, as in s3://bucket/path")
    if "@" in parts.netloc or parts.query:
        plain = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise UsageError(
            f"--{name} ({plain} with a user or a query) must hold no secret: manifests are kept and shown; leave that "
            "out and give the nodes a role"
        )


def check_install(install: str | None) -> str | Path:
    """What nodes install: a wheel of this machine, or a pip requirement that says where from.

    Raises:
        UsageError: it is a name that pip would look up in an index, holds a secret, or names no wheel that is here.
    """
    forms = (
        "a wheel here (`pip wheel --no-deps --wheel-dir dist .`), or a requirement with the URL of a wheel or of git"
    )
    if install is None or not _REQUIREMENT.search(install):
        given = f"--install ({install})" if install else "ray-up needs --install, which"
        raise UsageError(
            f"{given} must be {forms}: Tarmac is not on PyPI, and the package `tarmac` there is somebody else's code, "
            "which would run with the cluster's token and the bucket's role"
        )
    plain = install.replace("ssh://git@", "ssh://")  # everybody's user, who holds no secret
    if without_secrets(plain) != plain:
        raise UsageError(
            f"--install ({without_secrets(install)} with a user, password or query) must hold no secret: manifests are "
            "kept and shown; put the wheel where the nodes need none, or give one of this machine"
        )
    if "://" in install:
        return install
    if not Path(install).is_file():
        raise UsageError(f"--install ({install}) must be a wheel that is here; make it with `pip wheel --no-deps .`")
    return Path(install).resolve()


def check_name(name: str, value: str) -> None:
    """Raise UsageError unless `value` can name a Kubernetes object or a cluster."""
    if not _NAME.fullmatch(value):
        raise UsageError(
            f"--{name} ({value}) must be lower-case letters, digits and '-', begin with a letter and have at most 47 "
            "characters"
        )


def check_quantity(name: str, value: str) -> None:
    """Raise UsageError unless `value` is a Kubernetes quantity."""
    if not _QUANTITY.fullmatch(value):
        raise UsageError(f"--{name} ({value}) must be a Kubernetes quantity, as in 32Gi or 500m")


def check_drain(drain_s: int) -> None:
    """Raise UsageError unless a drain of so many seconds makes sense."""
    if not 1 <= drain_s <= 3600:
        raise UsageError(f"--drain-s ({drain_s}) must be from 1 to 3600: clouds give from seconds to minutes of notice")


def pairs(name: str, values: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE words as a mapping. UsageError for a word of another form."""
    found = {}
    for word in values:
        key, equals, value = word.partition("=")
        if not key or not equals:
            raise UsageError(f"--{name} ({word}) must be NAME=VALUE")
        found[key] = value
    return found


def plain_environment(values: Sequence[str]) -> dict[str, str]:
    """Variables for all nodes. UsageError for one that looks like a credential."""
    variables = pairs("env", values)
    for variable in variables:
        if _SECRET.search(variable):
            raise UsageError(
                f"--env {variable} looks like a credential, and a manifest must hold none; give the service account a "
                "role, or put it in a Kubernetes Secret and name that with --env-from-secret"
            )
    return variables
