"""Every command that talks to a cluster looks first whether the cluster lets in just anybody."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from dashboard import PUBLIC, serve_dashboard
from ray.util import get_node_ip_address
from run_folders import begin

from cluster.cli import main
from cluster.options import UsageError
from cluster.ray_access import reload_auth
from cluster.ray_jobs import NoAnswerError, RayJobs
from pipeline.store import Store

TOKEN = "0123456789abcdef" * 4
NAMES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
COMMANDS = ("submit", "status", "logs", "stop")


@pytest.fixture(autouse=True)
def no_token(tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """Neither a token nor a mode of the caller's, and whatever a test sets is undone, in Ray's memory too."""
    with pytest.MonkeyPatch.context() as patch:
        for name in NAMES:
            patch.setenv(name, "")  # remembers that it was not set
            patch.delenv(name)
        patch.setenv("HOME", str(tmp_path))
        reload_auth()
        yield patch
    reload_auth()


@pytest.fixture
def outward() -> str:
    """An address of this machine that is not loopback."""
    own = get_node_ip_address()
    if own.startswith("127."):
        pytest.skip("this machine has no address but loopback")
    return own


@pytest.fixture
def run(photos: list[Path], tmp_path: Path, no_token: pytest.MonkeyPatch) -> str:
    """A run, and beside it the dataset that `arguments` names."""
    # A cluster elsewhere needs data in a bucket. Here the machine is the same, whatever its address.
    no_token.setattr("cluster.submit.check_url", lambda *_: None)
    (tmp_path / "photos").mkdir()
    for photo in photos[:6]:
        shutil.copy(photo, tmp_path / "photos" / photo.name)
    assert main(["shard", str(tmp_path / "photos"), str(tmp_path / "dataset"), "--num-workers", "1"]) == 0
    begin(Store(str(tmp_path / "run")))
    return str(tmp_path / "run")


def arguments(command: str, run: str, address: str) -> list[str]:
    if command == "submit":  # a run that is not yet there
        return ["submit", "demo", "--data", f"{Path(run).parent}/dataset", "--run", f"{run}2", "--address", address]
    return [command, run, "--address", address, *(["--now"] if command == "stop" else [])]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("mode", ["disabled", None])
def test_an_open_cluster_elsewhere_is_refused_and_sent_nothing(
    command: str, mode: str | None, outward: str, run: str, no_token: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    no_token.setenv("RAY_AUTH_TOKEN", TOKEN)
    with serve_dashboard(outward, mode) as dashboard:
        assert main(arguments(command, run, dashboard.address)) == 2
    assert f"{dashboard.address} runs with token authentication off" in " ".join(capsys.readouterr().err.split())
    assert {method for method, _ in dashboard.asked} == {"GET"}
    assert {path for _, path in dashboard.asked} <= {PUBLIC, "/api/version"}
    assert not any(dashboard.authorizations), "the token was shown to a cluster that did not ask for it"


@pytest.mark.parametrize("command", COMMANDS)
def test_without_a_token_a_cluster_elsewhere_is_refused(
    command: str, outward: str, run: str, capsys: pytest.CaptureFixture
) -> None:
    with serve_dashboard(outward, "token", TOKEN) as dashboard:
        assert main(arguments(command, run, dashboard.address)) == 2
    assert "RAY_AUTH_TOKEN (not set) must hold its token" in " ".join(capsys.readouterr().err.split())
    assert {path for _, path in dashboard.asked} == {PUBLIC}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_dashboard_elsewhere_that_is_down_does_not_answer(
    command: str, outward: str, run: str, capsys: pytest.CaptureFixture
) -> None:
    with serve_dashboard(outward, "token") as dashboard:
        pass
    assert main(arguments(command, run, dashboard.address)) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert f"no Ray cluster answers at {dashboard.address} (no connection)" in told


def test_every_submission_looks_again_at_who_is_let_in(outward: str, no_token: pytest.MonkeyPatch) -> None:
    """With --wait, another cluster may answer at the address by then."""
    no_token.setenv("RAY_AUTH_TOKEN", TOKEN)
    with serve_dashboard(outward, "token", TOKEN) as dashboard:
        dashboard.takes = {}
        jobs = RayJobs(dashboard.address)
        request = {"entrypoint": "true", "metadata": {"run": "r"}}
        assert jobs.submit(submission_id="one", **request) == "one"
        dashboard.mode = "disabled"
        with pytest.raises(UsageError, match="runs with token authentication off"):
            jobs.submit(submission_id="two", **request)
        assert list(dashboard.jobs) == ["one"]
    with pytest.raises(NoAnswerError, match="no connection"):
        jobs.submit(submission_id="three", **request)


@pytest.mark.parametrize("where", ["outward", "loopback"])
def test_the_token_of_the_file_is_used_where_the_cluster_asks_for_it(
    where: str, run: str, tmp_path: Path, capsys: pytest.CaptureFixture, request: pytest.FixtureRequest
) -> None:
    """On loopback too: that may be a tunnel."""
    host = "127.0.0.1" if where == "loopback" else request.getfixturevalue("outward")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(TOKEN)
    with serve_dashboard(host, "token", TOKEN) as dashboard:
        dashboard.add_job("one", run, log="step 1\n")
        assert main(arguments("status", run, dashboard.address)) == 0
    assert set(dashboard.authorizations) == {f"Bearer {TOKEN}"}
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_an_open_cluster_on_loopback_needs_no_token_and_sees_none(run: str, no_token: pytest.MonkeyPatch) -> None:
    no_token.setenv("RAY_AUTH_TOKEN", TOKEN)
    with serve_dashboard("127.0.0.1", "disabled") as dashboard:
        assert main(arguments("status", run, dashboard.address)) == 0
    assert set(dashboard.authorizations) == {None}


def test_shards_are_not_written_by_an_open_cluster_elsewhere(
    outward: str, run: str, no_token: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Its head answers a call that has no token."""
    no_token.setenv("RAY_AUTH_TOKEN", TOKEN)
    answers = {"CheckAlive": grpc.unary_unary_rpc_method_handler(lambda request, context: b"")}
    folder = Path(run).parent
    with ThreadPoolExecutor(1) as threads:
        head = grpc.server(threads)
        head.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("ray.rpc.NodeInfoGcsService", answers),))
        address = f"{outward}:{head.add_insecure_port(f'{outward}:0')}"
        head.start()
        try:
            assert main(["shard", str(folder / "photos"), str(folder / "other"), "--address", address]) == 2
        finally:
            head.stop(None).wait()
    assert f"{address} runs with token authentication off" in " ".join(capsys.readouterr().err.split())
    assert not list((folder / "other").iterdir())
