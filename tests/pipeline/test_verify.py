from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.manifest import Manifest, parse_index, read_manifest, write_index, write_manifest
from pipeline.store import Store
from pipeline.verify import Problem, verify_dataset

TAR, IDX, INDEX = "shard-000001.tar", "shard-000001.idx", "index/shard-000001.parquet"


def check(folder: Path, deep: bool = False) -> list[Problem]:
    return verify_dataset(Store(str(folder)), deep=deep, num_threads=2)


@pytest.mark.parametrize("deep", [False, True])
def test_a_sound_dataset_has_no_problems(whole_dataset: Path, deep: bool) -> None:
    seen = []
    assert verify_dataset(Store(str(whole_dataset)), deep=deep, on_progress=lambda info: seen.append(info.name)) == []
    assert seen == [shard.name for shard in read_manifest(Store(str(whole_dataset))).shards]


def test_no_manifest_is_a_problem(dataset_folder: Path) -> None:
    (dataset_folder / "manifest.json").unlink()
    (problem,) = check(dataset_folder)
    assert problem.path == "manifest.json"
    assert "does not exist" in problem.message


def test_a_manifest_that_does_not_add_up_is_a_problem(dataset_folder: Path) -> None:
    path = dataset_folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_samples": 29}))
    (problem,) = check(dataset_folder)
    assert "num_samples (29) must be the sum over its shards (28)" in problem.message


@pytest.mark.parametrize("path", [TAR, IDX, INDEX])
@pytest.mark.parametrize("deep", [False, True])
def test_a_missing_object_is_named(dataset_folder: Path, path: str, deep: bool) -> None:
    (dataset_folder / path).unlink()
    assert check(dataset_folder, deep) == [Problem(path, "is missing")]


@pytest.mark.parametrize("path", ["shard-000099.tar", "shard-000099.idx", "index/shard-000099.parquet"])
def test_an_object_too_many_is_named(dataset_folder: Path, path: str) -> None:
    shutil.copy(dataset_folder / TAR, dataset_folder / path)
    (dataset_folder / "README.md").write_text("not ours, and nobody's business")
    (problem,) = check(dataset_folder)
    assert problem.path == path
    assert "not in the manifest" in problem.message


def test_a_truncated_shard_is_found_by_its_size(dataset_folder: Path) -> None:
    data = (dataset_folder / TAR).read_bytes()
    (dataset_folder / TAR).write_bytes(data[:3000])
    assert check(dataset_folder) == [Problem(TAR, f"has 3000 bytes; the manifest says {len(data)}")]
    messages = [problem.message for problem in check(dataset_folder, deep=True)]
    assert any("cannot be read as a tar" in message for message in messages)
    assert any("sha256" in message for message in messages)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


def test_a_flipped_bit_in_an_image_is_found_by_reading_all(dataset_folder: Path) -> None:
    index, _ = parse_index((dataset_folder / INDEX).read_bytes(), INDEX)
    flip(dataset_folder / TAR, int(index.offset[1]) + 20)
    assert check(dataset_folder) == []
    problems = check(dataset_folder, deep=True)
    assert [problem.path for problem in problems] == [TAR, TAR]
    assert f"sample 1 ({index.keys[1]}) has crc32c" in problems[0].message
    assert "has sha256" in problems[1].message


@pytest.mark.parametrize("position", [0, 100, 512 * 2 + 10, -1])
def test_a_flipped_bit_anywhere_in_a_tar_is_found(dataset_folder: Path, position: int) -> None:
    flip(dataset_folder / TAR, position)
    assert TAR in {problem.path for problem in check(dataset_folder, deep=True)}


def test_a_wrong_label_is_found(dataset_folder: Path) -> None:
    data = (dataset_folder / TAR).read_bytes()
    index, _ = parse_index((dataset_folder / INDEX).read_bytes(), INDEX)
    label = int(index.offset[0] + index.num_bytes[0])
    label += -label % 512 + 512
    assert data[label : label + 1] == str(index.label[0]).encode()
    (dataset_folder / TAR).write_bytes(data[:label] + b"7" + data[label + 1 :])
    messages = [problem.message for problem in check(dataset_folder, deep=True)]
    assert any("holds b'7', which is not the label" in message for message in messages)


@pytest.mark.parametrize("path", [INDEX, IDX])
def test_a_damaged_index_is_named(dataset_folder: Path, path: str) -> None:
    flip(dataset_folder / path, 50)
    (problem,) = check(dataset_folder)
    assert problem.path == path
    assert "the manifest says" in problem.message


def test_no_threads_are_refused(whole_dataset: Path) -> None:
    with pytest.raises(ValueError, match=r"num_threads \(0\) must be at least 1"):
        verify_dataset(Store(str(whole_dataset)), num_threads=0)


def with_another_idx(folder: Path, content: str) -> None:
    """Replace a shard's idx, and let the manifest vouch for the new one."""
    (folder / IDX).write_text(content)
    vouch(folder, idx_sha256=hashlib.sha256(content.encode()).hexdigest())


def vouch(folder: Path, **changes: str) -> None:
    store = Store(str(folder))
    manifest = read_manifest(store)
    shards = [replace(info, **changes) if f"{info.name}.tar" == TAR else info for info in manifest.shards]
    (folder / "manifest.json").unlink()
    write_manifest(store, replace(manifest, shards=tuple(shards)))


@pytest.mark.parametrize("content", ["", "v1.2 99\n", "v1.1 4\n"])
def test_an_idx_with_another_head_is_named(dataset_folder: Path, content: str) -> None:
    with_another_idx(dataset_folder, content)
    (problem,) = check(dataset_folder)
    assert problem.path == IDX
    assert "starts with" in problem.message


def test_an_idx_with_another_offset_is_named(dataset_folder: Path) -> None:
    text = (dataset_folder / IDX).read_text()
    with_another_idx(dataset_folder, text.replace(" 512 ", " 1024 ", 1))
    (problem,) = check(dataset_folder)
    assert problem.path == IDX
    assert "other offsets" in problem.message


def with_another_index(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Replace a shard's index, and let the manifest vouch for the new one."""
    store = Store(str(folder))
    index, metadata = parse_index(store.read(INDEX), INDEX)
    columns = {name: column.copy() for name, column in vars(index).items()}
    change(columns)
    sha256 = write_index(store, "shard-000001", replace(index, **columns), metadata)
    vouch(folder, index_sha256=sha256)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("offset", 1, "overlap"),
        ("num_bytes", 10**9, "overlap, or lie outside"),
        ("num_bytes", 0, "overlap"),
        ("height", 0, "without height"),
        ("label", 4, r"labels outside of [0, 3]"),
        ("label", -1, r"labels outside of [0, 3]"),
    ],
)
def test_an_index_that_makes_no_sense_is_named(dataset_folder: Path, column: str, value: int, message: str) -> None:
    with_another_index(dataset_folder, lambda columns: columns[column].__setitem__(-1, value))
    problems = check(dataset_folder)
    assert INDEX in {problem.path for problem in problems}
    assert any(message in problem.message for problem in problems)


def test_a_key_twice_is_named(dataset_folder: Path) -> None:
    with_another_index(dataset_folder, lambda columns: columns["keys"].__setitem__(0, columns["keys"][1]))
    (problem,) = check(dataset_folder)
    assert problem == Problem(INDEX, "has a key twice")
    problems = check(dataset_folder, deep=True)
    assert any("is called" in problem.message for problem in problems)


def test_the_whole_manifest_is_checked_by_reading_it(dataset_folder: Path) -> None:
    manifest = read_manifest(Store(str(dataset_folder)))
    wrong = [replace(info, sha256="0" * 64) for info in manifest.shards[:1]]
    changed: Manifest = replace(manifest, shards=(*wrong, *manifest.shards[1:]))
    write_manifest(Store(str(dataset_folder)), changed)
    (problem,) = check(dataset_folder, deep=True)
    assert problem.path == "shard-000000.tar"
    assert "has sha256" in problem.message
