"""`tarmac submit`: a run on a cluster somewhere else, from any machine that can reach it and the bucket."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import tyro
from rich.console import Console

from cluster.options import CommandError, UsageError, check_at_least, parse, report, say
from cluster.run_commands import PretrainOptions, job_of, take_recipe
from pipeline.errors import ManifestError, StoreError
from trainer import recipes
from trainer.errors import RunError

if TYPE_CHECKING:
    from cluster.lease import LeaseRecord
    from cluster.ray_jobs import Job, RayJobs
    from cluster.run_state import RunState
    from cluster.submit import Submission
    from pipeline.store import Store

STOPPED = 75


class _RunFailedError(CommandError):
    """The run failed, not the submission."""

    job_id: str | None = None
    num_resubmissions = 0


_ERRORS = (UsageError, CommandError, ManifestError, RunError, StoreError, OSError, ValueError)


@dataclass(frozen=True, kw_only=True)
class OwnOptions:
    """What `submit` has beside the options of `pretrain`; its two URLs are the same."""

    data: str
    """URL of a sharded dataset, in storage that the cluster reaches."""
    run: str
    """URL of the run, in storage that the cluster reaches."""
    address: str | None = field(default_factory=lambda: os.environ.get("RAY_API_SERVER_ADDRESS"))
    """URL of the cluster's Ray dashboard, as in http://HEAD:8265."""
    environment: Literal["pinned", "cluster"] = "pinned"
    """`pinned` installs our dependencies in our versions where the cluster has others; `cluster` takes what it has."""
    wait: bool = False
    """Follow the run to its end, and submit it again when its driver or its cluster was lost."""
    max_resubmissions: int = 5
    """With --wait: resubmissions in a row without a step further, after which it gives up; with --if-lost: attempts in
    a row that committed nothing."""
    if_lost: bool = False
    """For cron: do nothing, and say why, if the run is driven, was told to stop, or failed."""
    json: bool = False
    """Print the result as JSON, also that of a refusal or a failure."""


@dataclass(frozen=True, kw_only=True)
class SubmitOptions(PretrainOptions, OwnOptions):
    """Pretrain on a cluster: ships the code and the pinned environment, and starts `pretrain` on the head.

    Credentials are those of the cluster; none leave this machine. A run that exists goes on.

    Example: tarmac submit mae_base_800ep --data s3://bucket/imagenet/train --run s3://bucket/runs/b \\
        --address http://head:8265 --num-workers 8 --gpus-per-worker 1 --wait
    """


def submit(arguments: list[str]) -> int:
    """Pretrain on a cluster, through Ray Jobs."""
    usage = "submit RECIPE --data DATASET --run RUN --address URL [--wait] [field overrides]"
    recipe, arguments = take_recipe("submit", arguments, usage, SubmitOptions.__doc__ or "")
    default = SubmitOptions(data=tyro.MISSING, run=tyro.MISSING, train=recipes.get(recipe))
    options = parse(SubmitOptions, arguments, f"submit {recipe}", default)
    check_at_least(options, max_resubmissions=0)
    with _told_as_json(options):
        return _checked_submit(options, arguments, recipe)


def _checked_submit(options: SubmitOptions, arguments: list[str], recipe: str) -> int:
    if options.address is None:
        raise UsageError("submit needs --address, the URL of the cluster's Ray dashboard, as in http://HEAD:8265")
    from cluster.ray_jobs import RayJobs
    from cluster.submit import Submission, check_url, check_version
    from pipeline.store import Store

    jobs = RayJobs(options.address)
    for name in ("data", "run"):
        check_url(name, getattr(options, name), jobs.address)
    _, overrides = tyro.cli(OwnOptions, args=arguments, return_unknown_args=True)
    job = job_of(options)
    submission = Submission(
        job=job,
        recipe=recipe,
        overrides=tuple(overrides),
        environment=options.environment,
        verbose=logging.getLogger().isEnabledFor(logging.INFO),
    )
    run = Store(job.run, job.train.store)
    state = _check_run(submission, run)
    if state is not None and state.state == "finished":
        return _answer(options, "finished", f"finished: {run} is at step {state.step} of {state.num_steps}")
    check_version(jobs, options.environment)
    return _submit(options, jobs, submission, run, state)


def _check_run(submission: Submission, run: Store) -> RunState | None:
    """The state of the run, if there is one. Refuses another recipe's run before anything is sent."""
    from cluster.run_state import read_state
    from pipeline import open_dataset
    from trainer.errors import RunMismatchError
    from trainer.run_files import RUN, check_same

    config = submission.job.train
    digest = open_dataset(submission.job.data, config.store).manifest.digest()
    if not run.exists(RUN):
        return None
    try:
        check_same(run, config, digest)
    except RunMismatchError as error:
        raise UsageError(str(error)) from error
    return read_state(run)


def _submit(options: SubmitOptions, jobs: RayJobs, submission: Submission, run: Store, state: RunState | None) -> int:
    from cluster.failures import count_without_progress
    from cluster.stop_request import stop_taken_back, stop_wanted
    from cluster.submit import active_job, send

    active = active_job(jobs, submission.job.run)
    job_id, driver = active.id if active else None, _driver(run, active)
    if active or driver:
        who = _who(run, job_id, jobs.address, driver)
        if not options.wait:
            if options.if_lost:
                return _answer(options, "running", f"nothing to do: {who}", job_id)
            raise CommandError(f"{who}; follow it with --wait, or stop it first with `tarmac stop {run}`")
        say(_console(options), f"{who}; following it")
        return _follow(options, jobs, submission, job_id)
    if options.if_lost and stop_wanted(run):
        again = "submit it without --if-lost to go on"
        return _answer(options, "stopped", f"nothing to do: {run} was told to stop; {again}")
    if options.if_lost and state is not None and state.state == "failed":
        again = "submit it without --if-lost when that is mended"
        raise _RunFailedError(f"{run} failed: {state.reason}; {again}")
    if (
        options.if_lost
        and (num := count_without_progress(run, options.max_resubmissions + 1)) > options.max_resubmissions
    ):
        again = f"`tarmac logs {run}` may say why; submit it without --if-lost when that is mended"
        raise _RunFailedError(f"{run} failed: the last {num} attempts committed nothing; {again}")
    with stop_taken_back(run):
        job_id = send(jobs, submission)
    if options.wait:
        say(_console(options), f"submitted as {job_id} to {jobs.address}")
        return _follow(options, jobs, submission, job_id)
    look = f"`tarmac status {run} --address {jobs.address}`"
    return _answer(options, "submitted", f"submitted as {job_id} to {jobs.address}; see {look}", job_id)


def _driver(run: Store, active: Job | None) -> LeaseRecord | None:
    """Who holds the run's lease. Without an active job it matters, and takes the lease's term to know."""
    from cluster.lease import is_stale, read_lease
    from cluster.lease_watch import find_holder

    if active is None:
        return find_holder(run)
    lease = read_lease(run)
    return None if lease is None or is_stale(lease) else lease


def _who(run: Store, job_id: str | None, address: str, driver: LeaseRecord | None) -> str:
    """Who drives the run, by Ray and by its lease."""
    parts = [f"job {job_id} of {address}"] if job_id else []
    if driver is not None:
        parts.append(f"{driver}, whose lease runs for {driver.term_s:g} s at a time")
    return f"{run} is driven by {', '.join(parts)}"


def _follow(options: SubmitOptions, jobs: RayJobs, submission: Submission, job_id: str | None) -> int:
    """Until the run ends, with the progress line of a local one; an interrupt leaves the run alone."""
    from cluster.follow import Ending, Follower
    from cluster.progress import RunProgress
    from pipeline import open_dataset
    from trainer.config import num_steps

    console, job = _console(options), submission.job
    total = num_steps(job.train, open_dataset(job.data, job.train.store).num_samples)
    try:
        with RunProgress(console, total) as progress:
            follower = Follower(
                jobs,
                submission,
                max_resubmissions=options.max_resubmissions,
                on_news=progress.show,
                say=lambda message: say(console, message),
            )
            ended = follower.follow(job_id)
    except KeyboardInterrupt:
        say(console, f"the run goes on without this command: `tarmac status {job.run}`; the same command follows it")
        raise
    if ended.ending is Ending.FAILED:
        error = _RunFailedError(f"{job.run} failed: {ended.reason}")
        error.job_id, error.num_resubmissions = follower.job_id, follower.num_resubmissions
        raise error
    message = f"{ended.ending.value}: {job.run}" + (f", {ended.reason}" if ended.reason else "")
    _answer(options, ended.ending.value, message, follower.job_id, follower.num_resubmissions)
    return 0 if ended.ending is Ending.FINISHED else STOPPED


def _console(options: SubmitOptions) -> Console:
    """With --json, standard output is for the result alone."""
    return Console(stderr=options.json)


@contextmanager
def _told_as_json(options: SubmitOptions) -> Iterator[None]:
    """With --json, an error is told as a result too, beside the line and the exit code that it makes."""
    try:
        yield
    except _ERRORS as error:
        if options.json:
            failed = error if isinstance(error, _RunFailedError) else _RunFailedError()
            state = "failed" if error is failed else "refused"
            _answer(options, state, str(error), failed.job_id, failed.num_resubmissions)
        raise


def _answer(options: SubmitOptions, state: str, reason: str, job_id: str | None = None, num_again: int = 0) -> int:
    """Print the result: `reason` is what a person reads."""
    if options.json:
        run = {"run": options.run, "address": options.address, "job": job_id}
        report(run | {"state": state, "reason": reason, "num_resubmissions": num_again}, as_json=True)
    else:
        say(Console(), reason)
    return 0
