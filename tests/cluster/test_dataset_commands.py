"""`tarmac shard` and `tarmac index` on what other tools wrote."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from cluster.cli import main
from pipeline.store import Store


@pytest.fixture
def tars(photos: list[Path], tmp_path: Path) -> Path:
    """A folder with two WebDataset tars, and a list of classes beside it."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for number in range(2):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for photo in photos[number * 5 : number * 5 + 5]:
                for name, content in ((f"{photo.stem}.jpg", photo.read_bytes()), (f"{photo.stem}.cls", b"1")):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


def test_index_verify_inspect_agree(tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes = ("--classes", tmp_path / "classes.txt")
    made = json.loads(run(capsys, "index", tars, *classes, "--json"))
    assert (made["num_samples"], made["num_classes"], made["num_shards_resumed"]) == (10, 2, 0)
    assert json.loads(run(capsys, "verify", tars, "--deep", "--json")) == {"problems": []}
    assert json.loads(run(capsys, "inspect", tars, "--json"))["largest_class"] == "bee"
    assert "max_bad (-1)" in run(capsys, "index", tars, "--max-bad", "-1", code=2).replace("--max-bad", "max_bad")


def test_shard_takes_the_classes_too(tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes = ("--classes", tmp_path / "classes.txt")
    run(capsys, "shard", tars, tmp_path / "dataset", *classes, "--num-workers", "1")
    assert json.loads(run(capsys, "inspect", tmp_path / "dataset", "--json"))["largest_class"] == "bee"


def test_a_bad_image_is_refused_or_left_out(tars: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tarfile.open(tars / "2.tar", "w") as tar:
        member = tarfile.TarInfo("x.jpg")
        tar.addfile(member)
        tar.addfile(tarfile.TarInfo("y.txt"))
    assert "2.tar/x.jpg: the file is empty" in run(capsys, "index", tars, code=1)
    assert not Store(str(tars)).exists("manifest.json")


def test_large_images_are_made_smaller(tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "shard", tars, tmp_path / "dataset", "--max-side", "64", "--num-workers", "1")
    found = json.loads(run(capsys, "inspect", tmp_path / "dataset", "--json"))
    assert (max(found["heights"]["max"], found["widths"]["max"]), found["settings"]["max_side"]) == (64, 64)
    assert "--max-side (0)" in run(capsys, "shard", tars, tmp_path / "other", "--max-side", "0", code=2)
