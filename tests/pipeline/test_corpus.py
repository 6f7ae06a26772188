"""Files as they are found in the wild, through shards, or tars in place, and the real loader: none of them stops it."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from corpus import BAD, CONVERTED, JPEG, KEPT, PHOTO, encoded

from pipeline import AugmentConfig, DataConfig, Loader, open_dataset
from pipeline.images import Check
from pipeline.index_dataset import index_dataset
from pipeline.sources import FolderSource
from pipeline.write import write_dataset

NUM_FLIPPED = 12
CONFIG = DataConfig(
    global_batch_size=8,
    num_lanes=4,
    shuffle_window_samples=8,
    augment=AugmentConfig(image_size=(32, 32)),
    num_decode_threads=2,
)


def flipped(seed: int) -> bytes:
    """A JPEG with flipped bits in its pixels: decoders make something of it, or refuse it."""
    data = bytearray(JPEG)
    rng = np.random.default_rng(seed)
    for at in rng.integers(JPEG.index(b"\xff\xda") + 20, len(data) - 2, 20):
        data[at] ^= 1 << rng.integers(8)
    return bytes(data)


def whole_files() -> dict[str, bytes]:
    """Files that have to be kept, or converted."""
    files = {name: data for name, (data, _) in (KEPT | CONVERTED).items()}
    files |= {"12,000 pixels wide": encoded(PHOTO.resize((12_000, 20)), "JPEG")}
    return files | {f"flipped bits {seed}": flipped(seed) for seed in range(NUM_FLIPPED)}


def check_epochs(url: str) -> None:
    """Two epochs: every sample comes once in each, or another one in its place, which is said."""
    dataset = open_dataset(url)
    quarantined = set()
    with Loader(dataset, CONFIG) as loader:
        num_steps = -(-2 * dataset.num_samples // CONFIG.global_batch_size)
        wanted, given = [], []
        for step in range(num_steps):
            batch = next(loader)
            wanted += dataset.step_sample_ids(CONFIG, step).tolist()
            given += batch.sample_ids.tolist()
            quarantined |= {(report.sample_id, report.reason) for report in batch.quarantined}
    damaged = {sample_id for sample_id, _ in quarantined}
    assert all(found == expected for found, expected in zip(given, wanted, strict=True) if expected not in damaged)
    keys = np.concatenate([dataset.index(shard).keys for shard in range(len(dataset.manifest.shards))])
    assert all("flipped" in keys[sample_id] and reason for sample_id, reason in quarantined)
    assert len(damaged) <= NUM_FLIPPED


@pytest.mark.parametrize("check", ["structure", "pixels"])
def test_through_shards(tmp_path: Path, check: Check) -> None:
    source, kept = tmp_path / "source", whole_files()
    source.mkdir()
    for name, data in (kept | {name: data for name, (data, _) in BAD.items()}).items():
        (source / f"{name}.jpg").write_bytes(data)  # the content decides, whatever the name
    url = str(tmp_path / "dataset")
    manifest = write_dataset(FolderSource(str(source)), url, max_bad=len(BAD) + NUM_FLIPPED, check=check)
    refused = {Path(sample.key).stem for sample in manifest.bad_samples}
    assert refused - {name for name in kept if "flipped" in name} == set(BAD)
    assert manifest.settings["num_converted"] == len(CONVERTED)
    check_epochs(url)


def test_in_tars_of_others(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "others.tar", "w") as tar:
        for number, data in enumerate(whole_files().values()):
            member = tarfile.TarInfo(f"flipped{number}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for number, (data, _) in enumerate(BAD.values()):
            member = tarfile.TarInfo(f"bad{number}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    manifest = index_dataset(str(tmp_path), max_bad=100)
    assert len([sample for sample in manifest.bad_samples if "/bad" in sample.key]) == len(BAD)
    check_epochs(str(tmp_path))
