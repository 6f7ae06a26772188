"""Sharding on a real three-node Ray cluster into a bucket, a node lost on the way: the bytes one machine writes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from pipeline.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


def shard(source: Path, dataset: Path | str, address: str | None) -> subprocess.Popen[str]:
    options = ["--shard-bytes", "20000", "--json"] + (["--address", address] if address else ["--num-workers", "1"])
    command = [sys.executable, "-m", "cluster.cli", "shard", str(source), str(dataset), *options]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_lost_node_changes_nothing(bucket: str, nodes: Cluster, photos: list[Path], tmp_path: Path) -> None:
    """`bucket` comes first: the nodes take the server's address and credentials from the environment."""
    source = tmp_path / "source"
    for copy in range(5):
        for photo in photos:
            (source / photo.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(photo, source / photo.parent.name / f"{copy}_{photo.name}")
    here = shard(source, tmp_path / "here", None)
    _, errors = here.communicate(timeout=120)
    assert here.returncode == 0, errors
    there, written = shard(source, bucket, nodes.address), Store(bucket)
    deadline = time.monotonic() + 120
    while sum(entry.path.endswith(".parquet") for entry in written.list()) < 3:
        assert there.poll() is None, there.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    nodes.remove_node(nodes.worker_nodes.copy().pop(), allow_graceful=False)
    output, errors = there.communicate(timeout=400)
    assert there.returncode == 0, errors
    assert '"num_samples": 200' in output
    assert {entry.path: written.read(entry.path) for entry in written.list()} == files(tmp_path / "here")


def test_no_cluster_is_an_error_that_names_it(photos: list[Path], tmp_path: Path) -> None:
    failed = shard(photos[0].parents[1], tmp_path / "dataset", "127.0.0.1:1")
    _, errors = failed.communicate(timeout=120)
    assert failed.returncode == 1
    assert "127.0.0.1:1" in errors
    assert "--address" in errors
    assert not list((tmp_path / "dataset").rglob("*.tar"))
