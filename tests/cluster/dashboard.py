"""What a Ray dashboard says about itself and its jobs, from a server of a few lines: no Ray is started."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import ray

PUBLIC = "/api/authentication_mode"


@dataclass
class Dashboard:
    """One that is up. `jobs` are what it lists, by submission id; requests that it got are in `asked`."""

    mode: str | None
    """`disabled` or `token`; None is a Ray that knows of neither."""
    token: str
    address: str = ""
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)
    takes: dict[str, Any] | None = None
    """What becomes of a job that is submitted, as its page tells it; None takes none."""
    asked: list[tuple[str, str]] = field(default_factory=list)
    """Method and path."""
    authorizations: list[str | None] = field(default_factory=list)
    """Of the requests to other than public paths."""

    def add_job(self, job_id: str, run: str, *, status: str = "RUNNING", started: int = 1, log: str = "") -> None:
        """A job as Ray's own page tells it; `started` in milliseconds since 1970."""
        self.logs[job_id] = log
        self.jobs[job_id] = {
            **{"type": "SUBMISSION", "submission_id": job_id, "status": status, "entrypoint": "x"},
            **{"start_time": started, "metadata": {"run": run}},
        }

    def answer(self, method: str, path: str, sent: bytes) -> tuple[int, dict[str, Any] | list[Any]]:
        """Status and body, for somebody who has been let in."""
        if self.takes is not None and path.startswith("/api/packages/"):
            return (404 if method == "GET" else 200), {}
        if self.takes is not None and path == "/api/jobs/" and method == "POST":
            job = json.loads(sent)
            self.add_job(job["submission_id"], job["metadata"]["run"])
            self.jobs[job["submission_id"]] |= self.takes
            return 200, {"job_id": job["submission_id"], "submission_id": job["submission_id"]}
        name = path.removeprefix("/api/jobs/")
        if path == PUBLIC:
            return (404, {}) if self.mode is None else (200, {"authentication_mode": self.mode})
        if path == "/api/version":
            return 200, {"version": "4", "ray_version": ray.__version__, "ray_commit": "x"}
        if path == "/api/jobs/" and method == "GET":
            return 200, list(self.jobs.values())
        if name.endswith("/stop"):
            self.jobs[name.removesuffix("/stop")]["status"] = "STOPPED"
            return 200, {"stopped": True}
        if name.endswith("/logs"):
            return 200, {"logs": self.logs[name.removesuffix("/logs")]}
        return (200, self.jobs[name]) if name in self.jobs else (404, {})


@contextmanager
def serve_dashboard(host: str, mode: str | None, token: str = "") -> Iterator[Dashboard]:
    """One at an address of this machine, until the block ends."""
    dashboard = Dashboard(mode=mode, token=token)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            dashboard.asked.append((self.command, self.path))
            authorization = self.headers.get("Authorization")
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            code, body = dashboard.answer(self.command, self.path, sent)
            if self.path != PUBLIC:
                dashboard.authorizations.append(authorization)
                if dashboard.mode == "token" and authorization != f"Bearer {dashboard.token}":
                    code, body = 401, {"error": "Unauthorized"}
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        do_POST = do_PUT = do_GET  # noqa: N815

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer((host, 0), Handler)
    dashboard.address = f"http://{host}:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield dashboard
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
