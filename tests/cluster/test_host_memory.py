"""Memory that a worker's step frees is there for the next one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cluster.host_memory import keep_freed

STEPS = """
import itertools, resource, threading, torch
widths = [64, 1024] * 8
model = torch.nn.Sequential(*(torch.nn.Linear(*pair) for pair in itertools.pairwise(widths)))
images = torch.ones(4096, 64)
def steps(count):
    for _ in range(count):
        model(images).sum().backward()
def train():
    steps(6)  # until the free memory has found its shape
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    steps(18)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=train)
thread.start()
thread.join()
"""


def page_faults(environment: dict[str, str]) -> int:
    """Of 18 steps in a thread."""
    command = [sys.executable, "-c", STEPS]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_a_step_finds_the_memory_of_the_one_before() -> None:
    assert page_faults(keep_freed()) < page_faults({}) / 4


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    assert keep_freed()["MALLOC_ARENA_MAX"] == "4"
