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
ENCODER = [
    *("--model.embed-dim", "32", "--model.depth", "2", "--model.num-heads", "2"),
    *("--data.augment.image-size", "64", "64", "--data.augment.patch-size", "8"),
    *("--data.global-batch-size", "8", "--data.num-lanes", "4", "--data.micro-batch-size", "4"),
    *("--optim.num-steps", "4", "--max-attempts-without-progress", "1", "--store.deadline-s", "20"),
]
VARIABLES = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    *("GOOGLE_API_KEY", "GOOGLE_OAUTH_ACCESS_TOKEN", "AZURE_CLIENT_SECRET", "AZURE_STORAGE_KEY"),
    *("AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_CONNECTION_STRING", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"),
    *("WANDB_API_KEY", "RAY_AUTH_TOKEN", "RAY_REDIS_PASSWORD"),
)


@pytest.fixture
def secrets(moto_server: S3Server) -> Iterator[dict[str, str]]:
    """What -> canary. moto takes any credentials, so those of AWS are the working ones.

    The endpoint that S3 does not take, as it has one of its own, has a login in it: `user` and `password`.
    """
    canaries = {name: f"canary{uuid4().hex}" for name in VARIABLES}
    login = {name: f"canary{uuid4().hex}" for name in ("user", "password")}
    endpoint = {"AWS_ENDPOINT_URL": with_login(moto_server.endpoint, login)}
    with changed_environment(dict(moto_server.environment()) | canaries | endpoint):
        yield canaries | login


def with_login(endpoint: str, secrets: dict[str, str]) -> str:
    return endpoint.replace("http://", f"http://{secrets['user']}:x/{secrets['password']}@")


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Where Ray puts its sessions. A short path: sockets are below it."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


def places(canary: str, texts: dict[str, bytes]) -> list[str]:
    return [name for name, text in texts.items() if canary.encode() in text]


@pytest.mark.timeout(900)
def test_no_secret_is_in_what_a_run_writes(
    moto_server: S3Server, photos: list[Path], secrets: dict[str, str], ray_folder: Path, tmp_path: Path
) -> None:
    """A run that finishes, its evaluation and its report; a bucket that is not there, and a server that is not.

    Then a run whose dataset is damaged, so that tracebacks are written. All with -v. The folder of it all in the bucket
    has a name that is no secret, and which the search has to find in each kind of text.
    """
    control = f"control{uuid4().hex}"
    root = f"{BUCKET}/{control}"
    store = Store(f"s3://{root}")
    data, good = f"s3://{root}/data", f"s3://{root}/good"
    assert main(["shard", str(photos[0].parents[1]), data, "--num-workers", "1"]) == 0
    texts: dict[str, bytes] = {}

    def tarmac(name: str, code: int, words: list[str], **environment: str) -> None:
        with open(tmp_path / name, "wb") as console:
            done = subprocess.run(
                [sys.executable, "-m", "cluster.cli", "-v", *words],
                env={**os.environ, "RAY_TMPDIR": str(ray_folder), **environment},
                stdout=console,
                stderr=subprocess.STDOUT,
                check=False,
                timeout=240,
            )
        texts[f"console of {name}"] = (tmp_path / name).read_bytes()
        assert done.returncode == code, texts[f"console of {name}"].decode()[-3000:]

    tarmac("good", 0, ["pretrain", "demo", *TINY, "--data", data, "--run", good])
    judged = ["--from", good, "--data", data, "--val", data, "--run", f"s3://{root}/judged"]
    tarmac("judged", 0, ["evaluate", "linear_cifar_tiny", *ENCODER, *judged])
    tarmac("report", 0, ["report", good])
    tarmac("no bucket", 1, ["pretrain", "demo", *TINY, "--data", data, "--run", f"s3://no-{control}/run"])
    # botocore tells the endpoint whole: without the filter its login would be on the console.
    wrong = with_login(moto_server.endpoint, secrets)
    tarmac("no server", 1, ["pretrain", "demo", *TINY, "--data", data, "--run", good], AWS_ENDPOINT_URL_S3=wrong)
    assert moto_server.endpoint.encode() in texts["console of no server"]
    shard = next(entry.path for entry in store.list("data") if entry.path.endswith(".tar"))
    store.write(shard, bytes(store.size(shard)))
    tarmac("damaged", 1, ["pretrain", "demo", *TINY, "--data", data, "--run", f"s3://{root}/damaged"])
    for name in ("no bucket", "no server", "damaged"):
        assert b"Traceback" in texts[f"console of {name}"]

    objects = {entry.path: store.read(entry.path) for entry in store.list() if not entry.path.startswith("data/")}
    written = {"good/run.json", "good/report.html", "judged/run.json", "judged/result.json", "damaged/run.json"}
    assert written <= objects.keys()
    files = [path for path in ray_folder.rglob("*") if path.is_file() and not path.is_symlink()]
    logs = {str(path.relative_to(ray_folder)): path.read_bytes() for path in files}
    assert any(name.endswith("gcs_server.out") for name in logs)
    for kind, those in {"console": texts, "bucket": objects, "Ray's logs": logs}.items():
        assert places(control, those), f"the search finds nothing in {kind}"
    everything = texts | objects | logs
    found = {what: places(canary, everything) for what, canary in secrets.items()}
    assert {what: names for what, names in found.items() if names} == {}


def test_a_url_with_a_secret_is_told_without_it(
    moto_server: S3Server, secrets: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    """In the messages of commands, which all refuse it, before anything is asked of a server."""
    login, query = f"{secrets['user']}:{secrets['password']}", f"?sig={secrets['HF_TOKEN']}"
    raw = f"{secrets['user']}:x/{secrets['password']}"  # as keys of AWS are
    host = moto_server.endpoint.removeprefix("http://")
    fine = f"s3://{BUCKET}/{uuid4().hex}"
    urls = [f"{fine}{query}", f"https://{host}/a{query}"]
    urls += [f"{place}{who}@{at}/a" for who in (login, raw) for place, at in (("s3://", BUCKET), ("http://", host))]
    urls += [f"sftp://{login}@{host}/a", f"s3://{login}/{BUCKET}/a"]
    for bad in urls:
        one = [["verify", bad], ["inspect", bad], ["curve", bad, "--out", "loss.png"], ["report", bad], ["status", bad]]
        train = ["pretrain", "demo", *TINY]
        judge = ["evaluate", "linear_cifar_tiny", *ENCODER, "--val", fine, "--run", fine]
        two = [[*train, "--data", bad, "--run", fine], [*train, "--data", fine, "--run", bad]]
        two += [[*judge, "--from", bad, "--data", fine], [*judge, "--from", fine, "--data", bad]]
        for words in one + (two if bad in urls[2:5] else []):  # these parse every field of a recipe, which takes long
            assert main(words) == 2, words
    said = "".join(capfd.readouterr())
    assert "must have no user, password or query" in said
    assert [name for name, canary in secrets.items() if canary in said] == []
