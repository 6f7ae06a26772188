"""A machine's metadata service on loopback, as EC2, Compute Engine or Azure speak it: as strict, and as terse.

Source: the clouds' documentation, as in `cluster.cloud_notices`.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.message import Message
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from secrets import token_urlsafe
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from cluster.cloud_notices import Cloud

VM_NAME = "trainer_3"


class Answer(NamedTuple):
    status: int
    body: str = ""
    headers: dict[str, str] = {}  # noqa: RUF012  never changed


class MetadataServer:
    """What one VM's service knows, and whom it answers. `notify` publishes the end of the VM."""

    def __init__(self, cloud: Cloud, endpoint: str) -> None:
        self.cloud = cloud
        self.endpoint = endpoint
        self.requests: list[str] = []
        self.spot_action: dict[str, str] | None = None
        self.preempted = "FALSE"
        self.maintenance = "NONE"
        self.events: list[dict[str, Any]] = []
        self._tokens: dict[str, float] = {}

    def environment(self) -> dict[str, str]:
        """Variables with which a process takes this service for its machine's own, whichever cloud it asks for."""
        return {
            "AWS_EC2_METADATA_DISABLED": "false",
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": self.endpoint,
            "GCE_METADATA_HOST": self.endpoint.removeprefix("http://"),
            "TARMAC_AZURE_METADATA_ENDPOINT": self.endpoint,
        }

    def notify(self, deadline: float) -> None:
        """Say that the VM will be gone at `deadline`, unix seconds; Compute Engine does not tell when."""
        when = datetime.fromtimestamp(deadline, UTC)
        self.spot_action = {"action": "terminate", "time": when.strftime("%Y-%m-%dT%H:%M:%SZ")}
        self.preempted = "TRUE"
        self.events = [azure_event("Preempt", format_datetime(when, usegmt=True))]

    def expire_tokens(self) -> None:
        self._tokens = dict.fromkeys(self._tokens, 0.0)

    def answer(self, method: str, target: str, headers: Message) -> Answer:
        self.requests.append(f"{method} {target}")
        url = urlsplit(target)
        by_cloud = {"ec2": self._ec2, "gcp": self._gcp, "azure": self._azure}
        return by_cloud[self.cloud](method, url.path, url.query, headers)

    def _ec2(self, method: str, path: str, query: str, headers: Message) -> Answer:
        if path == "/latest/api/token":
            ttl = headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
            if method != "PUT":
                return Answer(405)
            if "X-Forwarded-For" in headers:
                return Answer(403)
            if not ttl.isdecimal() or not 1 <= int(ttl) <= 21600:
                return Answer(400)
            token = token_urlsafe(40) + "=="
            self._tokens[token] = time.monotonic() + int(ttl)
            return Answer(200, token, {"X-aws-ec2-metadata-token-ttl-seconds": ttl})
        if self._tokens.get(headers.get("X-aws-ec2-metadata-token", ""), 0.0) < time.monotonic():
            return Answer(401)
        known = {
            "instance-id": "i-0123456789abcdef0",
            "placement/availability-zone/": "eu-central-1b",
            "spot/instance-action": self.spot_action and json.dumps(self.spot_action),
            "events/recommendations/rebalance": json.dumps({"noticeTime": "2026-11-25T08:22:00Z"}),
        }
        body = known.get(path.removeprefix("/latest/meta-data/"))
        return Answer(404) if body is None else Answer(200, body)

    def _gcp(self, method: str, path: str, query: str, headers: Message) -> Answer:
        always = {"Metadata-Flavor": "Google", "Server": "Metadata Server for VM"}
        if headers.get("Metadata-Flavor") != "Google" or "X-Forwarded-For" in headers:
            return Answer(403, headers=always)
        known = {"preempted": self.preempted, "maintenance-event": self.maintenance, "id": "4618364759"}
        body = known.get(path.removeprefix("/computeMetadata/v1/instance/"))
        return Answer(404, headers=always) if body is None or method != "GET" else Answer(200, body, always)

    def _azure(self, method: str, path: str, query: str, headers: Message) -> Answer:
        version = parse_qs(query).get("api-version", [""])[0]
        if headers.get("Metadata", "").lower() != "true" or "X-Forwarded-For" in headers:
            return Answer(400, '{"error": "Bad request. Required metadata header not specified"}')
        known: dict[tuple[str, str], Any] = {
            ("/metadata/instance/compute", "2021-02-01"): {
                "name": VM_NAME,
                "vmId": "02aab8a4-74ef-476e-8182-f6d2ba4166a6",
            },
            ("/metadata/scheduledevents", "2020-07-01"): {"DocumentIncarnation": 7, "Events": self.events},
        }
        if (path, version) in known and method == "GET":
            return Answer(200, json.dumps(known[path, version]), {"Content-Type": "application/json; charset=utf-8"})
        return Answer(400 if not version else 404)


def azure_event(
    kind: str, not_before: str, *, resources: tuple[str, ...] = (VM_NAME,), **fields: str
) -> dict[str, Any]:
    return {
        "EventId": "602d9444-d2cd-49c7-8624-8643e7171297",
        "EventType": kind,
        "ResourceType": "VirtualMachine",
        "Resources": list(resources),
        "EventStatus": "Scheduled",
        "NotBefore": not_before,
        "Description": "",
        "EventSource": "Platform",
        "DurationInSeconds": -1,
    } | fields


@contextmanager
def serve_metadata(cloud: Cloud) -> Iterator[MetadataServer]:
    """The service of one VM of `cloud`, on a free port of loopback."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            answer = metadata.answer(self.command, self.path, self.headers)
            body = answer.body.encode()
            self.send_response_only(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = answer  # noqa: N815  http.server's names

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        metadata = MetadataServer(cloud, f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield metadata
        finally:
            server.shutdown()
            thread.join()
