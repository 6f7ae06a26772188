"""Runs that are submitted to a real Ray cluster with token authentication, followed, killed and stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests

from cluster.cli import main
from cluster.run_state import read_state
from cluster.stop_request import stop_wanted
from pipeline.store import Store
from tests.ray_head import CANARIES, RayHead
from trainer.metrics import read_events, read_metrics

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

TINY = [
    *("--data.global-batch-size", "12", "--data.num-lanes", "6", "--data.augment.image-size", "64", "64"),
    *("--model.embed-dim", "32", "--model.depth", "2", "--model.num-heads", "2"),
    *("--model.decoder-embed-dim", "32", "--model.decoder-depth", "1", "--model.decoder-num-heads", "2"),
    *("--parallel.precision", "fp32", "--optim.base-lr", "1e-2"),
    *("--checkpoint.every-steps", "7", "--log.every-steps", "1", "--log.flush-s", "0.3"),
]


@pytest.fixture(scope="module")
def head():
    with RayHead() as started:
        yield started


def client(head):
    """Of the submitting machine: our token, secrets, and an address that must not win over --address."""
    return os.environ | head.client_environment() | CANARIES | {"RAY_ADDRESS": "192.0.2.1:6379"}


@pytest.fixture(scope="module")
def dataset(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("submit")
    (folder / "photos").mkdir()
    for photo in photos:
        shutil.copy(photo, folder / "photos" / photo.name)
    url = str(folder / "dataset")
    assert main(["shard", str(folder / "photos"), url, "--num-workers", "1", "--shard-bytes", "300000"]) == 0
    return url


def words(head, dataset, run, *more):
    urls = ("--data", dataset, "--run", str(run), "--address", head.address, "--environment", "cluster")
    return ["submit", "demo", *urls, *TINY, *more]


def tarmac(head, arguments, code=0):
    """What a command printed, in a process of its own: Ray looks at the environment once a process."""
    command = [sys.executable, "-m", "cluster.cli", *arguments]
    done = subprocess.run(command, env=client(head), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr if code else done.stdout


def test_a_run_is_submitted_refused_a_second_time_followed_and_finished(head, dataset, tmp_path, capsys):
    run = tmp_path / "runs" / "first"
    submit = words(head, dataset, run, "--optim.num-steps", "20")
    told = json.loads(tarmac(head, [*submit, "--json"]))
    assert told["state"] == "submitted"
    assert told["job"].startswith("tarmac-first-")
    assert told["job"].endswith("-1")

    refusal = tarmac(head, submit, code=1)
    assert f"is driven by job {told['job']}" in refusal
    assert "tarmac stop" in refusal
    assert "nothing to do" in tarmac(head, [*submit, "--if-lost"])

    log = tarmac(head, ["logs", str(run), "--address", head.address, "--follow"])
    assert "step 20/20" in log
    assert "--optim.num-steps 20" in log
    state = json.loads(tarmac(head, ["status", str(run), "--address", head.address, "--json"]))
    assert (state["state"], state["step"], state["num_steps"], state["job"]) == ("finished", 20, 20, told["job"])
    assert state["job_status"] == "SUCCEEDED"
    assert 0 < state["goodput"] < 1
    assert json.loads(tarmac(head, ["logs", str(run), "--address", head.address, "--json"]))["log"] == log
    check_no_secret_was_shipped(head, told["job"])

    for arguments in (["runs", str(tmp_path)], submit, ["stop", str(run)]):  # these need the bucket only
        capsys.readouterr()
        assert main(arguments) == 0
        assert "finished" in capsys.readouterr().out
    assert main(["runs", str(tmp_path), "--json"]) == 0
    assert [row["step"] for row in json.loads(capsys.readouterr().out)] == [20]


def check_no_secret_was_shipped(head, job_id):
    """Neither in what the job's page shows nor in anything that the head wrote."""
    secrets = [*CANARIES.values(), head.token]
    headers = {"Authorization": f"Bearer {head.token}"}
    page = requests.get(f"{head.address}/api/jobs/{job_id}", headers=headers, timeout=30).text
    assert "--optim.num-steps" in page
    assert not [secret for secret in secrets if secret in page]
    files = [path for path in head.folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert [path for path in files if path.name == "submit_command.py"]  # the package is among them
    assert not [path for path in files for secret in secrets if secret.encode() in path.read_bytes()]


class Waiting:
    """A `tarmac submit --wait` in a process of its own."""

    def __init__(self, head, arguments, log):
        self.log = open(log, "a+")  # noqa: SIM115
        command = [sys.executable, "-m", "cluster.cli", *arguments, "--wait"]
        self.process = subprocess.Popen(command, env=client(head), stdout=self.log, stderr=subprocess.STDOUT)

    def output(self):
        self.log.flush()
        self.log.seek(0)
        return self.log.read()

    def until(self, reached, timeout_s=240):
        deadline = time.monotonic() + timeout_s
        while not reached():
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.2)

    def finish(self):
        code = self.process.wait(timeout=240)
        text = self.output()
        self.log.close()
        return code, text


def driver_of(run):
    """Process id of the run's driver, as the system has it."""
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            command = (directory / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"pretrain" in command and str(run).encode() in command:
            return int(directory.name)
    raise AssertionError(f"no process drives {run}")


def last_step(run):
    records = read_metrics(run)
    return records[-1]["step"] if records else 0


def test_a_killed_driver_is_submitted_again_and_a_stop_is_not(head, dataset, tmp_path):
    url = tmp_path / "second"
    run, submit = Store(str(url)), words(head, dataset, url, "--optim.num-steps", "100000")
    waiting = Waiting(head, submit, tmp_path / "wait.log")
    waiting.until(lambda: last_step(run) >= 10)
    os.kill(driver_of(url), signal.SIGKILL)
    waiting.until(lambda: "goes on as" in waiting.output())
    starts = len([event for event in read_events(run) if event["event"] == "start"])
    waiting.until(
        lambda: len([event for event in read_events(run) if event["event"] == "start"]) > starts or starts > 1
    )
    waiting.until(lambda: last_step(run) >= 20)
    assert main(["stop", str(url), "--wait"]) == 0
    assert read_state(run).state == "stopped"
    code, text = waiting.finish()
    assert code == 75, text
    assert text.count("goes on as") == 1
    assert "was lost: its driver ended with" in text
    assert "stopped" in text
    assert "/100000" in text  # the progress line
    resumed = [event for event in read_events(run) if event["event"] == "start"][-1]["step"]
    assert resumed > 0
    assert resumed % 7 == 0
    assert stop_wanted(run)
    assert "was told to stop" in tarmac(head, [*submit, "--if-lost"])

    stopped_at, job = last_step(run), json.loads(tarmac(head, [*submit, "--json"]))["job"]
    deadline = time.monotonic() + 120
    while last_step(run) == stopped_at:
        assert time.monotonic() < deadline, tarmac(head, ["logs", str(url), "--address", head.address])
        time.sleep(0.2)
    tarmac(head, ["stop", str(url), "--now", "--wait", "--address", head.address])
    state = json.loads(tarmac(head, ["status", str(url), "--address", head.address, "--json"]))
    assert (state["job"], state["job_status"]) == (job, "STOPPED")
    assert state["state"] in ("stopped", "lost")  # whether it had the time to save


def test_a_failure_that_would_come_again_is_not_submitted_again(head, dataset, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(dataset, broken)
    next(broken.glob("*.tar")).unlink()
    waiting = Waiting(head, words(head, str(broken), tmp_path / "third"), tmp_path / "wait.log")
    code, text = waiting.finish()
    assert code == 1, text
    assert "third failed:" in text
    assert "tarmac verify" in text
    assert "goes on as" not in text


def test_a_head_that_dies_and_comes_back_gets_the_run_again_and_it_goes_on_to_its_end(head, dataset, tmp_path):
    """The last test of this module: the head that it leaves knows of no job before."""
    url, num_steps = tmp_path / "fourth", 600
    run = Store(str(url))
    waiting = Waiting(head, words(head, dataset, url, "--optim.num-steps", str(num_steps)), tmp_path / "wait.log")
    waiting.until(lambda: last_step(run) >= 10)
    head.kill()
    assert read_state(run).state != "finished"
    waiting.until(lambda: "Asking again" in waiting.output())
    head.start()
    code, text = waiting.finish()
    assert code == 0, text
    assert f"no Ray cluster answers at {head.address}" in text
    assert "goes on as tarmac-fourth-" in text
    assert read_state(run).state == "finished"
    assert [record["step"] for record in read_metrics(run)] == list(range(1, num_steps + 1))
    starts = [event["step"] for event in read_events(run) if event["event"] == "start"]
    assert len(starts) >= 2
    assert starts[-1] > 0
    assert starts[-1] % 7 == 0
