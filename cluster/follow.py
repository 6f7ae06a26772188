"""`submit --wait`: follows a run, whoever drives it, and submits it again when its job or its cluster was lost."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from dataclasses import dataclass

from ray.job_submission import JobStatus

from cluster.lease import is_stale, read_lease
from cluster.ray_jobs import FATAL_EXITS, Job, NoAnswerError, RayJobs
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
        self._news = RunNews(self._run)
        self._our_driver: str | None = None
        self._furthest, self._num_in_a_row = 0, 0
        self._not_before = 0.0
        self._last_told = ""

    def follow(self, job_id: str | None) -> Ended:
        """Until the run is finished, was stopped, or failed for good."""
        self.job_id = job_id
        while True:
            try:
                self._on_news(self._news.take())
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
        except NoAnswerError as error:
            self._say(f"{error}. Waiting for a cluster there")
            return self._judge(None, may_submit=False)
        if job is not None and job.is_active:
            self._note_our_driver()
            return None
        return self._judge(job, may_submit=True)

    def _judge(self, job: Job | None, *, may_submit: bool) -> Ended | None:
        """What it means that our job does not run: `job` is what Ray knows of it, if anything."""
        state = read_state(self._run) if self._run.exists(RUN) else None
        driver = self._living_driver()
        if (state and state.state == "finished") or (job and job.status is JobStatus.SUCCEEDED):
            return self._end(Ending.FINISHED, "")
        if driver is not None and driver != self._our_driver:
            self._say(f"{driver} drives it now; following that")
            return None
        if job is not None and (job.exit_code in FATAL_EXITS or job.error_type in _FATAL_ERRORS):
            return self._end(Ending.FAILED, job.failure)
        if stop_wanted(self._run):
            return None if driver and not may_submit else self._end(Ending.STOPPED, "by `tarmac stop`")
        if job is not None and job.status is JobStatus.STOPPED:
            return self._end(Ending.STOPPED, "by Ray's `job stop`")
        return self._send_again(job, state) if may_submit else None

    def _send_again(self, job: Job | None, state: RunState | None) -> Ended | None:
        """Submit once more, unless that has not helped before."""
        if time.monotonic() < self._not_before:
            return None
        if state is not None and state.step > self._furthest:
            self._furthest, self._num_in_a_row = state.step, 0
        lost = job.failure if job else "the cluster does not know it"
        if self._num_in_a_row >= self._max:
            times = f"{self._num_in_a_row} resubmissions in a row came no further than step {self._furthest}"
            return self._end(Ending.FAILED, f"{times}; the last job: {lost}")
        try:
            active = active_job(self._jobs, self._submission.job.run)
            job_id = active.id if active else send(self._jobs, self._submission)
        except NoAnswerError as error:
            self._say(f"{error}. Trying again")
            return None
        self._say(f"job {self.job_id or 'of another cluster'} was lost: {lost}; goes on as {job_id}")
        self._not_before = time.monotonic() + min(_LONGEST_PAUSE_S, 2.0**self._num_in_a_row)
        self.job_id, self._our_driver = job_id, None
        self.num_resubmissions += 1
        self._num_in_a_row += 1
        return None

    def _note_our_driver(self) -> None:
        """Who holds the lease while our job runs is the job's driver: after its death, the lease lives on a little."""
        self._last_told = ""
        self._our_driver = self._living_driver() or self._our_driver

    def _living_driver(self) -> str | None:
        lease = read_lease(self._run)
        return f"driver {lease.driver} on {lease.host}" if lease and not is_stale(lease) else None

    def _end(self, ending: Ending, reason: str) -> Ended:
        self._on_news(self._news.take())
        return Ended(ending, reason)

    def _say(self, message: str) -> None:
        """Once, however often it is found out again."""
        if message != self._last_told:
            self._last_told = message
            self._tell(message)
