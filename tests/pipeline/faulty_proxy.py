"""An HTTP proxy in front of an S3 server that misbehaves on request."""

from __future__ import annotations

import http.client
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import urlsplit

Action = Literal[
    *("403", "429", "500", "503", "cut the body", "reset", "lose the answer", "say nothing"),
    *("stall in the body", "trickle", "flip a bit", "expired", "another version"),
]
ACCESS_DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"

EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"


@dataclass
class Faults:
    """What the proxy does wrong, and what it has seen."""

    endpoint: str
    planned: list[tuple[str, str, Action]] = field(default_factory=list)
    """Method, part of the URL, action: each happens once, to the first request that matches."""
    requests: list[str] = field(default_factory=list)
    """Method and URL of every request so far."""
    repeated: list[tuple[str, str, Action, int]] = field(default_factory=list)
    """Method, part of the URL, action, n: happens to each n-th request that matches."""
    num_matches: Counter[int] = field(default_factory=Counter)
    num_sent: Counter[str] = field(default_factory=Counter)
    """Bytes of bodies that were sent, by path."""
    tokens: list[str] = field(default_factory=list)
    """The session tokens of the requests so far."""
    over: threading.Event = field(default_factory=threading.Event)
    on_request: Callable[[str], Action | None] = lambda _: None
    """Called with method and URL of every request before it is passed on; may name a fault for it."""

    def plan(self, *faults: tuple[str, str, Action]) -> None:
        """Add faults, and forget the requests so far."""
        self.planned.extend(faults)
        self.requests.clear()

    def take(self, method: str, path: str) -> Action | None:
        """The fault for this request."""
        self.requests.append(f"{method} {path}")
        if (action := self.on_request(self.requests[-1])) is not None:
            return action
        for number, (wanted, part, action) in enumerate(self.planned):
            if wanted == method and part in path:
                del self.planned[number]
                return action
        for number, (wanted, part, action, every) in enumerate(self.repeated):
            if wanted == method and part in path:
                self.num_matches[number] += 1
                if self.num_matches[number] % every == 0:
                    return action
        return None


class _Handler(BaseHTTPRequestHandler):
    """Passes requests on to `server.upstream`, but for the faults that are planned."""

    server: _Proxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a client waits 40 ms for a body that follows its headers

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:  # the client gave up on us
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass

    def pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.faults.tokens.append(self.headers.get("X-Amz-Security-Token", ""))
        action = self.server.faults.take(self.command, self.path)
        if action == "say nothing":
            self.server.faults.over.wait()
        if action in ("say nothing", "reset"):
            self.close_connection = True
        elif action in ("429", "500", "503"):
            self.answer(int(action), [("Content-Length", "0")], b"")
        elif action == "403":
            self.answer(403, [("Content-Type", "application/xml")], ACCESS_DENIED)
        elif action == "expired":
            self.answer(400, [("Content-Type", "application/xml")], EXPIRED)
        else:
            status, headers, answer = self.ask(body)
            if action == "lose the answer":
                self.close_connection = True
                return
            if action == "cut the body":
                answer, self.close_connection = answer[: len(answer) // 2], True
            if action == "another version":
                changed = {"etag": '"another"', "last-modified": "Fri, 01 Jan 2100 00:00:00 GMT"}
                headers = [(name, changed.get(name.lower(), value)) for name, value in headers]
            if action == "flip a bit":
                answer = answer[:-1] + bytes([answer[-1] ^ 1])
            at_once = len(answer) // 2 if action in ("stall in the body", "trickle") else len(answer)
            self.answer(status, headers, answer, at_once)
            if action == "stall in the body":
                self.server.faults.over.wait()
            for at in range(at_once, len(answer)):
                time.sleep(0.05)
                self.wfile.write(answer[at : at + 1])

    def ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.server.upstream, timeout=30)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() != "expect":
                    connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            connection.close()

    def answer(self, status: int, headers: list[tuple[str, str]], body: bytes, at_once: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "connection"):
                self.send_header(name, value)
        if not any(name.lower() == "content-length" for name, _ in headers):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.server.faults.num_sent[urlsplit(self.path).path] += len(body)
        self.wfile.write(body[:at_once])

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = pass_on  # noqa: N815


class _Proxy(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.faults = Faults(f"http://127.0.0.1:{self.server_address[1]}")


@contextmanager
def start_faulty_proxy(upstream: str) -> Iterator[Faults]:
    """Serve on loopback, pass everything on to `upstream`, but for the faults that are planned."""
    server = _Proxy(upstream)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server.faults
    finally:
        server.faults.over.set()
        server.shutdown()
        thread.join()
        server.server_close()
