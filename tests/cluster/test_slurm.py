"""docs/slurm.sbatch, run with stand-ins for Slurm's and Ray's commands that write down how they were called."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "slurm.sbatch"
ARGUMENTS = ["mae_base_800ep", "--data", "s3://bucket/a b", "--run", "s3://bucket/runs/b", "--num-workers", "8"]

RECORD = """#!/bin/bash
# name, token, mode, address, arguments: one call a line
printf '%s\\t' "${0##*/}" "${RAY_AUTH_TOKEN-}" "${RAY_AUTH_MODE-}" "${RAY_ADDRESS-}" "$@" >>"$CALLS/${0##*/}.$$"
"""
STAND_INS = {
    # The steps hold their nodes until they are told to end.
    "srun": "trap 'echo ended >\"$CALLS/ended.$$\"; exit 0' TERM\nwhile :; do sleep 0.05; done\n",
    "scontrol": 'if [[ $1 == show ]]; then printf "node%d\\n" 1 2 3; fi\n',
    "getent": 'printf "192.0.2.7 STREAM node1\\n192.0.2.8 STREAM node1\\n"\n',
    "ray": "exit 0\n",
    # It ends by itself, or waits for the TERM that makes it save.
    "tarmac": 'if [[ $1 != pretrain ]]; then exit 0; fi\nif [[ $ENDS ]]; then exit "$ENDS"; fi\n'
    "trap 'sleep 0.2; exit 75' TERM\n: >\"$CALLS/ready\"\nwhile :; do sleep 0.05; done\n",
}


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    programs, calls = tmp_path / "bin", tmp_path / "calls"
    programs.mkdir()
    calls.mkdir()
    for name, behaviour in STAND_INS.items():
        program = programs / name
        program.write_text(RECORD + behaviour)
        program.chmod(0o755)
    return calls


def start(calls: Path, *, nodes: int = 3, ends: str = "") -> subprocess.Popen[bytes]:
    slurm = {
        "SLURM_JOB_NODELIST": "node[1-3]",
        "SLURM_JOB_ID": "1234567",
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_CPUS_PER_TASK": "64",
        "SLURM_GPUS_ON_NODE": "8",
    }
    path = f"{calls.parent / 'bin'}:/usr/bin:/bin"
    environment = {"PATH": path, "HOME": str(calls.parent), "CALLS": str(calls), "ENDS": ends, **slurm}
    return subprocess.Popen(["bash", str(SCRIPT), *ARGUMENTS], env=environment)


def recorded(calls: Path, name: str, command: str = "") -> list[list[str]]:
    """Calls of a program: its token, mode and address, then its arguments, the first of which is `command`."""
    found = [path.read_text().split("\t")[1:-1] for path in calls.glob(f"{name}.*")]
    return [call for call in found if not command or call[3] == command]


def test_a_finished_run_ends_the_job(calls: Path) -> None:
    assert start(calls, ends="0").wait(30) == 0
    head, workers = sorted(recorded(calls, "srun"), key=lambda call: "--head" not in call)
    (driver,) = recorded(calls, "tarmac", "pretrain")
    assert driver[2] == "192.0.2.7:24567"
    assert driver[3:] == ["pretrain", *ARGUMENTS]
    for step in (head, workers):
        assert {"--ntasks-per-node=1", "--cpus-per-task=64", "--num-cpus=64", "--num-gpus=8", "--block"} <= set(step)
        assert re.fullmatch("[0-9a-f]{64}", step[0])
        assert step[:2] == driver[:2] == [step[0], "token"]
    assert {"--nodes=1", "--nodelist=node1", "--head", "--node-ip-address=192.0.2.7", "--port=24567"} <= set(head)
    assert {"--nodes=2", "--exclude=node1", "--address=192.0.2.7:24567"} <= set(workers)
    assert "--head" not in workers
    assert [call[3:] for call in recorded(calls, "ray")] == [["health-check", "--address", "192.0.2.7:24567"]]
    assert recorded(calls, "scontrol", "requeue") == []


def test_one_node_is_the_head_alone(calls: Path) -> None:
    assert start(calls, nodes=1, ends="0").wait(30) == 0
    assert len(recorded(calls, "srun")) == 1


def test_tokens_are_of_one_job(calls: Path) -> None:
    for _ in range(2):
        assert start(calls, ends="0").wait(30) == 0
    assert len({call[0] for call in recorded(calls, "tarmac", "pretrain")}) == 2


def test_another_exit_code_is_the_jobs(calls: Path) -> None:
    assert start(calls, ends="1").wait(30) == 1
    assert recorded(calls, "scontrol", "requeue") == []


def test_term_is_passed_on_and_the_job_is_queued_again(calls: Path) -> None:
    script = start(calls)
    wait_for(calls / "ready", script)
    script.send_signal(signal.SIGTERM)
    assert script.wait(30) == 75
    assert [call[3:] for call in recorded(calls, "scontrol", "requeue")] == [["requeue", "1234567"]]
    end = time.monotonic() + 10
    while len(list(calls.glob("ended.*"))) < 2:
        assert time.monotonic() < end, "the steps were not told to end"
        time.sleep(0.05)


def wait_for(path: Path, script: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 30
    while not path.exists():
        assert script.poll() is None, "the script ended early"
        assert time.monotonic() < end, f"no {path.name} in 30 seconds"
        time.sleep(0.05)


def test_bash_and_shellcheck_find_nothing() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed; `make setup` installs it")
    done = subprocess.run([shellcheck, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
