"""75 from the commands that drive runs: what stood in the way passes, and the same command again goes on."""

import contextlib
import shutil

import pytest
from failing import fails
from ray.exceptions import AuthenticationError, GetTimeoutError, RayActorError, RayTaskError

from cluster import launch
from cluster.cli import main
from cluster.lease import acquire
from cluster.run_state import read_state
from pipeline.store import Store

TINY = [
    *("--data.global-batch-size", "8", "--data.num-lanes", "4", "--data.augment.image-size", "32", "32"),
    *("--data.augment.patch-size", "8", "--optim.num-steps", "2"),
]


@pytest.fixture
def command(photos, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for photo in photos[:4]:
        shutil.copy(photo, folder / photo.name)
    url = str(tmp_path / "dataset")
    assert main(["shard", str(folder), url, "--num-workers", "1"]) == 0
    return ["pretrain", "demo", *TINY, "--data", url, "--run", str(tmp_path / "run")]


def test_a_second_driver(command, capsys):
    with acquire(Store(command[-1]), term_s=2.0):
        fails(capsys, command, 75, "is driven by process", "one driver at a time")


def test_a_store_that_does_not_answer_and_answers_of_one(capsys, monkeypatch, tmp_path):
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    urls = ["--data", "s3://bucket/d", "--run", "s3://bucket/r", "--store.deadline-s", "1"]
    fails(capsys, ["pretrain", "demo", *urls], 75, "gave up")
    fails(capsys, ["submit", "demo", *urls, "--address", "http://127.0.0.1:1"], 1, "gave up")
    fails(capsys, ["pretrain", "demo", "--data", tmp_path / "none", "--run", tmp_path / "r"], 1, "manifest.json")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (RayActorError(error_msg="the relay died\nlong story"), 75, "Ray does not answer the driver (the relay died)"),
        (GetTimeoutError("no reply"), 75, "the same command goes on"),
        (ConnectionError("ray.init found nobody"), 75, "ray.init found nobody"),
        (AuthenticationError("wrong token"), 1, "RAY_AUTH_TOKEN_PATH"),
        (launch.RunFailedError("crash loop: x"), 1, "crash loop: x"),
    ],
)
def test_what_ends_a_driver(command, capsys, monkeypatch, error, code, words):
    def raising(job, on_news):
        raise error

    monkeypatch.setattr(launch, "launch", raising)
    fails(capsys, command, code, words)


def test_an_error_in_our_own_code_is_not_taken_for_a_lost_ray(command, monkeypatch):
    def raising(job, on_news):
        raise RayTaskError("take", "Traceback", ValueError("x"))

    monkeypatch.setattr(launch, "launch", raising)
    with pytest.raises(RayTaskError):
        main(command)


def test_a_run_that_was_taken_over_has_not_failed(command, capsys, monkeypatch):
    """Whatever the loser died of: the winner goes on with it."""
    taken = []

    class Loser:
        def __init__(self, job, run, lease, stops, **more):
            self.run = run

        def drive(self):
            with monkeypatch.context() as patch:
                patch.setattr("cluster.lease._process_is_gone", lambda record: True)
                taken.append(acquire(self.run))
            raise launch.RunFailedError("LeaseError: taken over")

    monkeypatch.setattr(launch, "open_ray", lambda **size: contextlib.nullcontext(True))
    monkeypatch.setattr(launch, "Driver", Loser)
    try:
        fails(capsys, command, 75, "was taken over by process")
        assert read_state(Store(command[-1])).state != "failed"
    finally:
        taken[0].__exit__(None, None, None)
