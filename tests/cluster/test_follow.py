"""When `submit --wait` submits again, follows somebody else, or ends: a run in a folder, and a cluster that is told
what to answer."""

import dataclasses
import io
import itertools
import time

import pytest
from ray.job_submission import JobStatus
from rich.console import Console
from run_folders import CONFIG, NOW, begin, record, write_lines

from cluster import follow
from cluster.config import JobConfig
from cluster.follow import Ending, Follower
from cluster.lease import LeaseRecord
from cluster.options import UsageError
from cluster.progress import RunProgress
from cluster.ray_jobs import Job, NoAnswerError, TokenError
from cluster.stop_request import ask_to_stop
from cluster.submit import Submission, job_prefix
from pipeline.store import Store

TERM_S = 0.4
CRASH_LOOP = [
    {"event": "asked", "time": NOW, "reason": "first"},
    {"event": "lost", "time": NOW + 1, "error": "crash loop: ValueError", "detected": "error"},
    {"event": "ended", "time": NOW + 2, "outcome": "lost"},
]
ACTIVE, SUCCEEDED, FAILED, STOPPED = JobStatus.RUNNING, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(follow, "_POLL_S", 0.01)
    monkeypatch.setattr(follow, "_LONGEST_PAUSE_S", 0.01)
    run = Store(str(tmp_path / "run"))
    begin(run)
    return run


def job(status, exit_code=None, message="", error_type=None):
    facts = {"id": "job", "exit_code": exit_code, "error_type": error_type, "message": message, "metadata": {}}
    return Job(status=status, **facts)


class Cluster:
    """In RayJobs' place. `answer` is what it knows of the job that is followed; a new job makes it the next one."""

    address = "http://head:8265"

    def __init__(self, answer, *after):
        self.answer, self.after, self.sent = answer, list(after), []

    def get(self, job_id):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def of_run(self, prefix, run):
        return [dataclasses.replace(job(FAILED), id=name) for name in self.sent]

    def submit(self, **request):
        self.sent.append(request["submission_id"])
        self.answer = self.after.pop(0) if self.after else job(SUCCEEDED)
        return self.sent[-1]


def followed(run, cluster, *scenes, job_id="first", max_resubmissions=3):
    """How it ended, and what was said; each look of the follower is preceded by one scene, while there are any."""
    left, looks, said = list(scenes), itertools.count(), []

    def on_news(news):
        assert next(looks) < 1000, said
        if left:
            left.pop(0)()

    job = JobConfig(train=CONFIG, data="/data", run=run.url)
    submission = Submission(job=job, recipe="demo", overrides=(), environment="cluster")
    follower = Follower(cluster, submission, max_resubmissions=max_resubmissions, on_news=on_news, say=said.append)
    ended = follower.follow(job_id)
    assert follower.num_resubmissions == len(cluster.sent)
    return ended, said


def hold(run, driver="theirs", *, released=False, age_s=0.0):
    """A driver on another machine takes the lease, renews it, or gives it back; so long ago, by its clock."""
    who = {"driver": driver, "host": "elsewhere", "pid": 42, "kernel": None, "pid_started": None}
    times = {"started": NOW, "renewed": time.time() - age_s, "term_s": TERM_S}
    run.write("lease/000001.json", LeaseRecord(generation=1, released=released, **who, **times).to_json())


def fail(run, attempt=1):
    """Its driver gives up, in order."""
    write_lines(run, attempt, "driver.jsonl", CRASH_LOOP)
    hold(run, released=True)


def finish(run):
    write_lines(run, 1, "driver.jsonl", [{"event": "ended", "time": NOW, "outcome": "finished"}])


@pytest.mark.parametrize(
    ("end", "ending", "reason", "num_sent"),
    [
        (job(SUCCEEDED, 0), Ending.FINISHED, "", 0),
        (job(STOPPED, -15), Ending.STOPPED, "by Ray's `job stop`", 0),
        (job(FAILED, 1, "logs:\nerror: no dataset\n"), Ending.FAILED, "no dataset", 0),
        (job(FAILED, 2, "logs:\nerror: no field\n"), Ending.FAILED, "no field", 0),
        (job(FAILED, None, "no pip", "RUNTIME_ENV_SETUP_FAILURE"), Ending.FAILED, "no pip", 0),
        (job(FAILED, 75), Ending.FINISHED, "", 1),
        (job(FAILED, -9), Ending.FINISHED, "", 1),
        (job(FAILED, None, "the head died"), Ending.FINISHED, "", 1),
        (None, Ending.FINISHED, "", 1),
    ],
)
def test_what_the_end_of_a_job_means(run, end, ending, reason, num_sent):
    cluster = Cluster(job(ACTIVE))
    ended, _ = followed(run, cluster, lambda: None, lambda: setattr(cluster, "answer", end))
    assert (ended.ending, ended.reason, len(cluster.sent)) == (ending, reason, num_sent)


@pytest.mark.parametrize("refusal", [NoAnswerError("no cluster"), TokenError("no token"), UsageError("anybody")])
def test_a_cluster_that_is_gone_is_waited_for_and_its_successor_gets_the_run(run, refusal):
    cluster = Cluster(job(ACTIVE))
    scenes = [
        lambda: None,
        *[lambda: setattr(cluster, "answer", refusal)] * 3,
        lambda: setattr(cluster, "answer", None),
    ]
    ended, said = followed(run, cluster, *scenes)
    assert ended.ending is Ending.FINISHED
    assert cluster.sent == [f"{job_prefix(run.url)}1"]
    assert said == [
        f"{refusal}. Asking again",
        f"job first was lost: the cluster does not know it; goes on as {cluster.sent[0]}",
    ]


def test_a_run_that_ends_while_no_cluster_answers(run):
    assert followed(run, Cluster(NoAnswerError("gone")), lambda: finish(run))[0].ending is Ending.FINISHED


def test_why_a_job_says_75_is_told(run):
    cluster = Cluster(job(FAILED, 75, "logs:\nerror: s3://b/r: gave up after 9 tries\n"))
    _, said = followed(run, cluster)
    assert "was lost: its driver ended with 75: s3://b/r: gave up after 9 tries; goes on as" in said[0]


def test_resubmissions_that_do_not_help_end_and_a_step_further_counts_them_anew(run):
    lost = job(FAILED, -9)
    cluster = Cluster(lost, *[lost] * 10)
    ended, _ = followed(run, cluster, max_resubmissions=2)
    assert ended.ending is Ending.FAILED
    assert (
        ended.reason == "2 resubmissions in a row came no further than step 0; the last job: its driver ended with -9"
    )
    assert len(cluster.sent) == 2

    def advance():
        write_lines(run, 1, "metrics-000000.jsonl", [record(len(cluster.sent) + 1)])

    cluster = Cluster(lost, *[lost] * 4)
    ended, _ = followed(run, cluster, *[advance] * 100, max_resubmissions=2)
    assert (ended.ending, len(cluster.sent)) == (Ending.FINISHED, 5)


@pytest.mark.parametrize("exit_code", [1, 75, -9])
def test_another_driver_that_lives_is_followed_whatever_became_of_our_job(run, exit_code):
    """A resubmitted driver meets one that nobody knew to be alive."""
    hold(run)
    cluster = Cluster(job(FAILED, exit_code, "logs:\nerror: the run is driven by process 42\n"))
    renew = [lambda: hold(run)] * 30
    ended, said = followed(run, cluster, *renew, lambda: finish(run))
    assert (ended.ending, cluster.sent) == (Ending.FINISHED, [])
    assert said == ["driver theirs on elsewhere drives it now; following that"]


def test_what_our_own_dead_driver_left_is_not_taken_for_another(run):
    """Its lease looks alive, and is not renewed; what was renewed while our job ran was ours."""
    cluster = Cluster(job(ACTIVE))
    began = time.monotonic()
    renew = [lambda: hold(run, "ours")] * 5
    ended, said = followed(run, cluster, *renew, lambda: setattr(cluster, "answer", job(FAILED, -9)))
    assert time.monotonic() - began > TERM_S / 2
    assert (ended.ending, len(cluster.sent)) == (Ending.FINISHED, 1)
    assert said == [f"job first was lost: its driver ended with -9; goes on as {cluster.sent[0]}"]


def test_the_driver_of_a_resubmitted_job_is_not_taken_for_another_either(run):
    hold(run, "first of ours")
    cluster, renewals = Cluster(job(FAILED, -9), job(ACTIVE)), itertools.count(1)

    def renew():
        if cluster.sent and cluster.answer.is_active:
            hold(run, "second of ours")
            if next(renewals) == 5:
                cluster.answer = job(FAILED, -9)

    ended, said = followed(run, cluster, *[renew] * 500)
    assert (ended.ending, len(cluster.sent)) == (Ending.FINISHED, 2)
    assert all("goes on as" in words for words in said)


def test_our_failure_is_told_once_the_lease_that_our_driver_left_has_run_out(run):
    hold(run, "ours")
    ended, said = followed(run, Cluster(job(FAILED, 1, "logs:\nerror: no dataset\n")))
    assert (ended.ending, ended.reason, said) == (Ending.FAILED, "no dataset", [])


@pytest.mark.parametrize(("job_id", "answer"), [(None, None), ("first", job(FAILED, 1, "logs:\nerror: driven\n"))])
def test_a_followed_driver_that_falls_silent_is_followed_by_a_job_of_ours(run, job_id, answer):
    """What became of our job before that counts no more."""
    cluster = Cluster(answer)
    ended, said = followed(run, cluster, *[lambda: hold(run)] * 10, job_id=job_id)
    assert (ended.ending, len(cluster.sent)) == (Ending.FINISHED, 1)
    assert said[-1] == f"the run was lost: its driver is gone; goes on as {cluster.sent[0]}"


@pytest.mark.parametrize("answer", [None, NoAnswerError("gone"), job(FAILED, None, "the head died")])
def test_a_crash_loop_that_only_the_bucket_tells_of_is_not_submitted_again(run, answer):
    """The cluster was replaced before it was asked again."""
    cluster = Cluster(job(ACTIVE))
    ended, _ = followed(run, cluster, lambda: None, lambda: (fail(run), setattr(cluster, "answer", answer)))
    assert (ended.ending, ended.reason) == (Ending.FAILED, "crash loop: ValueError")
    assert cluster.sent == []


def test_a_crash_loop_of_a_driver_of_another_machine(run):
    cluster = Cluster(None)
    ended, _ = followed(run, cluster, *[lambda: hold(run)] * 10, lambda: fail(run), job_id=None)
    assert (ended.ending, ended.reason, cluster.sent) == (Ending.FAILED, "crash loop: ValueError", [])


def test_a_failure_from_before_our_submission_is_none_of_ours(run):
    """Mended, and submitted again: then the cluster was lost before an attempt began."""
    fail(run)
    cluster = Cluster(None)
    assert followed(run, cluster)[0].ending is Ending.FINISHED
    assert len(cluster.sent) == 1
    cluster = Cluster(None, None)
    ended, _ = followed(run, cluster, lambda: None, lambda: fail(run, attempt=2))
    assert (ended.ending, ended.reason) == (Ending.FAILED, "crash loop: ValueError")
    assert len(cluster.sent) == 1


def test_a_driver_killed_between_two_attempts_or_stopped_without_workers_has_not_failed(run):
    def killed():
        write_lines(run, 1, "driver.jsonl", CRASH_LOOP)
        hold(run, "ours", age_s=2 * TERM_S)

    cluster = Cluster(job(ACTIVE))
    assert followed(run, cluster, killed, lambda: setattr(cluster, "answer", None))[0].ending is Ending.FINISHED
    assert len(cluster.sent) == 1

    def stopped():
        stopping = {"event": "stopping", "time": NOW + 0.5, "signal": "SIGTERM"}
        write_lines(run, 1, "driver.jsonl", sorted([*CRASH_LOOP, stopping], key=lambda event: event["time"]))
        hold(run, released=True)

    run.remove("attempts/0001/driver.jsonl")
    cluster = Cluster(job(ACTIVE))
    scenes = [lambda: None, stopped, lambda: setattr(cluster, "answer", None)]
    assert followed(run, cluster, *scenes)[0].ending is Ending.FINISHED
    assert len(cluster.sent) == 1


@pytest.mark.parametrize("end", [job(FAILED, 75), None, NoAnswerError("gone")])
def test_a_run_that_was_told_to_stop_is_left_alone(run, end):
    cluster = Cluster(job(ACTIVE))

    def stop():
        ask_to_stop(run)
        hold(run, released=True)
        cluster.answer = end

    ended, _ = followed(run, cluster, lambda: None, stop)
    assert (ended.ending, ended.reason, cluster.sent) == (Ending.STOPPED, "by `tarmac stop`", [])


def test_a_step_whose_loss_is_not_finite_does_not_end_the_following(run):
    write_lines(run, 1, "metrics-000000.jsonl", [record(7) | {"loss": None, "grad_norm": None, "skipped": True}])
    out = io.StringIO()
    job_config = JobConfig(train=CONFIG, data="/data", run=run.url)
    submission = Submission(job=job_config, recipe="demo", overrides=(), environment="cluster")
    with RunProgress(Console(file=out, width=200), 20) as progress:
        follower = Follower(Cluster(job(SUCCEEDED)), submission, max_resubmissions=0, on_news=progress.show, say=print)
        assert follower.follow("first").ending is Ending.FINISHED
    assert "step 7 was skipped: loss nan, gradient norm nan" in out.getvalue()
