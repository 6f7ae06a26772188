"""Memory that a worker's step frees is there for the next one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cluster.host_memory import keep_freed

STEPS = """
import resource, threading, torch
def step():
    kept = [torch.ones(2**20) for _ in range(40)]  # 160 MiB
def train():
    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=train)
thread.start()
thread.join()
"""
NUM_PAGES = 160 * 2**20 // 4096


def page_faults(environment: dict[str, str]) -> int:
    """Of the second step."""
    command = [sys.executable, "-c", STEPS]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_the_second_step_finds_its_memory() -> None:
    assert page_faults(keep_freed()) < NUM_PAGES / 4 < page_faults({})


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    assert keep_freed()["MALLOC_ARENA_MAX"] == "4"
