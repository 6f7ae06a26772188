from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import skimage.data
from faulty_proxy import Faults, start_faulty_proxy
from noise import PART_BYTES
from PIL import Image

from cluster.local_s3 import S3Server
from pipeline import store_s3
from pipeline.sources import FolderSource
from pipeline.store import Store
from pipeline.write import write_dataset

# Names that need care: a space, a dot, letters beyond ASCII, a percent sign.
CLASS_NAMES = ("cat", "hot dog", "ünï.d", "100%25")
IMAGES_PER_CLASS = 7


@pytest.fixture(scope="session")
def small_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders with small crops of a photograph, all of different sizes."""
    root = tmp_path_factory.mktemp("small_photos")
    photo = Image.fromarray(skimage.data.astronaut())
    for label, name in enumerate(CLASS_NAMES):
        (root / name).mkdir()
        for number in range(IMAGES_PER_CLASS):
            step = label * IMAGES_PER_CLASS + number
            crop = photo.crop((step * 10, step * 8, step * 10 + 60 + step, step * 8 + 90 - step))
            crop.save(root / name / f"photo {number}.v{label}.JPG", "JPEG", quality=90)
    return root


@pytest.fixture
def image_folder(small_photos: Path, tmp_path: Path) -> Path:
    """A copy of `small_photos` that a test may change."""
    return Path(shutil.copytree(small_photos, tmp_path / "source"))


@pytest.fixture(scope="session")
def whole_dataset(small_photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small_photos` as a dataset of several shards; not to be changed."""
    path = tmp_path_factory.mktemp("whole") / "dataset"
    write_dataset(FolderSource(str(small_photos)), str(path), shard_bytes=12_000)
    return path


@pytest.fixture
def dataset_folder(whole_dataset: Path, tmp_path: Path) -> Path:
    """A copy of `whole_dataset` that a test may change."""
    return Path(shutil.copytree(whole_dataset, tmp_path / "dataset"))


@pytest.fixture
def read_files() -> Callable[[Path], dict[str, bytes]]:
    """All files below a folder, by their relative paths."""
    return lambda folder: {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.fixture
def store(store_url: str, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store of each kind; long objects have parts of the shortest length."""
    monkeypatch.setattr(store_s3, "PART_BYTES", PART_BYTES)
    return Store(store_url)


@pytest.fixture
def faults(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """A proxy that every store opened from now on goes through."""
    with start_faulty_proxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        yield proxy
