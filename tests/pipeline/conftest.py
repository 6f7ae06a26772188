from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import skimage.data
from PIL import Image

from pipeline.sources import FolderSource
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
