"""`tarmac shard` and `tarmac index` on what other tools wrote."""

from __future__ import annotations

import io
import json
import re
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from cluster.cli import main
from cluster.dataset_progress import DatasetProgress
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


def no_change(data: bytes) -> bytes:
    return data


def flip_last_image_byte(data: bytes) -> bytes:
    at = data.rindex(b"\xff\xd9")  # the end of a JPEG file
    return data[: at - 1] + bytes([data[at - 1] ^ 1]) + data[at:]


FINDINGS: dict[str, tuple[str, str, Callable[[bytes], bytes | None], str]] = {
    # what: (object, the object that it becomes, how, what is said)
    "missing shard": ("{}.tar", "{}.tar", lambda data: None, "is missing"),
    "extra shard": ("{}.tar", "shard-000099.tar", no_change, "is not in the manifest"),
    "changed size": ("{}.tar", "{}.tar", lambda data: data + bytes(512), "bytes; the manifest says"),
    "changed bytes": ("{}.tar", "{}.tar", flip_last_image_byte, "crc32c"),
    "an index of other bytes": ("{}.idx", "{}.idx", lambda data: data.replace(b" 512 ", b" 513 "), "sha256"),
    "a manifest that does not add up": (
        *("manifest.json", "manifest.json"),
        lambda data: json.dumps(json.loads(data) | {"num_samples": 11}).encode(),
        "num_samples (11) must be the sum over its shards (10)",
    ),
}


@pytest.mark.parametrize("what", FINDINGS)
def test_verify_says_each_problem_in_a_line(
    tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    dataset = tmp_path / "dataset"
    run(capsys, "shard", tars, dataset, "--num-workers", "1")
    source, target, change, message = FINDINGS[what]
    shard = next(dataset.glob("*.tar")).stem
    changed = change((dataset / source.format(shard)).read_bytes())
    (dataset / target.format(shard)).unlink(missing_ok=True)
    if changed is not None:
        (dataset / target.format(shard)).write_bytes(changed)
    assert main(["verify", str(dataset), *(["--deep"] if what == "changed bytes" else [])]) == 1
    *problems, last = capsys.readouterr().out.splitlines()
    assert f"{len(problems)} problems" in last
    assert all(line.startswith(target.format(shard)) for line in problems)
    assert message in problems[0]


def test_progress_without_a_terminal_is_a_line_now_and_then() -> None:
    written = io.StringIO()
    with DatasetProgress(Console(file=written, width=200), "sharding", "images", plain_every_s=0) as progress:
        progress.advance(300, 10**6, total=1000, found=True)
        progress.advance(200, 10**6, total=1000)
    first, second = written.getvalue().splitlines()
    assert first == "sharding: 300 of 1,000 images, 0 MB/s"
    assert re.fullmatch(r"sharding: 500 of 1,000 images, \d+ MB/s, 0:00:00 left", second)
    written = io.StringIO()
    with DatasetProgress(Console(file=written), "sharding", "images", plain_every_s=3600) as progress:
        progress.advance(1, 1, total=2)
    assert not written.getvalue()


def test_progress_on_a_terminal_is_a_bar_with_speed_and_time_left() -> None:
    written = io.StringIO()
    console = Console(file=written, width=120, force_terminal=True, color_system=None)
    with DatasetProgress(console, "sharding", "images") as progress:
        progress.advance(250, 10**6, total=1000)
        time.sleep(0.2)  # a speed of nothing tells no time that is left
        progress.advance(250, 10**6, total=1000)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.getvalue())
    assert re.search(r"sharding ━+ +500/1000 images \d+ MB/s 0:00:0\d", shown), shown


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
