"""What is sent to a cluster and what is refused before: no cluster is needed to know."""

import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from dashboard import serve_dashboard
from ray._private.runtime_env.packaging import get_uri_for_directory
from ray.job_submission import JobStatus
from run_folders import write_lease, write_lines

from cluster.cli import main
from cluster.ray_jobs import Job, is_loopback
from cluster.run_commands import PretrainOptions, job_of
from cluster.shipping import pins, runtime_env, stage
from cluster.stop_request import ask_to_stop, stop_state
from cluster.submit import Submission, job_prefix
from pipeline import open_dataset
from pipeline.store import Store
from tests.ray_head import CANARIES
from trainer import recipes
from trainer.run_files import open_run

ROOT = Path(__file__).parents[2]
START = {"event": "start", "attempt": 1, "step": 0, "time": 0.0, "world_size": 1}
FAR, NEAR = "http://head.example:8265", "http://127.0.0.1:1"


def answer(capsys, *arguments):
    """Exit code and words of `tarmac submit demo`."""
    capsys.readouterr()
    try:
        code = main(["submit", "demo", *map(str, arguments)])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, " ".join((captured.out + captured.err).split())


@pytest.fixture
def dataset(photos, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for photo in photos[:6]:
        shutil.copy(photo, folder / photo.name)
    url = str(tmp_path / "dataset")
    assert main(["shard", str(folder), url, "--num-workers", "1"]) == 0
    return url


@pytest.mark.parametrize("url", ["data", "/tmp/data", "file:///tmp/data", "memory://data"])
def test_a_cluster_elsewhere_needs_storage_that_it_reaches(capsys, url):
    for name, other in (("data", "run"), ("run", "data")):
        code, words = answer(capsys, f"--{name}", url, f"--{other}", "s3://bucket/x", "--address", FAR)
        assert code == 2
        assert f"--{name} ({url}) must be in storage that every node of {FAR} reaches, as s3://bucket/path" in words


@pytest.mark.parametrize("url", ["s3://key:hidden@bucket/x", "s3://bucket/x?token=hidden", "http://u:hidden@host/x"])
def test_urls_with_secrets_are_refused_and_not_repeated(capsys, url):
    code, words = answer(capsys, "--data", "s3://bucket/d", "--run", url, "--address", FAR)
    assert code == 2
    assert "must have no user, password or query" in words
    assert "hidden" not in words


@pytest.mark.parametrize(
    "address",
    ["head:8265", "ray://head:10001", "auto", "http://", "http://u:hidden@head:8265", "http://head/?t=hidden"],
)
def test_addresses_that_are_no_dashboards(capsys, address):
    code, words = answer(capsys, "--data", "s3://bucket/d", "--run", "s3://bucket/r", "--address", address)
    assert code == 2
    assert "--address (" in words
    assert "hidden" not in words


def test_wrong_use_is_refused_before_anything_is_asked(capsys, monkeypatch):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    urls = ("--data", "s3://bucket/d", "--run", "s3://bucket/r")
    code, words = answer(capsys, *urls)
    assert code == 2
    assert "submit needs --address, the URL of the cluster's Ray dashboard, as in http://HEAD:8265" in words
    code, words = answer(capsys, *urls, "--address", FAR, "--data.num-lanes", "4", "--num-workers", "5")
    assert code == 2
    assert "num_workers (5) must be at most data.num_lanes (4)" in words
    assert answer(capsys, *urls, "--address", FAR, "--max-resubmissions", "-1")[0] == 2
    for command in (["logs", "r"], ["stop", "r", "--now"]):
        assert main(command) == 2
        assert "needs --address" in capsys.readouterr().err


def test_a_run_of_another_recipe_a_finished_one_and_no_cluster(capsys, dataset, tmp_path):
    run, urls = tmp_path / "run", ("--data", dataset, "--address", NEAR, "--run", str(tmp_path / "run"))
    code, words = answer(capsys, *urls)
    assert code == 1
    assert f"no Ray cluster answers at {NEAR} (no connection)" in words
    assert not run.exists()
    open_run(Store(str(run)), recipes.get("demo"), open_dataset(dataset).manifest.digest())
    code, words = answer(capsys, *urls, "--optim.base-lr", "0.5")
    assert code == 2
    assert "optim.base_lr: 0.0015 -> 0.5" in words or re.search(r"optim\.base_lr: \S+ -> 0\.5", words)
    write_lines(Store(str(run)), 1, "events.jsonl", [{"event": "stop", "step": 9, "reason": "finished", "time": 0.0}])
    code, words = answer(capsys, *urls)
    assert code == 0
    assert "finished" in words
    code, words = answer(capsys, "--data", tmp_path / "absent", *urls[2:])
    assert code == 1
    assert "manifest" in words


@pytest.fixture
def dashboard():
    with serve_dashboard("127.0.0.1", "disabled") as serving:
        yield serving


@pytest.fixture
def run(dataset, tmp_path):
    """One that a driver began."""
    run = Store(str(tmp_path / "run"))
    open_run(run, recipes.get("demo"), open_dataset(dataset).manifest.digest())
    write_lines(run, 1, "events.jsonl", [START])
    return run


def told(capsys, dataset, run, dashboard, *more, code=0):
    """The JSON that `submit` prints."""
    capsys.readouterr()
    urls = ("--data", dataset, "--run", run.url, "--address", dashboard.address)
    assert main(["submit", "demo", *urls, "--json", *more]) == code
    return json.loads(capsys.readouterr().out)


def test_a_stop_is_taken_back_by_a_submission_and_by_no_other_attempt_at_one(capsys, dataset, run, dashboard):
    ask_to_stop(run)
    nothing = told(capsys, dataset, run, dashboard, "--if-lost")
    assert (nothing["state"], nothing["job"]) == ("stopped", None)
    assert "was told to stop" in nothing["reason"]
    refused = told(capsys, dataset, run, dashboard, code=1)  # it takes no jobs
    assert refused["state"] == "refused"
    assert "did not do it" in refused["reason"]
    assert stop_state(run) == "asked"
    dashboard.takes = {"status": "RUNNING"}
    sent = told(capsys, dataset, run, dashboard)
    assert (sent["state"], sent["job"]) == ("submitted", f"{job_prefix(run.url)}1")
    assert stop_state(run) == "none"
    driven = told(capsys, dataset, run, dashboard, code=1)
    assert driven["state"] == "refused"
    assert f"is driven by job {sent['job']} of" in driven["reason"]


def test_cron_gives_up_a_run_whose_drivers_die_again_and_again(capsys, dataset, run, dashboard):
    dashboard.takes = {"status": "FAILED", "driver_exit_code": -9, "message": ""}
    for attempt in range(1, 4):
        assert told(capsys, dataset, run, dashboard, "--if-lost", "--max-resubmissions", "3")["state"] == "submitted"
        write_lines(run, attempt, "driver.jsonl", [{"event": "placed", "time": float(attempt)}])
    write_lines(run, 4, "driver.jsonl", [{"event": "placed", "time": 4.0}])
    given_up = told(capsys, dataset, run, dashboard, "--if-lost", "--max-resubmissions", "3", code=1)
    assert given_up["state"] == "failed"
    assert "the last 4 attempts committed nothing" in given_up["reason"]
    write_lines(run, 4, "events.jsonl", [{"event": "save", "step": 7, "time": 5.0}])
    assert told(capsys, dataset, run, dashboard, "--if-lost", "--max-resubmissions", "3")["state"] == "submitted"


def test_failures_are_told_as_json_too(capsys, dataset, run, dashboard):
    wrong = told(capsys, dataset, run, dashboard, "--optim.base-lr", "0.5", code=2)
    assert wrong["state"] == "refused"
    assert "optim.base_lr" in wrong["reason"]
    message = "failed, last logs:\nerror: no dataset\n"
    dashboard.takes = {"status": "FAILED", "driver_exit_code": 1, "message": message}
    failed = told(capsys, dataset, run, dashboard, "--wait", code=1)
    assert failed == {
        **{"run": run.url, "address": dashboard.address, "job": f"{job_prefix(run.url)}1", "state": "failed"},
        **{"reason": f"{run} failed: no dataset", "num_resubmissions": 0},
    }
    write_lines(run, 1, "events.jsonl", [{"event": "stop", "step": 7, "reason": "non_finite", "time": 0.0}])
    failed = told(capsys, dataset, run, dashboard, "--if-lost", code=1)
    assert failed["state"] == "failed"
    assert "non_finite at step 7" in failed["reason"]


@pytest.mark.parametrize("ahead_s", [-3600, 3600])
def test_a_healthy_run_is_not_lost_whatever_the_clock_says(capsys, dataset, run, dashboard, ahead_s):
    dashboard.takes = {"status": "RUNNING"}
    lease = {"age_s": ahead_s, "term_s": 2.0}
    write_lease(run, **lease)
    renewal = threading.Timer(1.0, write_lease, (run,), lease)
    renewal.start()
    found = told(capsys, dataset, run, dashboard, "--if-lost")
    renewal.join()
    assert (found["state"], dashboard.jobs) == ("running", {})
    assert "process 42 on head" in found["reason"]
    assert told(capsys, dataset, run, dashboard, "--if-lost")["state"] == "submitted"  # it is renewed no more


def test_which_addresses_are_this_machine():
    near = ("http://127.0.0.1:8265", "https://localhost", "http://[::1]:8265", "http://127.1.2.3:1")
    assert [is_loopback(address) for address in near] == [True] * 4
    assert not any(map(is_loopback, ("http://10.0.0.1:8265", "http://head:8265", "http://localhost.example:1")))


def test_ids_tell_runs_apart_and_stay():
    first = job_prefix("s3://bucket/runs/vit b+1")
    assert re.fullmatch(r"tarmac-vit-b-1-[0-9a-f]{10}-", first)
    assert job_prefix("s3://bucket/runs/vit b+1") == first
    assert job_prefix("s3://other/runs/vit b+1") != first


def submission(environment="pinned"):
    job = job_of(PretrainOptions(data="s3://bucket/d", run="s3://bucket/r", train=recipes.get("demo")))
    overrides = ("--num-workers", "2", "--optim.num-steps", "5")
    return Submission(job=job, recipe="demo", overrides=overrides, environment=environment)


def test_what_is_shipped_is_our_code_the_pins_and_no_secret(monkeypatch, tmp_path):
    secrets = CANARIES | {"RAY_AUTH_TOKEN": "canarytokensecret"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        stage(tmp_path / name)
    staged = tmp_path / "one"
    packages = ["cluster", "pipeline", "trainer"]
    assert [path.name for path in sorted(staged.iterdir()) if not path.name.endswith(".dist-info")] == packages
    sources = {path.relative_to(ROOT) for name in packages for path in (ROOT / name).rglob("*.py")}
    assert {path.relative_to(staged) for path in staged.rglob("*.py")} == sources
    files = [path for path in staged.rglob("*") if path.is_file()]
    assert not [path for path in files if "__pycache__" in path.parts or path.is_symlink()]
    sent = submission()
    said = repr((sent.entrypoint(), sent.metadata(), runtime_env(staged, pinned=True))).encode()
    everything = said + b"".join(path.read_bytes() for path in files)
    assert not [value for value in secrets.values() if value.encode() in everything]
    assert str(ROOT).encode() not in everything
    uris = {get_uri_for_directory(str(tmp_path / name), include_gitignore=True) for name in ("one", "two")}
    assert len(uris) == 1  # the cluster has it already


def test_shipped_code_is_found_first_and_knows_its_version(tmp_path):
    stage(tmp_path)
    program = "import cluster, trainer, importlib.metadata as m; print(cluster.__file__, m.version('tarmac'))"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(tmp_path / "cluster" / "__init__.py"), "0.1.0"]


def test_the_command_is_the_one_that_a_person_would_type():
    assert submission().entrypoint() == (
        "python -m cluster.cli pretrain demo --data s3://bucket/d --run s3://bucket/r "
        "--num-workers 2 --optim.num-steps 5"
    )
    known = {"run": "s3://bucket/r", "recipe": "demo", "data": "s3://bucket/d", "tarmac": "0.1.0"}
    assert submission().metadata() == known


def test_the_pinned_environment_has_what_a_job_needs_and_leaves_ray_alone(tmp_path):
    stage(tmp_path)
    constraints = (tmp_path / "cluster" / "constraints.txt").read_text()
    assert constraints == (ROOT / "constraints.txt").read_text()
    pinned = pins(constraints)
    names = {pin.partition("==")[0] for pin in pinned}
    assert {"torch", "s3fs", "pyarrow", "nvidia-dali-cuda130", "tyro"} <= names
    assert {"pandas", "tensorboardx"} <= names  # Ray Train's, which a cluster with ray[default] alone has not
    assert not {"ray", "pytest", "moto", "webdataset"} & names
    assert set(pinned) <= {line.lower() for line in constraints.splitlines()}
    packages = runtime_env(tmp_path, pinned=True)["pip"]["packages"]
    assert packages[2:] == pinned
    assert packages[1] == "--constraint ${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/cluster/constraints.txt"
    assert runtime_env(tmp_path, pinned=False) == {"working_dir": str(tmp_path)}


@pytest.mark.parametrize(
    ("exit_code", "message", "reason"),
    [
        (1, "failed, last logs:\nerror: no dataset\nbye", "no dataset"),
        (
            1,
            "failed, last logs:\nTraceback\nImportError: s3://u:p@host/x\n",
            "its driver ended with 1: ImportError: s3://host/x",
        ),
        (75, "failed, last logs:\nerror: no answer\n", "its driver ended with 75: no answer"),
        (75, "failed, last logs:\nstopped at step 7", "its driver ended with 75"),
        (-9, "failed, last logs:\nstep 3/20", "its driver ended with -9"),
        (None, "no node has room\nmore", "no node has room"),
    ],
)
def test_a_failed_job_says_why_in_a_line(exit_code, message, reason):
    job = Job(id="a", status=JobStatus.FAILED, exit_code=exit_code, error_type=None, message=message, metadata={})
    assert job.failure == reason
