"""What processes import while they wait for work."""

from __future__ import annotations

import subprocess
import sys

WATCHED = """
import sys, torch
def refuse(*args):
    raise AssertionError("CUDA is asked for")
torch._C._cuda_init = torch._C._cuda_getDeviceCount = refuse
import cluster.standby
{call}
print(*sys.modules)
"""


def modules_after(call: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", WATCHED.format(call=call)], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_a_process_without_a_gpu_imports_all_that_a_worker_does():
    assert modules_after("import cluster.worker, torch._dynamo") <= modules_after("cluster.standby.import_for_cpu()")


def test_a_process_that_will_have_a_gpu_does_not_look_for_one():
    modules = modules_after("cluster.standby.import_for_gpu()")
    assert {"torch.distributed.fsdp", "torch._dynamo", "ray.train.torch"} <= modules
    assert "nvidia.dali" not in modules
