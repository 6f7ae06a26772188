"""The local S3 server: keeps its buckets, keeps to its directory, stops what it started."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from cluster import local_s3
from cluster.local_s3 import LocalS3Error, S3Server, runs_juicefs, start_juicefs, start_local_s3
from pipeline.store import Store

pytestmark = pytest.mark.servers
needs_juicefs = pytest.mark.skipif(not runs_juicefs(), reason="the juicefs program does not run on this machine")


def use(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)


def answers(endpoint: str) -> bool:
    try:
        urllib.request.urlopen(endpoint, timeout=5).close()
    except urllib.error.HTTPError as refusal:
        refusal.close()
    except OSError:
        return False
    return True


@needs_juicefs
def test_buckets_are_back_when_it_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for start in range(2):
        with start_juicefs(tmp_path / "s3") as server:
            use(server, monkeypatch)
            server.make_bucket("photos")
            store = Store("s3://photos/dir")
            assert store.exists("a") == (start == 1)
            store.write("a", b"kept")
            assert answers(server.endpoint)
        assert not answers(server.endpoint)
    assert list(home.iterdir()) == []
    assert (tmp_path / "s3" / "secret").stat().st_mode & 0o077 == 0
    assert server.secret_key not in repr(server)


def test_the_command_prints_an_environment_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-m", "cluster.local_s3", str(tmp_path / "s3"), "--bucket", "photos"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("#"):
                break
            export, assignment = shlex.split(line)
            assert export == "export"
            monkeypatch.setenv(*assignment.split("=", 1))
        assert "s3://photos" in line
        store = Store("s3://photos/dir")
        store.write("a", b"x")
        assert store.read("a") == b"x"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_moto_serves_where_juicefs_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(local_s3, "_juicefs_program", lambda: "/bin/false")
    assert not runs_juicefs()
    with pytest.raises(LocalS3Error, match="/bin/false"), start_juicefs(tmp_path / "s3"):
        pass
    with start_local_s3(tmp_path / "s3") as server:
        use(server, monkeypatch)
        server.make_bucket("photos")
        Store("s3://photos").check_writable()
    assert "keeps nothing on disk" in caplog.text
    assert not answers(server.endpoint)


@needs_juicefs
def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with start_juicefs(tmp_path / "one") as server:
        port = int(server.endpoint.rsplit(":", 1)[1])
        with pytest.raises(LocalS3Error, match="is not free"), start_juicefs(tmp_path / "two", port):
            pass
        assert answers(server.endpoint)
