"""What Ray is told to start workers by."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cluster.environments import of_controllers, of_workers
from cluster.fork_server import command

IMPORTED = """
import sys, torch
def refuse(*args):
    raise AssertionError("CUDA is asked for")
torch._C._cuda_init = torch._C._cuda_getDeviceCount = refuse
import {modules}
print(*sys.modules)
"""


@pytest.mark.parametrize("gpu", [True, False])
def test_workers_are_forked_from_what_has_imported(gpu: bool) -> None:
    environment = of_workers({}, gpu=gpu)
    assert "torch.distributed.fsdp" in environment["py_executable"]
    assert ("pipeline.decode" in environment["py_executable"]) is not gpu  # DALI would look for a GPU
    assert ("MALLOC_ARENA_MAX" in environment["env_vars"]) is not gpu


@pytest.mark.parametrize(
    "given",
    [{"py_executable": "uv run python"}, {"image_uri": "image"}, {"nsight": "default"}, {"container": {"image": "a"}}],
)
def test_how_the_user_has_processes_started_stays(given: dict[str, object]) -> None:
    assert "py_executable" not in of_workers(given, gpu=False)
    assert of_controllers(given, {"A": "1"}) == {"env_vars": {"A": "1"}}


def test_a_worker_without_a_gpu_finds_all_of_it_imported() -> None:
    assert modules_after("cluster.worker, torch._dynamo") <= modules_after(imports_of_workers(gpu=False))


def test_imports_for_a_worker_with_a_gpu_do_not_look_for_one() -> None:
    modules = modules_after(imports_of_workers(gpu=True))
    assert {"torch.distributed.fsdp", "torch._dynamo", "ray.train.torch"} <= modules
    assert "nvidia.dali" not in modules


def imports_of_workers(*, gpu: bool) -> str:
    modules: str = of_workers({}, gpu=gpu)["py_executable"].split()[-2]
    return modules


def modules_after(imports: str) -> set[str]:
    program = IMPORTED.format(modules=imports)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_an_installed_environment_is_no_reason_against_it() -> None:
    """Ray activates it first, and has its Python found."""
    assert of_workers({"pip": ["x"], "working_dir": "gcs://x"}, gpu=False)["py_executable"].startswith("$(command -v ")
    assert command(["a", "b"], owner=7).endswith(" -m cluster.fork_server a,b 7")


def test_controllers_are_forked_while_their_driver_lives() -> None:
    environment = of_controllers({}, {"A": "1"})
    assert environment["env_vars"] == {"A": "1"}
    assert environment["py_executable"] == command(["ray.train.torch", "cluster.roll_call"], owner=os.getpid())
