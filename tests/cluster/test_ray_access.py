"""Who can reach Ray: nobody else on a machine of its own, nobody without the token on a cluster."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util import get_node_ip_address

from cluster.cli import main
from cluster.options import UsageError
from cluster.ray_access import check_access, open_ray, reload_auth
from pipeline.store import Store
from tests.console_lines import strange_lines
from trainer.metrics import read_events, read_metrics

TINY = [
    *("--data.global-batch-size", "12", "--data.num-lanes", "6", "--data.augment.image-size", "64", "64"),
    *("--model.embed-dim", "32", "--model.depth", "2", "--model.num-heads", "2"),
    *("--model.decoder-embed-dim", "32", "--model.decoder-depth", "1", "--model.decoder-num-heads", "2"),
    *("--parallel.precision", "fp32", "--optim.num-steps", "40000", "--log.every-steps", "1", "--log.flush-s", "0.3"),
]
ELSEWHERE = "192.0.2.77:6379"  # TEST-NET-1: nobody is there


@pytest.fixture(autouse=True)
def no_token(tmp_path: Path) -> Iterator[None]:
    """Neither a token nor a mode of the caller's, and whatever a test sets is undone, in Ray's memory too."""
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setenv(name, "")  # remembers that it was not set
            patch.delenv(name)
        patch.setenv("HOME", str(tmp_path))
        reload_auth()
        yield
    reload_auth()


@pytest.mark.parametrize("address", ["127.0.0.1:6379", "localhost:6379", "ray://[::1]:10001", "http://127.3.2.1:8265"])
def test_loopback_needs_no_token_and_says_nothing(address: str, capfd: pytest.CaptureFixture[str]) -> None:
    check_access(address)
    assert "RAY_AUTH_MODE" not in os.environ
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("address", [ELSEWHERE, f"ray://{ELSEWHERE}", "ray://u:pw@h:10001/?k=v"])
def test_an_address_elsewhere_is_refused_without_a_token(address: str) -> None:
    with pytest.raises(UsageError, match=r"RAY_AUTH_TOKEN \(not set\) must hold its token; set RAY_AUTH_TOKEN") as info:
        check_access(address)
    assert "pw" not in str(info.value)
    assert "k=v" not in str(info.value)


def test_a_dashboard_elsewhere_that_is_down_is_not_refused() -> None:
    """It may be up later, and `submit --wait` waits for that."""
    with pytest.raises(ConnectionError, match=r"no Ray dashboard answers at https://h\.invalid/;") as info:
        check_access("https://u:pw@h.invalid/?k=v")
    assert "pw" not in str(info.value)


def test_an_address_elsewhere_is_refused_with_authentication_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x" * 64)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(UsageError, match=rf"RAY_AUTH_MODE \(disabled\) must be token .*{ELSEWHERE}.*; start it with"):
        check_access(ELSEWHERE)


def test_a_token_file_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "absent"))
    with pytest.raises(UsageError, match="absent"):
        check_access(ELSEWHERE)


@pytest.fixture(params=["disabled", "token"])
def cluster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Cluster]]:
    """A real one at this machine's outward address, and its mode."""
    monkeypatch.setenv("RAY_AUTH_MODE", request.param)
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    reload_auth()
    own = get_node_ip_address()
    if own.startswith("127."):
        pytest.skip("this machine has no address but loopback")
    dashboard = {"include_dashboard": True, "dashboard_host": own, "dashboard_port": free_port(own)}
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **dashboard})
    monkeypatch.delenv("RAY_AUTH_MODE")  # the cluster has its mode; what it is on our side is to be found out
    yield request.param, nodes
    nodes.shutdown()


@pytest.mark.ray
def test_a_cluster_elsewhere_must_ask_for_the_token(cluster: tuple[str, Cluster]) -> None:
    mode, nodes = cluster
    for address in (nodes.address, f"http://{nodes.head_node.webui_url}"):
        if mode == "disabled":
            with pytest.raises(UsageError, match=f"{address} runs with token authentication off"):
                check_access(address)
        else:
            check_access(address)
            assert os.environ["RAY_AUTH_MODE"] == "token"


@pytest.mark.parametrize(
    ("level", "shown", "rays"),
    [(logging.WARNING, False, logging.ERROR), (logging.INFO, True, logging.INFO), (logging.DEBUG, True, logging.INFO)],
)
@pytest.mark.parametrize("address", [None, "127.0.0.1:6379"])
def test_what_ray_and_the_workers_log_is_shown_with_v_alone(
    address: str | None,
    level: int,
    shown: bool,
    rays: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "init", lambda **options: given.append(options))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "cluster_resources", dict)
    caplog.set_level(level)  # of the root, as `tarmac` sets it with and without -v
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    with open_ray(num_cpus=1) as local:
        assert local == (address is None)
    assert [(options["log_to_driver"], options["logging_level"]) for options in given] == [(shown, rays)]


def free_port(host: str) -> int:
    with socket.create_server((host, 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_local_run_listens_on_loopback_only_and_leaves_no_token(photos: list[Path], tmp_path: Path) -> None:
    """All processes of a run of two workers: the driver, Ray's own, the workers with gloo and its rendezvous."""
    data, run = str(tmp_path / "data"), str(tmp_path / "run")
    assert main(["shard", str(photos[0].parents[1]), data, "--num-workers", "1"]) == 0
    command = [sys.executable, "-m", "cluster.cli", "pretrain", "demo", *TINY, "--data", data, "--run", run]
    with open(tmp_path / "log", "w+") as log:
        driver = subprocess.Popen([*command, "--num-workers", "2"], stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_for_step(Store(run), 3, driver)
            listening = listening_sockets(driver.pid)
        finally:
            driver.send_signal(signal.SIGTERM)
            code = driver.wait(240)
        log.seek(0)
        text = log.read()
        assert code == 75, text
    assert strange_lines(text) == [], "the console is for the run's own lines"
    assert "attempt 1: 2 workers, from the start" in text
    workers = next(event["pids"] for event in read_events(Store(run)) if event["event"] == "start")
    assert {"gcs_server", "raylet"} <= {name for _, name, _ in listening}
    assert set(workers) <= {pid for pid, _, _ in listening}, "every worker has gloo's socket"
    strangers = [found for found in listening if not is_loopback(found[2])]
    assert strangers == []
    assert not (tmp_path / ".ray").exists(), "Ray's own default writes a token that everybody can read"


def is_loopback(address: str) -> bool:
    """Also of an IPv4 address in IPv6's clothes, which Python 3.11 takes for a stranger."""
    found = ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def wait_for_step(run: Store, step: int, driver: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 240
    while not any(record["step"] >= step for record in read_metrics(run)):
        assert driver.poll() is None, "the run ended early"
        assert time.monotonic() < end, f"no step {step} in four minutes"
        time.sleep(0.2)


def listening_sockets(pid: int) -> list[tuple[int, str, str]]:
    """(pid, name, address) of every TCP socket that the process or a descendant of it listens on."""
    family = [psutil.Process(pid)]
    family += family[0].children(recursive=True)
    found = []
    for process in family:
        with suppress(psutil.NoSuchProcess):
            connections = process.net_connections(kind="tcp")
            name = process.name()
            found += [
                (process.pid, name, connection.laddr.ip)
                for connection in connections
                if connection.status == psutil.CONN_LISTEN
            ]
    return found
