"""No secret in what a run writes: canaries in every credential variable and URL, and a search through all of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from cluster.cli import main
from cluster.local_s3 import S3Server
from pipeline.store import Store
from tests.conftest import BUCKET, changed_environment

pytestmark = [pytest.mark.ray, pytest.mark.servers, pytest.mark.timeout(600)]

TINY = [
    *("--data.global-batch-size", "12", "--data.num-lanes", "6", "--data.augment.image-size", "64", "64"),
    *("--model.embed-dim", "32", "--model.depth", "2", "--model.num-heads", "2"),
    *("--model.decoder-embed-dim", "32", "--model.decoder-depth", "1", "--model.decoder-num-heads", "2"),
    *("--parallel.precision", "fp32", "--optim.num-steps", "4", "--checkpoint.every-steps", "2"),
    *("--log.every-steps", "1", "--max-attempts-without-progress", "1", "--store.deadline-s", "20"),
]
VARIABLES = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    *("GOOGLE_API_KEY", "GOOGLE_OAUTH_ACCESS_TOKEN", "AZURE_CLIENT_SECRET", "AZURE_STORAGE_KEY"),
    *("AZURE_STORAGE_SAS_TOKEN", "HF_TOKEN", "WANDB_API_KEY", "RAY_AUTH_TOKEN"),
)


@pytest.fixture
def secrets(moto_server: S3Server) -> Iterator[dict[str, str]]:
    """Variable -> canary. moto takes any credentials, so these are the working ones."""
    canaries = {name: f"canary{uuid4().hex}" for name in VARIABLES}
    with changed_environment(dict(moto_server.environment()) | canaries):
        yield canaries | {"user": f"canary{uuid4().hex}", "password": f"canary{uuid4().hex}"}


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Where Ray puts its sessions. A short path: sockets are below it."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


def test_no_secret_is_in_what_a_run_writes(
    photos: list[Path], moto_server: S3Server, secrets: dict[str, str], ray_folder: Path, tmp_path: Path
) -> None:
    """A run that finishes, and one whose dataset is damaged, so that tracebacks are written; both with -v."""
    root = f"{BUCKET}/{uuid4().hex}"
    store = Store(f"s3://{root}")
    assert main(["shard", str(photos[0].parents[1]), f"s3://{root}/data", "--num-workers", "1"]) == 0
    # The dataset over plain HTTP, with a user and a password in the URL.
    host = moto_server.endpoint.removeprefix("http://")
    login = f"{secrets['user']}:{secrets['password']}"
    texts: dict[str, bytes] = {}
    for name, code in (("good", 0), ("damaged", 1)):
        if name == "damaged":
            shard = next(entry.path for entry in store.list("data") if entry.path.endswith(".tar"))
            store.write(shard, bytes(store.size(shard)))
        words = ["--data", f"http://{login}@{host}/{root}/data", "--run", f"s3://{root}/{name}"]
        done = subprocess.run(
            [sys.executable, "-m", "cluster.cli", "-v", "pretrain", "demo", *TINY, *words],
            env={**os.environ, "RAY_TMPDIR": str(ray_folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        assert done.returncode == code, done.stdout.decode()[-3000:]
        texts[f"console of {name}"] = done.stdout
    assert b"Traceback" in texts["console of damaged"]
    texts |= {entry.path: store.read(entry.path) for entry in store.list() if not entry.path.startswith("data/")}
    assert {"good/run.json", "damaged/run.json"} <= texts.keys()
    logs = [path for path in ray_folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert any(path.name == "gcs_server.out" for path in logs)
    texts |= {str(path.relative_to(ray_folder)): path.read_bytes() for path in logs}
    found = [
        f"{variable} in {name}"
        for name, text in texts.items()
        for variable, canary in secrets.items()
        if canary.encode() in text
    ]
    assert found == []


def test_a_url_with_a_secret_is_told_without_it(
    moto_server: S3Server, secrets: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    """In the messages of commands that cannot do what they are told."""
    login, query = f"{secrets['user']}:{secrets['password']}", f"?sig={secrets['HF_TOKEN']}"
    bad = f"s3://{login}@{BUCKET}/{uuid4().hex}{query}"
    for words in (["verify", bad], ["inspect", bad], ["curve", bad, "--out", "loss.png"]):
        assert main(words) != 0
    assert main(["pretrain", "demo", *TINY, "--data", bad, "--run", bad]) != 0
    said = "".join(capfd.readouterr())
    assert [name for name, canary in secrets.items() if canary in said] == []
