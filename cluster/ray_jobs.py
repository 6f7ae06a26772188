"""Ray's Jobs API of one cluster: submit, look, stop, read logs. Every request has a deadline."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_fixed

from cluster.log_setup import without_secrets
from cluster.options import CommandError, UsageError
from cluster.ray_access import check_access, reload_auth

_REQUEST_S = 30.0
FATAL_EXITS = (1, 2)
"""Of `tarmac pretrain`: it failed, or was used wrongly, and would again. The others pass, 75 by its own word."""
_AGAIN = 75
_YOUNG_S = 60.0
"""A cluster whose dashboard answers may not take jobs for a while."""
_NOT_FOUND = "status code 404"
_OVERRIDES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Ray lets these win over the address that it is given."""

_TALKATIVE = ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")
"""Loggers that Ray sets to INFO, of what it uploads and from where."""


class NoAnswerError(CommandError):
    """No cluster answers at the address, or not as one does."""


class TokenError(CommandError):
    """The cluster does not take our token."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One submission, as the cluster knows it."""

    id: str
    status: JobStatus
    exit_code: int | None
    error_type: str | None
    """Why Ray itself could not run it to an exit code."""
    message: str
    metadata: dict[str, str]

    @property
    def is_active(self) -> bool:
        """Whether it waits or runs."""
        return not self.status.is_terminal()

    @property
    def failure(self) -> str:
        """Why it ended, in a line: the last error that it printed, or how it ended and its last words."""
        errors = re.findall(r"^error: (.+)$", self.message, re.MULTILINE)
        if errors and self.exit_code in FATAL_EXITS:
            return str(errors[-1])
        if errors and self.exit_code == _AGAIN:
            return f"its driver ended with {_AGAIN}: {errors[-1]}"
        if self.exit_code is None:
            return self.message.partition("\n")[0] or str(self.status)
        how, words = f"its driver ended with {self.exit_code}", self.message.strip().rpartition("\n")[2]
        return f"{how}: {without_secrets(words)}" if words and self.exit_code in FATAL_EXITS else how


class _Client(JobSubmissionClient):
    """Ray's client waits for ever for a head that has gone silent."""

    def _do_request(self, method: str, endpoint: str, **kwargs: Any) -> requests.Response:
        response: requests.Response = super()._do_request(method, endpoint, timeout=_REQUEST_S, **kwargs)
        return response


class RayJobs:
    """The jobs of the cluster whose dashboard is at a URL.

    If the cluster asks for a token, the one that Ray finds in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token
    is sent. Every method raises TokenError where the cluster does not take it, the next one looks anew; and UsageError
    for a cluster on another machine that takes anybody: see `check_access`.
    """

    def __init__(self, address: str) -> None:
        """Raises UsageError for an address that is no dashboard's."""
        self.address = dashboard_url(address)
        self._connected: _Client | None = None

    def ray_version(self) -> str:
        """Of the cluster. Raises NoAnswerError."""
        with self._explained():
            return str(self._client()._server_ray_version)

    def submit(self, **request: Any) -> str:
        """Upload and start a job; returns its id. Arguments as of Ray's `submit_job`. Raises NoAnswerError."""
        retrying = Retrying(
            stop=stop_after_delay(_YOUNG_S), wait=wait_fixed(1), retry=retry_if_exception(_is_young), reraise=True
        )
        with self._explained():
            check_access(self.address)  # again: with --wait another cluster may answer there by now
            return str(retrying(self._client().submit_job, **request))

    def get(self, job_id: str) -> Job | None:
        """The job, or None if this cluster has never heard of it. Raises NoAnswerError."""
        with self._explained():
            try:
                return _job(self._client().get_job_info(job_id))
            except RuntimeError as error:
                if _NOT_FOUND in str(error):
                    return None
                raise

    def of_run(self, prefix: str, run: str) -> list[Job]:
        """A run's jobs, the oldest first: ours, and those that something else submitted, as KubeRay does a RayJob's.

        Args:
            prefix: what the ids of our jobs of the run begin with; a number follows.
            run: URL of the run, as it is under `run` in the metadata of others.

        Raises:
            NoAnswerError: no cluster, or it refuses.
        """
        with self._explained():
            known = [details for details in self._client().list_jobs() if details.submission_id]
        found = []
        for details in known:
            job, number = _job(details), re.fullmatch(rf"{re.escape(prefix)}(\d+)", str(details.submission_id))
            if number or job.metadata.get("run") == run:
                found.append((details.start_time or 0, int(number[1]) if number else 0, job))
        return [job for _, _, job in sorted(found, key=lambda one: one[:2])]

    def stop(self, job_id: str) -> bool:
        """End the job's process; whether it ran. Raises NoAnswerError."""
        with self._explained():
            return bool(self._client().stop_job(job_id))

    def log(self, job_id: str) -> str:
        """All that the job has printed. Raises NoAnswerError."""
        with self._explained():
            return str(self._client().get_job_logs(job_id))

    async def follow_log(self, job_id: str) -> AsyncIterator[str]:
        """What the job has printed, and prints until it ends. Raises NoAnswerError, also if the head falls silent."""
        with self._explained():
            texts = aiter(self._client().tail_job_logs(job_id))
            while (text := await self._next_text(texts, job_id)) is not None:
                yield text

    async def _next_text(self, texts: AsyncIterator[str], job_id: str) -> str | None:
        """The log's next text, however long it takes while the job runs; None at its end.

        Ray's client waits for ever for a text. So while none comes, the job is asked after: that has a deadline.
        """
        waiting = asyncio.ensure_future(anext(texts, None))
        try:
            while not (await asyncio.wait({waiting}, timeout=_REQUEST_S))[0]:
                job = await asyncio.to_thread(self.get, job_id)
                if job is None or not job.is_active:
                    return None
            return waiting.result()
        finally:
            waiting.cancel()

    def _client(self) -> _Client:
        if self._connected is None:
            check_access(self.address)
            for name in _TALKATIVE:
                logging.getLogger(name).setLevel(logging.getLogger().getEffectiveLevel())
            with _without(_OVERRIDES):
                self._connected = _Client(self.address)
        return self._connected

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Ray's client raises what its libraries do, and RuntimeError for an answer that it did not expect."""
        try:
            yield
        except AuthenticationError as error:
            self._connected = None  # it keeps its token; the next one takes what is there by then
            reload_auth()
            reason = str(error).partition("\n")[0]
            raise TokenError(
                f"the cluster at {self.address} wants Ray's authentication token ({reason}); "
                "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH, or put the token into ~/.ray/auth_token"
            ) from error
        except RuntimeError as error:  # an answer, but not the one that Ray's client expected
            raise NoAnswerError(
                f"the Ray cluster at {self.address} did not do it: {_reason(error)}; give the command again, and if "
                "that does not help, look into logs/dashboard.log of Ray's session on its head"
            ) from error
        except (OSError, ValueError, aiohttp.ClientError) as error:  # requests' errors are OSErrors
            raise NoAnswerError(
                f"no Ray cluster answers at {self.address} ({_reason(error)}); give the URL of its dashboard, "
                "and check that this machine can reach it"
            ) from error


def dashboard_url(address: str) -> str:
    """The address if it is the URL of a dashboard, without its last slash. Raises UsageError."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(
            f"--address ({address}) must be the URL of the cluster's Ray dashboard, as in http://HEAD:8265"
        )
    if "@" in parts.netloc or parts.query:
        raise UsageError(
            f"--address ({parts.scheme}://{parts.netloc.rpartition('@')[2]}) must have no user, password or query; "
            "Ray's own authentication is RAY_AUTH_MODE=token with RAY_AUTH_TOKEN_PATH"
        )
    return address.rstrip("/")


def is_loopback(address: str) -> bool:
    """Whether the cluster is on this machine."""
    host = urlsplit(address).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_young(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and "try again later" in str(error)


def _job(details: JobDetails) -> Job:
    return Job(
        id=str(details.submission_id),
        status=details.status,
        exit_code=details.driver_exit_code,
        error_type=str(details.error_type) if details.error_type else None,
        message=details.message or "",
        metadata=dict(details.metadata or {}),
    )


def _reason(error: Exception) -> str:
    """In a few words: requests tells its whole call."""
    if isinstance(error, requests.Timeout):
        return f"nothing came for {_REQUEST_S:g} s"
    if isinstance(error, ConnectionError | requests.ConnectionError):
        return "no connection"
    return str(error).partition("\n")[0] or type(error).__name__


@contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
