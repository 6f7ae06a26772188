"""`tarmac submit`: a run on a cluster somewhere else, from any machine that can reach it and the bucket."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import tyro
from rich.console import Console

from cluster.options import CommandError, UsageError, check_at_least, parse, report, say
from cluster.run_commands import PretrainOptions, job_of, take_recipe
from trainer import recipes

if TYPE_CHECKING:
    from cluster.ray_jobs import RayJobs
    from cluster.run_state import RunState
    from cluster.submit import Submission
    from pipeline.store import Store

STOPPED = 75


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
    """With --wait: resubmissions in a row without a step further, after which it gives up."""
    if_lost: bool = False
    """For cron: do nothing, and say why, if the run is driven, was told to stop, or failed."""
    json: bool = False
    """Print the result as JSON."""


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
    submission = Submission(job=job, recipe=recipe, overrides=tuple(overrides), environment=options.environment)
    run = Store(job.run, job.train.store)
    state = _check_run(submission, run)
    if state is not None and state.state == "finished":
        return _answer(options, f"finished: {run} is at step {state.step} of {state.num_steps}", "finished", None)
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
    from cluster.stop_request import forget_stop, stop_wanted
    from cluster.submit import active_job, send

    active = active_job(jobs, submission.job.run)
    job_id = active.id if active else None
    if active or _is_driven(run):
        who = _who(run, job_id, jobs.address)
        if not options.wait:
            if options.if_lost:
                return _answer(options, f"nothing to do: {who}", "running", job_id)
            raise CommandError(f"{who}; follow it with --wait, or stop it first with `tarmac stop {run}`")
        say(_console(options), f"{who}; following it")
        return _follow(options, jobs, submission, job_id)
    if options.if_lost and stop_wanted(run):
        again = "submit it without --if-lost to go on"
        return _answer(options, f"nothing to do: {run} was told to stop; {again}", "stopped", None)
    if options.if_lost and state is not None and state.state == "failed":
        again = "submit it without --if-lost when that is mended"
        raise CommandError(f"{run} failed: {state.reason}; {again}")
    forget_stop(run)
    job_id = send(jobs, submission)
    if options.wait:
        say(_console(options), f"submitted as {job_id} to {jobs.address}")
        return _follow(options, jobs, submission, job_id)
    look = f"`tarmac status {run} --address {jobs.address}`"
    return _answer(options, f"submitted as {job_id} to {jobs.address}; see {look}", "submitted", job_id)


def _is_driven(run: Store) -> bool:
    from cluster.lease import is_stale, read_lease

    lease = read_lease(run)
    return lease is not None and not is_stale(lease)


def _who(run: Store, job_id: str | None, address: str) -> str:
    """Who drives the run, by its lease and by Ray."""
    from cluster.lease import is_stale, read_lease

    lease = read_lease(run)
    parts = [f"job {job_id} of {address}"] if job_id else []
    if lease is not None and not is_stale(lease):
        parts.append(f"process {lease.pid} on {lease.host}, whose lease runs for {lease.term_s:g} s at a time")
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
        raise CommandError(f"{job.run} failed: {ended.reason}")
    message = f"{ended.ending.value}: {job.run}" + (f", {ended.reason}" if ended.reason else "")
    _answer(options, message, ended.ending.value, follower.job_id, follower.num_resubmissions)
    return 0 if ended.ending is Ending.FINISHED else STOPPED


def _console(options: SubmitOptions) -> Console:
    """With --json, standard output is for the result alone."""
    return Console(stderr=options.json)


def _answer(options: SubmitOptions, message: str, state: str, job_id: str | None, num_resubmissions: int = 0) -> int:
    if options.json:
        run = {"run": options.run, "address": options.address, "job": job_id}
        report(run | {"state": state, "num_resubmissions": num_resubmissions}, as_json=True)
    else:
        say(Console(), message)
    return 0
