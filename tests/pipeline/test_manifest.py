from __future__ import annotations

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ManifestError, ShardError
from pipeline.manifest import (
    BadSample,
    Manifest,
    ShardIndex,
    ShardInfo,
    read_index,
    read_manifest,
    write_index,
    write_manifest,
)
from pipeline.store import Store

MANIFEST = Manifest(
    num_samples=5,
    num_bytes=30_720,
    classes=("cat", "dög"),
    settings={"seed": 3, "shard_bytes": 1},
    shards=(
        ShardInfo("shard-000000", 2, 10_240, "a" * 64, "b" * 64, "e" * 64),
        ShardInfo("shard-000001", 3, 20_480, "c" * 64, "d" * 64, "f" * 64),
    ),
    bad_samples=(BadSample("cat/x.jpg", "the file is empty"),),
)
INDEX = ShardIndex(
    keys=np.array(["cat/a", "d%C3%B6g/a-name-that-is-longer-than-fifteen-bytes"]),
    offset=np.array([512, 2**40], np.int64),
    num_bytes=np.array([100, 7], np.int64),
    crc32c=np.array([2**32 - 1, 0], np.uint32),
    height=np.array([3, 4], np.int32),
    width=np.array([5, 6], np.int32),
    label=np.array([0, -1], np.int32),
)


def test_manifest_survives_writing_and_reading(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    write_manifest(store, MANIFEST)
    assert read_manifest(store) == MANIFEST
    assert read_manifest(store).digest() == MANIFEST.digest()
    assert json.loads((tmp_path / "manifest.json").read_bytes())["shards"][1] == {
        "name": "shard-000001",
        "num_samples": 3,
        "num_bytes": 20480,
        "sha256": "c" * 64,
        "index_sha256": "d" * 64,
        "idx_sha256": "f" * 64,
    }


def test_digest_changes_with_the_content() -> None:
    others = [
        replace(MANIFEST, settings={"seed": 4, "shard_bytes": 1}),
        replace(MANIFEST, classes=None),
        replace(MANIFEST, bad_samples=()),
    ]
    assert len({manifest.digest() for manifest in [MANIFEST, *others]}) == 4


def damaged(**changes: Any) -> bytes:
    return json.dumps(json.loads(MANIFEST.to_json()) | changes).encode()


def damaged_shard(**changes: Any) -> bytes:
    content = json.loads(MANIFEST.to_json())
    content["shards"][0] |= changes
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a dataset manifest"),
        (b"[]", "not a dataset manifest"),
        (b"\xff", "not a dataset manifest"),
        (MANIFEST.to_json()[:-20], "not a dataset manifest"),
        (damaged(version=2), "version"),
        (damaged(unknown=1), "unknown"),
        (damaged(num_samples=6), "num_samples"),
        (damaged(num_bytes=1), "num_bytes"),
        (damaged(shards=[]), "num_samples"),
        (damaged(shards=[], num_samples=0, num_bytes=0), "no shards"),
        (damaged(classes=[1]), "classes"),
        (damaged(settings=None), "settings"),
        (damaged_shard(name="../x"), "must look like"),
        (damaged_shard(name="shard-000001"), "twice"),
        (damaged_shard(num_samples=0), "positive"),
        (damaged_shard(num_bytes=True), "positive"),
        (damaged_shard(sha256="A" * 64), "hex"),
        (damaged_shard(index_sha256=None), "hex"),
        (damaged_shard(idx_sha256="e" * 63), "hex"),
        (damaged_shard(extra=1), "extra"),
    ],
)
def test_damage_is_an_error_that_says_what(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "manifest.json").write_bytes(data)
    with pytest.raises(ManifestError, match=message) as error:
        read_manifest(Store(str(tmp_path)))
    assert str(tmp_path) in str(error.value)


def test_no_manifest_names_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"manifest\.json does not exist.*`tarmac shard SOURCE "):
        read_manifest(Store(str(tmp_path / "nothing")))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_hundred_thousand_shards_are_read_in_seconds() -> None:
    num = 100_000
    shards = tuple(ShardInfo(f"shard-{i:06d}", 10_000, 2**30, "a" * 64, "b" * 64, "c" * 64) for i in range(num))
    manifest = Manifest(num * 10_000, num * 2**30, None, {}, shards, ())
    data = manifest.to_json()
    assert len(data) < 32 * 2**20
    assert Manifest.from_json(data) == manifest


def test_index_survives_writing_and_reading(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    sha256 = write_index(store, "shard-000000", INDEX)
    read = read_index(store, ShardInfo("shard-000000", 2, 1, "a" * 64, sha256, "e" * 64))
    assert len(read) == 2
    assert read.keys.tolist() == INDEX.keys.tolist()
    for field in fields(INDEX)[1:]:
        np.testing.assert_array_equal(getattr(read, field.name), getattr(INDEX, field.name))
        assert getattr(read, field.name).dtype == getattr(INDEX, field.name).dtype
    columns = pq.read_table(tmp_path / "index" / "shard-000000.parquet").column_names
    assert columns == ["key", "offset", "num_bytes", "crc32c", "height", "width", "label"]


def test_index_that_is_not_the_manifests_is_refused(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    sha256 = write_index(store, "shard-000000", INDEX)
    with pytest.raises(ShardError, match="has 2 rows, but the manifest says 3"):
        read_index(store, ShardInfo("shard-000000", 3, 1, "a" * 64, sha256, "e" * 64))
    with pytest.raises(ShardError, match="sha256"):
        read_index(store, ShardInfo("shard-000000", 2, 1, "a" * 64, "b" * 64, "e" * 64))
    with pytest.raises(ShardError, match=r"shard-000001\.parquet is missing"):
        read_index(store, ShardInfo("shard-000001", 2, 1, "a" * 64, sha256, "e" * 64))
    shutil.rmtree(tmp_path / "index")
    store.write("index/shard-000000.parquet", b"PAR1 but not really PAR1")
    with pytest.raises(ShardError, match="sha256"):
        read_index(store, ShardInfo("shard-000000", 2, 1, "a" * 64, sha256, "e" * 64))
