"""A run as a Ray job: what is sent, under which name, and what is checked before."""

from __future__ import annotations

import hashlib
import re
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import ray

from cluster.config import JobConfig
from cluster.options import UsageError
from cluster.ray_jobs import Job, RayJobs, is_loopback
from cluster.shipping import runtime_env, stage, version

Environment = Literal["pinned", "cluster"]

_NOT_SHARED = ("", "file", "local", "memory")


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A job that can be sent, and sent again."""

    job: JobConfig
    recipe: str
    overrides: tuple[str, ...]
    """The command line's words but for the two URLs: workers and fields."""
    environment: Environment
    verbose: bool = False
    """Whether the driver logs as `tarmac -v` does."""

    def entrypoint(self) -> str:
        """The command that the cluster's head runs: the one that a person would type there."""
        urls = ("--data", self.job.data, "--run", self.job.run)
        command = (*("-v",) * self.verbose, "pretrain", self.recipe)
        return shlex.join(("python", "-m", "cluster.cli", *command, *urls, *self.overrides))

    def metadata(self) -> dict[str, str]:
        """What the job's page in the dashboard shows beside the command."""
        return {"run": self.job.run, "recipe": self.recipe, "data": self.job.data, "tarmac": version()}


def job_prefix(run: str) -> str:
    """What the ids of all jobs of a run begin with: its last name, and a hash of its whole URL."""
    name = re.sub(r"[^A-Za-z0-9_]+", "-", run.rstrip("/").rpartition("/")[2]).strip("-")[:40]
    return f"tarmac-{name}-{hashlib.sha256(run.encode()).hexdigest()[:10]}-"


def jobs_of(jobs: RayJobs, run: str) -> list[Job]:
    """The run's jobs that this cluster knows, the oldest first, whoever submitted them. Raises NoAnswerError."""
    return jobs.of_run(job_prefix(run), run)


def active_job(jobs: RayJobs, run: str) -> Job | None:
    """The newest job of the run that waits or runs on this cluster. Raises NoAnswerError."""
    return next((job for job in reversed(jobs_of(jobs, run)) if job.is_active), None)


def check_url(name: str, url: str, address: str) -> None:
    """Raise UsageError unless the cluster's nodes can read `url` as this machine does, and it holds no secret."""
    parts = urlsplit(url)
    if "://" in url and ("@" in parts.netloc or parts.query):
        shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise UsageError(
            f"--{name} ({shown}) must have no user, password or query: it goes into the job's command line. "
            "Credentials come from the cluster's own environment or role"
        )
    if (parts.scheme if "://" in url else "") in _NOT_SHARED and not is_loopback(address):
        raise UsageError(
            f"--{name} ({url}) must be in storage that every node of {address} reaches, as s3://bucket/path is; "
            "a path of this machine works with a cluster on this machine only"
        )


def check_version(jobs: RayJobs, environment: Environment) -> None:
    """Raise UsageError if the cluster's Ray is not the one that the pins are for. Raises NoAnswerError."""
    theirs = jobs.ray_version()
    if environment == "pinned" and theirs != ray.__version__:
        raise UsageError(
            f"the cluster at {jobs.address} runs Ray {theirs}, which a job cannot change, and the pinned environment "
            f"is made for Ray {ray.__version__}; use an image with that one, or --environment cluster"
        )


def send(jobs: RayJobs, submission: Submission) -> str:
    """Ship code and environment, and start the job.

    Returns:
        Its id: `job_prefix`, and how often the run has been submitted to this cluster.

    Raises:
        NoAnswerError: no cluster, or it refuses.
    """
    prefix = job_prefix(submission.job.run)
    ids = [job.id.removeprefix(prefix) for job in jobs_of(jobs, submission.job.run) if job.id.startswith(prefix)]
    number = max((int(rest) for rest in ids if rest.isdecimal()), default=0) + 1
    with tempfile.TemporaryDirectory(prefix="tarmac-submit-") as folder:
        stage(Path(folder))
        return jobs.submit(
            entrypoint=submission.entrypoint(),
            submission_id=f"{prefix}{number}",
            metadata=submission.metadata(),
            runtime_env=runtime_env(Path(folder), pinned=submission.environment == "pinned"),
        )
