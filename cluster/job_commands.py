"""The commands about runs that go on somewhere else: status, runs, logs, stop."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from cluster.options import CommandError, UsageError, check_at_least, duration, parse, report, say

if TYPE_CHECKING:
    from cluster.lease import LeaseRecord
    from cluster.ray_jobs import Job, RayJobs
    from cluster.run_state import RunState
    from pipeline.store import Store

_POLL_S = 1.0
_DRIVEN = ("starting", "waiting", "running", "stopping")


def _default_address() -> str | None:
    return os.environ.get("RAY_API_SERVER_ADDRESS")


@dataclass(frozen=True, kw_only=True)
class StatusOptions:
    """Show what a run is doing, from its bucket alone; with --address also its job on that cluster.

    Example: tarmac status s3://bucket/runs/b
    """

    run: Annotated[str, tyro.conf.Positional]
    """URL of the run."""
    address: str | None = None
    """URL of a cluster's Ray dashboard, as in http://HEAD:8265."""
    goodput: bool = True
    """It is worked out from all the run's records, of which a long one has many."""
    json: bool = False
    """Print it as JSON."""


def status(arguments: list[str]) -> int:
    """Show what a run is doing."""
    options = parse(StatusOptions, arguments, "status")
    from cluster.run_state import read_state
    from pipeline.store import Store
    from trainer.run_files import RUN

    run = Store(options.run)
    job = _job_facts(_newest_job(_jobs(options.address), run)) if options.address is not None else {}
    if job.get("job") and not run.exists(RUN):
        report({"run": str(run), "state": "submitted"} | job, options.json)
        return 0
    state = read_state(run, with_goodput=options.goodput)
    if options.json:
        report(asdict(state) | job, as_json=True)
    else:
        report(_words(state) | {name.replace("_", " "): value for name, value in job.items() if value}, as_json=False)
    return 0


def _job_facts(job: Job | None) -> dict[str, str | None]:
    """What a cluster knows of a run's newest job."""
    if job is None:
        return {"job": None, "job_status": None, "job_error": None}
    failed = str(job.status) == "FAILED"
    return {"job": job.id, "job_status": str(job.status), "job_error": job.failure if failed else None}


def _words(state: RunState) -> dict[str, Any]:
    """The lines of `status`."""
    total = f" of {state.num_steps:,}" if state.num_steps else ""
    lines = {
        "run": state.run,
        "state": state.state + (f": {state.reason}" if state.reason else ""),
        "step": f"{state.step:,}{total}",
        **_numbers(state),
        "attempts": state.attempts,
        "goodput": _percent(state.goodput),
        "last word": f"{duration(state.age_s)} ago" if state.age_s is not None else "",
        "driver": state.driver or "",
        "workers": ", ".join(state.workers),
    }
    return {name: value for name, value in lines.items() if value != ""}


def _numbers(state: RunState) -> dict[str, str]:
    return {
        "epoch": f"{state.epoch:.2f}",
        "loss": f"{state.loss:.4f}" if state.loss is not None else "",
        "images/s": f"{state.images_per_s:,.0f}" if state.images_per_s is not None else "",
    }


def _percent(share: float | None) -> str:
    return f"{share:.1%}" if share is not None else ""


@dataclass(frozen=True, kw_only=True)
class RunsOptions:
    """Show all runs below a URL in a table.

    Example: tarmac runs s3://bucket/runs
    """

    url: Annotated[str, tyro.conf.Positional]
    """Where to look."""
    depth: int = 3
    """Levels of folders below the URL that are looked through."""
    goodput: bool = True
    """Of each run; it is worked out from all its records, of which a long run has many."""
    json: bool = False
    """Print them as JSON."""


def runs(arguments: list[str]) -> int:
    """Show all runs below a URL."""
    options = parse(RunsOptions, arguments, "runs")
    check_at_least(options, depth=0)
    from cluster.run_state import read_states
    from pipeline.store import Store

    root = Store(options.url)
    states = read_states(root, options.depth, with_goodput=options.goodput)
    if options.json:
        json.dump([asdict(state) for state in states], sys.stdout, indent=2)
        sys.stdout.write("\n")
        return 0
    if not states:
        say(Console(stderr=True), f"no run in {options.depth} levels of folders below {root}")
        return 0
    columns = ("run", "state", "step", "epoch", "loss", "images/s", "attempts", "goodput", "age")
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in ("run", "state") else "right", overflow="fold")
    for state in states:
        name = state.run.removeprefix(str(root)).lstrip("/") or state.run
        step = f"{state.step:,}/{state.num_steps:,}" if state.num_steps else f"{state.step:,}"
        age = duration(state.age_s) if state.age_s is not None else ""
        cells = (*_numbers(state).values(), str(state.attempts), _percent(state.goodput), age)
        table.add_row(name, state.state, step, *cells)
    Console().print(table, highlight=False)
    for state in states:
        if state.state == "unreadable":
            say(Console(), f"unreadable: {state.run}: {state.reason}")
    return 0


@dataclass(frozen=True, kw_only=True)
class LogsOptions:
    """Print what the driver of a run printed: the log of its newest job on a cluster.

    Example: tarmac logs s3://bucket/runs/b --address http://head:8265 --follow
    """

    run: Annotated[str, tyro.conf.Positional]
    """URL of the run."""
    address: str | None = field(default_factory=_default_address)
    """URL of the cluster's Ray dashboard, as in http://HEAD:8265."""
    follow: bool = False
    """Go on until the job ends."""
    json: bool = False
    """Print job, status and log as JSON."""


def logs(arguments: list[str]) -> int:
    """Print the log of a run's job."""
    options = parse(LogsOptions, arguments, "logs")
    if options.follow and options.json:
        raise UsageError("--json prints a log that is there, and --follow one that grows; give one of them")
    from pipeline.store import Store

    jobs, run = _jobs(options.address), Store(options.run)
    job = _newest_job(jobs, run)
    if job is None:
        raise CommandError(f"the cluster at {jobs.address} knows no job of {run}; was it submitted to another one?")
    if options.follow:
        asyncio.run(_follow_log(jobs, job))
    elif options.json:
        report({"job": job.id, "job_status": str(job.status), "log": jobs.log(job.id)}, as_json=True)
    else:
        sys.stdout.write(jobs.log(job.id))
    return 0


async def _follow_log(jobs: RayJobs, job: Job) -> None:
    async for text in jobs.follow_log(job.id):
        sys.stdout.write(text)
        sys.stdout.flush()


@dataclass(frozen=True, kw_only=True)
class StopOptions:
    """Ask a run to save a checkpoint and stop, wherever it is driven: the request is an object in its bucket.

    Example: tarmac stop s3://bucket/runs/b --wait
    """

    run: Annotated[str, tyro.conf.Positional]
    """URL of the run."""
    wait: bool = False
    """Until nobody drives it any more; with --now until Ray says that its job has ended, too."""
    now: bool = False
    """Have Ray end the driver's process too, which gets a few seconds and may not save; needs --address."""
    address: str | None = field(default_factory=_default_address)
    """URL of the cluster's Ray dashboard, as in http://HEAD:8265."""
    json: bool = False
    """Print the run's state as JSON."""


def stop(arguments: list[str]) -> int:
    """Ask a run to save a checkpoint and stop."""
    options = parse(StopOptions, arguments, "stop")
    from cluster.run_state import tell_state
    from cluster.stop_request import ask_to_stop
    from pipeline.store import Store
    from trainer.run_files import RUN, no_run

    run = Store(options.run)
    jobs = _jobs(options.address) if options.now else None
    if not run.exists(RUN):
        raise no_run(run)
    state = tell_state(run)  # one that cannot be read can be stopped all the same
    if state.state == "finished":
        return _tell_stopped(options, state, f"finished: {run} is at step {state.step}")
    ask_to_stop(run)
    if jobs is not None:
        _stop_now(jobs, run, wait=options.wait)
    driver = _await_end(run, Console(stderr=options.json)) if options.wait else None
    state = tell_state(run)
    if driver is not None:
        message = f"{driver} drives {run} now: it was begun after the stop; ask again, or see to what begins it"
    elif options.wait or state.state not in (*_DRIVEN, "unreadable"):
        message = f"nobody drives {run} ({state.state}, step {state.step}); it stays so until it is submitted again"
    elif state.state == "unreadable":
        message = f"asked: a driver of {run} stops; what it is doing cannot be read: {state.reason}"
    else:
        message = f"asked: {run} saves a checkpoint and stops; `tarmac stop --wait` waits for it"
    return _tell_stopped(options, state, message)


def _tell_stopped(options: StopOptions, state: RunState, message: str) -> int:
    if options.json:
        report(asdict(state), as_json=True)
    else:
        say(Console(), message)
    return 0


def _stop_now(jobs: RayJobs, run: Store, *, wait: bool) -> None:
    from cluster.submit import active_job

    job = active_job(jobs, run.url)
    if job is None:
        raise CommandError(f"the cluster at {jobs.address} runs no job of {run}; the request in the bucket stays")
    jobs.stop(job.id)
    while wait and job is not None and job.is_active:
        time.sleep(_POLL_S)
        job = jobs.get(job.id)


def _await_end(run: Store, console: Console) -> LeaseRecord | None:
    """Wait until whoever drives the run has stopped, or is gone; returns who else began since then and goes on."""
    from cluster.lease_watch import LeaseWatch
    from cluster.stop_request import stop_asked

    watch, seen = LeaseWatch(run), ""
    while (driver := watch.holder()) is not None:
        if driver.driver != seen:
            if seen and not stop_asked(run):
                return driver
            seen = driver.driver
            say(console, f"waiting for {driver}, which saves a checkpoint first")
        time.sleep(_POLL_S)
    return None


def _jobs(address: str | None) -> RayJobs:
    if address is None:
        raise UsageError("needs --address, the URL of the cluster's Ray dashboard, as in http://HEAD:8265")
    from cluster.ray_jobs import RayJobs

    return RayJobs(address)


def _newest_job(jobs: RayJobs, run: Store) -> Job | None:
    from cluster.submit import jobs_of

    found = jobs_of(jobs, run.url)
    return found[-1] if found else None
