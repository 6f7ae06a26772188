"""What Ray is told to start workers by."""

from __future__ import annotations

import os

import pytest

from cluster.environments import of_controllers, of_workers
from cluster.fork_server import command


@pytest.mark.parametrize("gpu", [True, False])
def test_workers_are_forked_and_those_that_are_not_import_by_a_hook(gpu: bool) -> None:
    environment = of_workers({}, gpu=gpu)
    assert "torch.distributed.fsdp" in environment["py_executable"]
    assert ("pipeline.decode" in environment["py_executable"]) is not gpu  # DALI would look for a GPU
    assert environment["env_vars"]["__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"].endswith("gpu" if gpu else "cpu")
    assert ("MALLOC_ARENA_MAX" in environment["env_vars"]) is not gpu


@pytest.mark.parametrize(
    "given",
    [{"py_executable": "uv run python"}, {"image_uri": "image"}, {"nsight": "default"}, {"container": {"image": "a"}}],
)
def test_how_the_user_has_processes_started_stays(given: dict[str, object]) -> None:
    assert "py_executable" not in of_workers(given, gpu=False)
    assert of_controllers(given, {"A": "1"}) == {"env_vars": {"A": "1"}}


def test_an_installed_environment_is_no_reason_against_it() -> None:
    """Ray activates it first, and has its Python found."""
    assert of_workers({"pip": ["x"], "working_dir": "gcs://x"}, gpu=False)["py_executable"].startswith("$(command -v ")
    assert command(["a", "b"], owner=7).endswith(" -m cluster.fork_server a,b 7")


def test_controllers_are_forked_while_their_driver_lives() -> None:
    environment = of_controllers({}, {"A": "1"})
    assert environment["env_vars"] == {"A": "1"}
    assert environment["py_executable"] == command(["ray.train.torch", "cluster.turns"], owner=os.getpid())
