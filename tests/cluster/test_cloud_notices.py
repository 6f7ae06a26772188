"""Notices of each cloud, from a server that speaks its protocol; and silence from everything else."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from botocore.utils import InstanceMetadataRegionFetcher

from cluster.cloud_notices import Azure, Cloud, Ec2, Gcp, Notice, NoticeSource, detect
from tests.cluster.metadata_server import MetadataServer, azure_event, serve_metadata

CLOUDS: dict[Cloud, type[Ec2] | type[Gcp] | type[Azure]] = {"ec2": Ec2, "gcp": Gcp, "azure": Azure}
DEADLINE = 1795613207.0  # Wed, 25 Nov 2026 13:26:47 GMT


@contextmanager
def inside(cloud: Cloud) -> Iterator[MetadataServer]:
    with serve_metadata(cloud) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        yield server


def use_endpoint(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    for name, value in MetadataServer("ec2", f"http://{address}").environment().items():
        monkeypatch.setenv(name, value)


def all_sources() -> list[NoticeSource]:
    return [Ec2(), Gcp(), Azure()]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_cloud_is_recognised_among_the_three_and_only_its_own_notice_is_seen(cloud: Cloud):
    with inside(cloud) as server:
        source = detect()
        assert source is not None
        assert source.cloud == cloud
        assert source.poll() is None
        server.notify(DEADLINE)
        notice = source.poll()
        assert notice is not None
        assert notice.source == cloud
        assert notice.what == {"ec2": "terminate", "gcp": "preempted", "azure": "Preempt"}[cloud]
        for other in all_sources():
            assert other.is_here() == (other.cloud == cloud)
            assert (other.poll() is not None) == (other.cloud == cloud)


def test_ec2_tells_the_second_of_the_interruption():
    with inside("ec2") as server:
        server.spot_action = {"action": "stop", "time": "2026-11-25T13:26:47Z"}
        assert Ec2().poll() == Notice("ec2", DEADLINE, "stop")
        server.spot_action = {"action": "hibernate", "time": "soon"}
        assert Ec2().poll() == Notice("ec2", None, "hibernate")


def test_an_ec2_token_is_kept_and_renewed_when_it_has_expired():
    with inside("ec2") as server:
        source = Ec2()
        for _ in range(3):
            assert source.poll() is None
        assert server.requests == ["PUT /latest/api/token"] + ["GET /latest/meta-data/spot/instance-action"] * 3
        server.expire_tokens()
        server.notify(DEADLINE)
        assert source.poll() == Notice("ec2", DEADLINE, "terminate")
        assert server.requests.count("PUT /latest/api/token") == 2


def test_ec2_is_not_asked_where_its_metadata_is_disabled(monkeypatch: pytest.MonkeyPatch):
    with inside("ec2") as server:
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        assert detect() is None
        assert not [request for request in server.requests if "/latest/" in request]


def test_the_ec2_server_of_these_tests_satisfies_botocore(monkeypatch: pytest.MonkeyPatch):
    with inside("ec2") as server:
        fetcher = InstanceMetadataRegionFetcher(
            base_url=f"{server.endpoint}/", env={"AWS_EC2_METADATA_DISABLED": "false"}
        )
        assert fetcher.retrieve_region() == "eu-central-1"


def test_gcp_gives_30_s_from_the_last_quiet_answer():
    with inside("gcp") as server:
        source = Gcp()
        earliest = time.time()
        assert source.poll() is None
        latest = time.time()
        server.preempted = "TRUE"
        notices = [source.poll(), source.poll()]
        assert notices[0] == notices[1]
        assert notices[0] is not None
        assert notices[0].deadline is not None
        assert earliest + 30 <= notices[0].deadline <= latest + 30


def test_gcp_maintenance_counts_only_if_the_vm_does_not_survive_it():
    with inside("gcp") as server:
        server.maintenance = "MIGRATE_ON_HOST_MAINTENANCE"
        assert Gcp().poll() is None
        server.maintenance = "TERMINATE_ON_HOST_MAINTENANCE"
        assert Gcp().poll() == Notice("gcp", None, "TERMINATE_ON_HOST_MAINTENANCE")


def test_azure_takes_the_earliest_event_that_ends_this_vm():
    with inside("azure") as server:
        source = Azure()
        soon, later = "Wed, 25 Nov 2026 13:26:47 GMT", "Wed, 25 Nov 2026 13:41:00 GMT"
        server.events = [
            azure_event("Freeze", soon),
            azure_event("Preempt", soon, resources=("trainer_2", "trainer_33")),
            azure_event("Terminate", soon, resources=()),
        ]
        assert source.poll() is None
        server.events += [azure_event("Redeploy", later), azure_event("Terminate", soon, resources=("x", "Trainer_3"))]
        assert source.poll() == Notice("azure", DEADLINE, "Terminate")


def test_an_azure_event_that_has_started_is_due_now():
    with inside("azure") as server:
        server.events = [azure_event("Reboot", "", EventStatus="Started")]
        before = time.time()
        notice = Azure().poll()
        assert notice is not None
        assert notice.deadline is not None
        assert before <= notice.deadline <= time.time()
        server.events = [azure_event("Preempt", "by and by")]
        assert Azure().poll() == Notice("azure", None, "Preempt")


@pytest.mark.parametrize(
    "body", [b"<html>Welcome</html>", b"TRUE", b"[]", b"null", b"{}", b'{"Events": 3}', b"\xff\xfe"]
)
def test_a_server_that_answers_everything_is_no_cloud(body: bytes, monkeypatch: pytest.MonkeyPatch):
    head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    with replying(head + body) as address:
        use_endpoint(monkeypatch, address)
        assert detect() is None
        assert [source.poll() for source in all_sources()] == [None] * 3


@pytest.mark.parametrize(
    "reply", [b"", b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n", b"\0\1\2", b"HTTP/1.1 200 OK\r\n"]
)
def test_a_broken_server_is_silence(reply: bytes, monkeypatch: pytest.MonkeyPatch):
    with replying(reply) as address:
        use_endpoint(monkeypatch, address)
        assert detect() is None
        assert [source.poll() for source in all_sources()] == [None] * 3


def test_no_server_is_silence(monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        use_endpoint(monkeypatch, f"127.0.0.1:{bound.getsockname()[1]}")
        assert detect() is None
        assert [source.poll() for source in all_sources()] == [None] * 3


def test_a_server_that_never_answers_is_silence(monkeypatch: pytest.MonkeyPatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        use_endpoint(monkeypatch, f"127.0.0.1:{silent.getsockname()[1]}")
        assert detect(timeout_s=0.2) is None
        assert Gcp().poll() is None


@contextmanager
def replying(reply: bytes) -> Iterator[str]:
    """A server that sends the same bytes to whoever connects, and hangs up; yields its address."""

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.recv(4096)
                connection.sendall(reply)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        host, port = server.getsockname()
        yield f"{host}:{port}"
        server.shutdown(socket.SHUT_RDWR)
    thread.join()
