"""What a cloud tells a machine of its own end: EC2, Compute Engine and Azure, each through its metadata service."""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal, Protocol

import urllib3

logger = logging.getLogger(__name__)

Cloud = Literal["ec2", "gcp", "azure"]

_LINK_LOCAL = "http://169.254.169.254"
_EC2_IPV6 = "http://[fd00:ec2::254]"
_TIMEOUT = urllib3.Timeout(connect=1.0, read=2.0)
_DETECT_S = 2.0

_TOKEN_TTL_S = 21600
_GCP_NOTICE_S = 30.0
_AZURE_EVENTS = ("Preempt", "Terminate", "Reboot", "Redeploy")
"""Those that end every process of the VM. The fifth, Freeze, is a pause of seconds."""


@dataclass(frozen=True, slots=True)
class Notice:
    """This machine will be gone.

    Attributes:
        source: who says so.
        deadline: until when it surely runs, unix seconds; None if not told.
        what: the cloud's own word for it.
    """

    source: Cloud
    deadline: float | None
    what: str


class NoticeSource(Protocol):
    """One cloud's metadata service. A service that is absent or faulty is silence, never an error."""

    cloud: Cloud
    poll_s: float

    def is_here(self) -> bool:
        """Whether this machine runs in this cloud, and its service can be asked."""

    def poll(self) -> Notice | None:
        """Ask once, for a few seconds at most."""


class Ec2:
    """Spot interruptions, through IMDSv2.

    A rebalance recommendation is not a notice: it tells of a raised risk, often nothing follows, and a node once
    drained stays empty.

    Source: Amazon EC2 User Guide, "Spot Instance interruption notices" and "Use IMDSv2".
    """

    cloud: Cloud = "ec2"
    poll_s = 2.0

    def __init__(self) -> None:
        ipv6 = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", "").lower() == "ipv6"
        self._endpoint = _endpoint("AWS_EC2_METADATA_SERVICE_ENDPOINT", _EC2_IPV6 if ipv6 else _LINK_LOCAL)
        self._disabled = os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true"
        self._token: str | None = None

    def is_here(self) -> bool:
        """Whether a token is given out, and an instance id for it: services that imitate EC2's have no tokens."""
        return not self._disabled and re.fullmatch(r"i-[0-9a-f]+", self._get("instance-id") or "") is not None

    def poll(self) -> Notice | None:
        """`spot/instance-action`, which is not there until the instance is to be stopped, terminated or hibernated."""
        action = _parse_object(self._get("spot/instance-action"))
        if action is None or not isinstance(action.get("action"), str):
            return None
        return Notice("ec2", _unix(datetime.fromisoformat, action.get("time")), action["action"])

    def _get(self, path: str) -> str | None:
        for _ in range(2):
            self._token = self._token or self._new_token()
            if self._token is None:
                return None
            url = f"{self._endpoint}/latest/meta-data/{path}"
            response = _ask("GET", url, {"X-aws-ec2-metadata-token": self._token})
            if response is None or response.status != 401:
                return _text(response)
            self._token = None  # it expired
        return None

    def _new_token(self) -> str | None:
        header = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_TTL_S)}
        token = (_text(_ask("PUT", f"{self._endpoint}/latest/api/token", header)) or "").strip()
        return token if re.fullmatch(r"[\x21-\x7e]+", token) else None


class Gcp:
    """Preemptions of Spot VMs, and host maintenance that a VM does not survive.

    Source: Compute Engine documentation, "Create and use Spot VMs" and "Query metadata server for maintenance event
    notices".
    """

    cloud: Cloud = "gcp"
    poll_s = 2.0

    def __init__(self) -> None:
        # By its address: the lookup of a name that does not exist can take longer than all else here.
        self._endpoint = _endpoint("GCE_METADATA_HOST", _LINK_LOCAL)
        self._last_quiet: float | None = None

    def is_here(self) -> bool:
        """Whether the very key that `poll` needs is there: GKE's own metadata server leaves keys of the VM out."""
        return self._get("preempted") in ("TRUE", "FALSE")

    def poll(self) -> Notice | None:
        """`instance/preempted`, which says nothing of when; then `instance/maintenance-event`."""
        asked = time.time()
        preempted = self._get("preempted")
        if preempted == "TRUE":
            since = self._last_quiet if self._last_quiet is not None else asked
            return Notice("gcp", since + _GCP_NOTICE_S, "preempted")
        if preempted == "FALSE":
            self._last_quiet = asked
        maintenance = self._get("maintenance-event")
        if maintenance is not None and maintenance.startswith("TERMINATE"):
            return Notice("gcp", None, maintenance)  # in a minute, or with GPUs in an hour: it does not say
        return None

    def _get(self, key: str) -> str | None:
        url = f"{self._endpoint}/computeMetadata/v1/instance/{key}"
        response = _ask("GET", url, {"Metadata-Flavor": "Google"})
        if response is None or response.headers.get("Metadata-Flavor") != "Google":
            return None
        text = _text(response)
        return None if text is None else text.strip()


class Azure:
    """Scheduled events that name this VM.

    Source: Azure documentation, "Azure Metadata Service: Scheduled Events for Linux VMs".
    """

    cloud: Cloud = "azure"
    poll_s = 5.0

    def __init__(self) -> None:
        self._endpoint = _endpoint("TARMAC_AZURE_METADATA_ENDPOINT", _LINK_LOCAL)
        self._name: str | None = None

    def is_here(self) -> bool:
        """Whether the service tells the VM's name and id."""
        compute = self._get("instance/compute?api-version=2021-02-01")
        if compute is None or not compute.get("vmId") or not compute.get("name"):
            return False
        self._name = str(compute["name"]).lower()  # Azure's names differ by more than case
        return True

    def poll(self) -> Notice | None:
        """The earliest of the events that end this VM; all VMs of a scale set or availability set see each other's."""
        if self._name is None and not self.is_here():
            return None
        document = self._get("scheduledevents?api-version=2020-07-01") or {}
        events = document.get("Events")
        notices = [self._notice(event) for event in events if self._ends_us(event)] if isinstance(events, list) else []
        return min(notices, key=lambda notice: notice.deadline or 0.0, default=None)

    def _ends_us(self, event: Any) -> bool:
        if not isinstance(event, dict) or event.get("EventType") not in _AZURE_EVENTS:
            return False
        names = event.get("Resources")
        return isinstance(names, list) and self._name in [str(name).lower() for name in names]

    def _notice(self, event: dict[str, Any]) -> Notice:
        deadline = _unix(parsedate_to_datetime, event.get("NotBefore"))
        if deadline is None and event.get("EventStatus") == "Started":
            deadline = time.time()  # NotBefore is blank then
        return Notice("azure", deadline, str(event["EventType"]))

    def _get(self, path: str) -> dict[str, Any] | None:
        return _parse_object(_text(_ask("GET", f"{self._endpoint}/metadata/{path}", {"Metadata": "true"})))


def detect(timeout_s: float = _DETECT_S) -> NoticeSource | None:
    """The cloud that this machine runs in, or None; all are asked at once.

    Args:
        timeout_s: when to give up.
    """
    answers: queue.SimpleQueue[NoticeSource | None] = queue.SimpleQueue()

    def ask(source: NoticeSource) -> None:
        answers.put(source if source.is_here() else None)

    sources: tuple[NoticeSource, ...] = (Ec2(), Gcp(), Azure())
    for source in sources:
        threading.Thread(target=ask, args=(source,), daemon=True, name=f"detect-{source.cloud}").start()
    end = time.monotonic() + timeout_s
    for _ in sources:
        try:
            found = answers.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            return None
        if found is not None:
            return found
    return None


def _endpoint(variable: str, default: str) -> str:
    value = os.environ.get(variable) or default
    return (value if "://" in value else f"http://{value}").rstrip("/")


def _ask(method: str, url: str, headers: dict[str, str]) -> urllib3.BaseHTTPResponse | None:
    """One request, with no retry, redirect or proxy; None without an answer."""
    try:
        with urllib3.PoolManager(retries=False, timeout=_TIMEOUT) as pool:
            return pool.request(method, url, headers=headers)
    except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
        logger.debug("%s %s: %s", method, url, error)
        return None


def _text(response: urllib3.BaseHTTPResponse | None) -> str | None:
    """The body of a 200."""
    return response.data.decode(errors="replace") if response is not None and response.status == 200 else None


def _parse_object(text: str | None) -> dict[str, Any] | None:
    try:
        parsed = json.loads(text or "null")
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None


def _unix(parse: Callable[[str], datetime], text: Any) -> float | None:
    """Unix seconds, of a time that may be missing or malformed."""
    try:
        return parse(text).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None
