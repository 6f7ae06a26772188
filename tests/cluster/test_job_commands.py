"""`status`, `runs` and `stop`: what they print of a run, an evaluation, and a run that cannot be read."""

import json
import re
import threading
import time

import pytest
from dashboard import serve_dashboard
from run_folders import NOW, begin, begin_evaluation, record, write_lease, write_lines

from cluster import run_state
from cluster.cli import main
from cluster.ray_jobs import RayJobs
from cluster.stop_request import ask_to_stop, clear_stop, stop_asked, stop_state, stop_wanted
from cluster.submit import active_job, job_prefix, jobs_of
from pipeline.errors import StoreError
from pipeline.store import Store

ASKED = {"event": "asked", "num_workers": 2, "reason": "first", "driver": "d1", "time": NOW - 60}
PLACED = {"event": "placed", "num_workers": 2, "time": NOW - 55}
START = {"event": "start", "step": 0, "world_size": 2, "hosts": ["a", "b"], "time": NOW - 50}


def drive(run, *, age_s=1.0):
    """A driver that has come to step 12, and renewed its lease so long ago."""
    write_lines(run, 1, "driver.jsonl", [ASKED, PLACED])
    write_lines(run, 1, "events.jsonl", [START])
    write_lines(run, 1, "metrics-000000.jsonl", [record(12, time.time() - 30)])
    write_lease(run, age_s=age_s)


def end(run, outcome):
    write_lines(run, 1, "driver.jsonl", [ASKED, PLACED, {"event": "ended", "outcome": outcome, "time": NOW - 5}])
    write_lease(run, age_s=1, released=True)


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # whatever the length of the test's folder


@pytest.fixture
def run(tmp_path):
    return Store(str(tmp_path / "runs" / "b"))


def told(capsys, *arguments, code=0):
    """What a command printed, each line's spaces made one."""
    capsys.readouterr()
    assert main(list(arguments)) == code
    captured = capsys.readouterr()
    return [" ".join(line.split()) for line in (captured.err if code else captured.out).splitlines()]


def test_the_words_of_status(run, capsys):
    begin(run)
    drive(run)
    lines = told(capsys, "status", run.url)
    assert re.fullmatch(r"goodput \d+\.\d%", lines.pop(7))
    assert re.fullmatch(r"last word 0:\d\d ago", lines.pop(7))
    assert lines == [
        f"run {run}",
        "state running",
        "step 12 of 20",
        "epoch 2.40",
        "loss 0.1667",
        "images/s 112",
        "attempts 1",
        "driver head:42",
        "workers a, b",
    ]
    end(run, "stopped")
    assert "state stopped: asked to; submit it again to go on" in told(capsys, "status", run.url)


def test_the_columns_of_runs_and_why_one_is_unreadable(run, tmp_path, capsys, monkeypatch):
    begin(run)
    drive(run)
    root = Store(str(tmp_path / "runs"))
    root.write("broken/run.json", b"{")
    begin(root.child("down"))
    read_lease = run_state.read_lease

    def read(store):
        if store.url.endswith("down"):
            raise StoreError("no answer for 60 s")
        return read_lease(store)

    monkeypatch.setattr(run_state, "read_lease", read)
    monkeypatch.setenv("COLUMNS", "200")
    lines = told(capsys, "runs", root.url, "--no-goodput")
    assert lines[0] == "run state step epoch loss images/s attempts goodput age"
    assert lines[1].startswith("b running 12/20 2.40 0.1667 112 1 0:3")
    assert lines[2].startswith("broken unreadable")
    assert lines[3].startswith("down unreadable")
    assert lines[4].startswith(f"unreadable: {root}/broken: {root}/broken/run.json cannot be read: ")
    assert lines[5:] == [f"unreadable: {root}/down: no answer for 60 s"]


def test_what_stop_says_and_its_json(run, capsys):
    begin(run)
    drive(run)
    assert told(capsys, "stop", run.url) == [
        f"asked: {run} saves a checkpoint and stops; `tarmac stop --wait` waits for it"
    ]
    assert stop_asked(run)
    state = json.loads(" ".join(told(capsys, "stop", run.url, "--json")))
    assert (state["run"], state["state"], state["step"], state["told_to_stop"]) == (run.url, "stopping", 12, True)
    clear_stop(run)
    end(run, "stopped")
    state = json.loads(" ".join(told(capsys, "status", run.url, "--json")))
    assert (state["state"], state["told_to_stop"]) == ("stopped", True)
    end(run, "finished")
    assert told(capsys, "stop", run.url) == [f"finished: {run} is at step 12"]
    assert not stop_asked(run)


def test_an_evaluation_is_shown_and_stopped(run, tmp_path, capsys):
    begin_evaluation(run)
    drive(run)
    assert "state running" in told(capsys, "status", run.url)
    assert "step 12 of 20" in told(capsys, "status", run.url)
    assert json.loads("".join(told(capsys, "runs", run.url, "--json")))[0]["num_steps"] == 20
    assert told(capsys, "stop", run.url)[0].startswith("asked: ")
    assert stop_asked(run)
    page = tmp_path / "report.html"
    assert main(["report", run.url, "--out", str(page)]) == 0
    text = page.read_text()
    assert "s3://bucket/runs/b, step 4,000" in text
    assert "all, for 3 classes" in text
    assert "tarmac evaluate finetune_cifar_tiny --from s3://bucket/runs/b --data DATASET --val DATASET" in text


def test_a_run_that_cannot_be_read_is_stopped_and_what_is_no_run_is_not(run, capsys):
    run.write("run.json", b"{")
    line = told(capsys, "stop", run.url)[0]
    assert line.startswith(f"asked: a driver of {run} stops; what it is doing cannot be read: ")
    assert stop_asked(run)
    other = run.child("other")
    message = f"{other} is not a run: it has no run.json; `tarmac runs` shows the runs below a URL"
    for command in ("stop", "status"):
        assert message in " ".join(told(capsys, command, other.url, code=1))
    assert stop_state(other) == "none"


def test_stop_waits_for_the_driver_and_says_for_whom(run, capsys):
    begin(run)
    drive(run, age_s=0)
    driver = threading.Timer(1.5, end, (run, "stopped"))
    driver.start()
    began = time.monotonic()
    lines = told(capsys, "stop", run.url, "--wait")
    assert 1.4 < time.monotonic() - began < 9
    driver.join()
    assert lines == [
        "waiting for process 42 on head, which saves a checkpoint first",
        f"nobody drives {run} (stopped, step 12); it stays so until it is submitted again",
    ]


@pytest.mark.parametrize("clock_s", [-3600, 3600])
def test_stop_does_not_wait_for_a_driver_that_is_gone_whatever_the_clock_says(run, capsys, clock_s):
    begin(run)
    write_lease(run, age_s=clock_s, term_s=2.0)
    began = time.monotonic()
    assert told(capsys, "stop", run.url, "--wait")[-1].startswith(f"nobody drives {run} (")
    assert time.monotonic() - began < 30


def test_stop_does_not_wait_for_who_began_after_it(run, capsys):
    begin(run)
    write_lease(run, age_s=0)

    def go_on():
        clear_stop(run)
        write_lease(run, age_s=0, generation=2, pid=77)

    other = threading.Timer(0.5, go_on)
    other.start()
    assert told(capsys, "stop", run.url, "--wait")[-1].startswith(f"process 77 on head drives {run} now: ")
    other.join()
    assert stop_wanted(run)
    ask_to_stop(run)


@pytest.fixture
def dashboard():
    with serve_dashboard("127.0.0.1", "disabled") as serving:
        yield serving


def test_a_job_that_something_else_submitted_is_found_by_the_runs_url(run, dashboard, capsys):
    """KubeRay gives its RayJobs ids of its own, and the manifest's metadata."""
    begin(run)
    drive(run)
    at = ("--address", dashboard.address)
    dashboard.add_job(f"{job_prefix(run.url)}1", run.url, status="FAILED", started=1000, log="first\n")
    dashboard.add_job("b-x7k2p", run.url, started=3000, log="by KubeRay\n")
    dashboard.add_job("other-abcde", f"{run.url}2", started=4000)
    assert told(capsys, "logs", run.url, *at) == ["by KubeRay"]
    state = json.loads("".join(told(capsys, "status", run.url, *at, "--json")))
    assert (state["job"], state["job_status"]) == ("b-x7k2p", "RUNNING")
    jobs = RayJobs(dashboard.address)
    assert active_job(jobs, run.url).id == "b-x7k2p"
    assert [job.id for job in jobs_of(jobs, run.url)] == [f"{job_prefix(run.url)}1", "b-x7k2p"]
    assert told(capsys, "stop", run.url, "--now", *at)[0].startswith("asked: ")
    assert dashboard.jobs["b-x7k2p"]["status"] == "STOPPED"
    assert "the request in the bucket stays" in " ".join(told(capsys, "stop", run.url, "--now", *at, code=1))
