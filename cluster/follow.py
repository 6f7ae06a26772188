"""`submit --wait`: follows a run, whoever drives it, and submits it again when its job or its cluster was lost."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from ray.job_submission import JobStatus

from cluster.lease import LeaseRecord, is_stale, read_lease
from cluster.options import UsageError
from cluster.ray_jobs import FATAL_EXITS, Job, NoAnswerError, RayJobs, TokenError
from cluster.relay import News
from cluster.run_news import RunNews
from cluster.run_state import RunState, read_state
from cluster.stop_request import stop_wanted
from cluster.submit import Submission, active_job, send
from pipeline.errors import StoreError
from pipeline.store import Store
from trainer.run_files import RUN

_POLL_S = 2.0
_LONGEST_PAUSE_S = 60.0
_FATAL_ERRORS = ("RUNTIME_ENV_SETUP_FAILURE", "JOB_ENTRYPOINT_COMMAND_START_ERROR")
"""Of Ray's: the same job would fail again."""
_REFUSALS = (NoAnswerError, TokenError, UsageError)
"""Of the cluster at the address, which may be another one later: UsageError where it takes anybody."""


class Ending(enum.Enum):
    """How a run ended for whoever follows it."""

    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True)
class Ended:
    """The end, and in words why."""

    ending: Ending
    reason: str


class Follower:
    """Follows one run. The bucket says how far it is; the bucket and Ray together, whether it must be sent again."""

    def __init__(
        self,
        jobs: RayJobs,
        submission: Submission,
        *,
        max_resubmissions: int,
        on_news: Callable[[News], None],
        say: Callable[[str], None],
    ) -> None:
        """
        Args:
            jobs: of the cluster.
            submission: what is sent again.
            max_resubmissions: in a row without a step further in between.
            on_news: given what the run has written, every few seconds.
            say: told what happens to the job.
        """
        self.job_id: str | None = None
        """The job that is followed; None while another cluster or machine drives the run."""
        self.num_resubmissions = 0
        self._jobs, self._submission = jobs, submission
        self._max, self._on_news, self._tell = max_resubmissions, on_news, say
        self._run = Store(submission.job.run, submission.job.train.store)
        self._news, self._others = RunNews(self._run), _OtherDriver(self._run)
        self._old_failure: int | None = None
        self._is_stopping = False
        self._furthest, self._num_in_a_row = 0, 0
        self._not_before = 0.0
        self._last_told = ""

    def follow(self, job_id: str | None) -> Ended:
        """Until the run is finished, was stopped, or failed for good."""
        self.job_id = job_id
        while True:
            try:
                if self._old_failure is None:
                    self._old_failure = _failed_attempt(self._state()) if job_id else 0
                self._take_news()
                ended = self._look()
            except StoreError as error:
                ended = None
                self._say(f"the bucket does not answer ({error}); asking again")
            if ended is not None:
                return ended
            time.sleep(_POLL_S)

    def _look(self) -> Ended | None:
        """One look at Ray and, where that says that the job is not running, at the bucket."""
        try:
            job = self._jobs.get(self.job_id) if self.job_id else None
        except _REFUSALS as error:
            self._say(f"{error}. Asking again")
            return self._judge_unseen()
        if job is not None and job.is_active:
            self._last_told = ""
            self._others.forget()
            return None
        return self._judge(job)

    def _judge_unseen(self) -> Ended | None:
        """What the bucket says of a run whose job nobody can ask after."""
        state = self._state()
        if state and state.state == "finished":
            return self._end(Ending.FINISHED, "")
        if (failure := self._failure(state)) is not None:
            return self._end(Ending.FAILED, failure)
        lease = read_lease(self._run)
        if stop_wanted(self._run) and (lease is None or is_stale(lease)):
            return self._end(Ending.STOPPED, "by `tarmac stop`")
        return None

    def _judge(self, job: Job | None) -> Ended | None:
        """What it means that our job does not run: `job` is what Ray knows of it, if anything."""
        state = self._state()
        if (state and state.state == "finished") or (job and job.status is JobStatus.SUCCEEDED):
            return self._end(Ending.FINISHED, "")
        is_driven = self._others.is_at_work()
        if is_driven:
            self._say(f"{self._others.name} drives it now; following that")
            self.job_id = None
        if is_driven is not False:  # or it is too early to know
            return None
        if (failure := self._failure_of(job, state)) is not None:
            return self._end(Ending.FAILED, failure)
        if stop_wanted(self._run):
            return self._end(Ending.STOPPED, "by `tarmac stop`")
        if job is not None and job.status is JobStatus.STOPPED:
            return self._end(Ending.STOPPED, "by Ray's `job stop`")
        return self._send_again(job, state)

    def _failure_of(self, job: Job | None, state: RunState | None) -> str | None:
        """Why the run would fail again: by the job or, where that says nothing, by the bucket."""
        if job is not None and (job.exit_code in FATAL_EXITS or job.error_type in _FATAL_ERRORS):
            return job.failure
        return self._failure(state) if job is None or job.exit_code is None else None

    def _failure(self, state: RunState | None) -> str | None:
        """Why the run failed for good since it was last submitted, by its bucket; None if it did not."""
        if state is None or _failed_attempt(state) in (0, self._old_failure):
            return None
        # A driver that gives up gives its lease back. One that was killed between two attempts does not.
        lease = read_lease(self._run)
        if lease is None or not lease.released:
            return None
        self._take_news()  # a driver that was told to stop, and lost its workers while it did, has not failed
        return None if self._is_stopping else state.reason or "its driver gave up"

    def _send_again(self, job: Job | None, state: RunState | None) -> Ended | None:
        """Submit once more, unless that has not helped before."""
        if time.monotonic() < self._not_before:
            return None
        if state is not None and state.step > self._furthest:
            self._furthest, self._num_in_a_row = state.step, 0
        gone = "the cluster does not know it" if self.job_id else "its driver is gone"
        lost = job.failure if job else gone
        if self._num_in_a_row >= self._max:
            times = f"{self._num_in_a_row} resubmissions in a row came no further than step {self._furthest}"
            return self._end(Ending.FAILED, f"{times}; the last job: {lost}")
        try:
            active = active_job(self._jobs, self._submission.job.run)
            job_id = active.id if active else send(self._jobs, self._submission)
        except _REFUSALS as error:
            self._say(f"{error}. Asking again")
            return None
        self._say(f"{f'job {self.job_id}' if self.job_id else 'the run'} was lost: {lost}; goes on as {job_id}")
        self._not_before = time.monotonic() + min(_LONGEST_PAUSE_S, 2.0**self._num_in_a_row)
        self.job_id, self._old_failure = job_id, _failed_attempt(state)
        self.num_resubmissions += 1
        self._num_in_a_row += 1
        return None

    def _take_news(self) -> None:
        news = self._news.take()
        for event in news.events:
            if event["event"] in ("asked", "stopping"):  # an attempt begins, or it was told to stop
                self._is_stopping = event["event"] == "stopping"
        self._on_news(news)

    def _state(self) -> RunState | None:
        return read_state(self._run) if self._run.exists(RUN) else None

    def _end(self, ending: Ending, reason: str) -> Ended:
        self._take_news()
        return Ended(ending, reason)

    def _say(self, message: str) -> None:
        """Once, however often it is found out again."""
        if message != self._last_told:
            self._last_told = message
            self._tell(message)


class _OtherDriver:
    """Tells a driver that is at work from the lease that ours left when it died: who is at work renews it.

    That goes by the watch of who looks: clocks need not agree.
    """

    def __init__(self, run: Store) -> None:
        self._run = run
        self.forget()

    def forget(self) -> None:
        """Our driver may live, and what is renewed until it is dead may be its lease."""
        self._lease: LeaseRecord | None = None
        self._is_renewed = False
        self._since = 0.0

    @property
    def name(self) -> str:
        """Who it is, for a message."""
        return f"driver {self._lease.driver} on {self._lease.host}" if self._lease else "nobody"

    def is_at_work(self) -> bool | None:
        """Whether a driver is, now that ours is dead; None if it is too early to know. Raises StoreError, RunError."""
        lease, now = read_lease(self._run), time.monotonic()
        # As if it were renewed just now: its clock does not count, only what tells the end for sure.
        if lease is None or is_stale(replace(lease, renewed=time.time())):
            self.forget()
            return False
        if lease != self._lease:
            self._is_renewed = self._lease is not None
            self._lease, self._since = lease, now
        # It is renewed several times a term. A mistake is harmless: a driver that is one too many is refused.
        if now - self._since > (lease.term_s if self._is_renewed else lease.term_s / 2):
            return False
        return True if self._is_renewed else None


def _failed_attempt(state: RunState | None) -> int:
    """Number of the attempt after which a driver gave up; 0 if none did."""
    return state.attempts if state is not None and state.state == "failed" else 0
