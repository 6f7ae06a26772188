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


def test_only_the_imports_let_others_go_first():
    call = """
import gc, importlib, os, pathlib, threading, time
nice, import_module = {}, importlib.import_module
def note(name, package=None):
    nice[name] = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert not gc.isenabled()
    return import_module(name, package)
importlib.import_module = note
before = os.getpriority(os.PRIO_PROCESS, 0)
cluster.standby.import_for_cpu()
assert set(nice.values()) == {min(19, before + 10)}, nice
time.sleep(1)  # the thread that has imported ends after its last word
names = {int(path.parent.name): path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")}
nice = {name: os.getpriority(os.PRIO_PROCESS, thread) for thread, name in names.items()}
nice.pop("jemalloc_bg_thd", None)  # pyarrow's, begun by its import: it gives memory back
assert set(nice.values()) == {before}, nice
assert gc.isenabled() and gc.get_freeze_count() > 100_000
"""
    assert "cluster.worker" in modules_after(call)
