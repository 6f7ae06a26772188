"""The end of docs/slurm.sbatch, with stand-ins for what it calls: when it has Slurm queue the job again."""

import os
import subprocess
from pathlib import Path

import pytest
from run_folders import begin

from cluster.cli import main
from cluster.stop_request import ask_to_stop, clear_stop
from pipeline.store import Store

SCRIPT = Path(__file__).parents[2] / "docs" / "slurm.sbatch"
STAND_INS = {
    "scontrol": 'if [ "$1" = requeue ]; then echo "$2" > requeued; else echo node-1; fi',
    "getent": "echo 10.0.0.1 STREAM node-1",
    "srun": "exec sleep 60",
    "ray": "exit 0",
    "tarmac": 'echo "$@" >> called; if [ "$1" = pretrain ]; then exit "$CODE"; fi; cat status.json',
}


@pytest.fixture
def node(tmp_path):
    """A folder in which the script finds its programs."""
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def finish(node, code, *words):
    """The script's exit code, and whether it queued the job again."""
    slurm = {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n", "SLURM_CPUS_PER_TASK": "2"}
    environment = {"PATH": f"{node}:{os.environ['PATH']}", "CODE": str(code), **slurm}
    command = ["bash", str(SCRIPT), "demo", "--data", "d", *words]
    done = subprocess.run(command, cwd=node, env=environment, check=False, timeout=60)
    return done.returncode, (node / "requeued").exists()


@pytest.mark.parametrize("words", [("--run", "RUN", "--num-workers", "2"), ("--run=RUN",)])
def test_a_preempted_run_is_queued_again_and_a_stopped_one_is_not(node, capsys, words):
    run = Store(str(node / "run"))
    begin(run)
    words = [word.replace("RUN", run.url) for word in words]
    for asked in (True, False):  # the second time nobody did
        if asked:
            ask_to_stop(run)
            clear_stop(run)
        else:
            run.remove("stop.json")
        capsys.readouterr()
        assert main(["status", run.url, "--no-goodput", "--json"]) == 0
        (node / "status.json").write_text(capsys.readouterr().out)
        assert finish(node, 75, *words) == (75, not asked)
        assert f"status {run.url} --no-goodput --json" in (node / "called").read_text()


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_run_that_ended_otherwise_is_not_queued_again(node, code):
    assert finish(node, code, "--run", "r") == (code, False)


def test_a_bucket_that_is_down_does_not_end_the_run(node):
    assert finish(node, 75, "--run", "r") == (75, True)
