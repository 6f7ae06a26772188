"""What a cluster's silence and its refusals become."""

import asyncio

import pytest
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus

from cluster import ray_jobs
from cluster.ray_jobs import NoAnswerError, RayJobs, TokenError


class Details:
    """Of a job, as Ray's client gives them."""

    submission_id, driver_exit_code, error_type, message, metadata = "a", None, None, "", {}

    def __init__(self, status):
        self.status = status


class Client:
    """In the place of Ray's. Its log has `texts`, and then nothing more."""

    def __init__(self, *answers, texts=(), ends=False):
        self.answers, self.texts, self.ends = list(answers), texts, ends
        self.is_closed = False

    def get_job_info(self, job_id):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return Details(answer)

    async def tail_job_logs(self, job_id):
        try:
            for text in self.texts:
                yield text
            if not self.ends:
                await asyncio.Event().wait()
        finally:
            self.is_closed = True


def connected(client):
    jobs = RayJobs("http://127.0.0.1:1")
    jobs._connected = client
    return jobs


def followed(client):
    async def collect():
        return [text async for text in connected(client).follow_log("a")]

    return asyncio.run(asyncio.wait_for(collect(), 20))


@pytest.fixture(autouse=True)
def short_requests(monkeypatch):
    monkeypatch.setattr(ray_jobs, "_REQUEST_S", 0.05)


def test_a_log_is_followed_to_its_end():
    assert followed(Client(texts=("a", "b", "c"), ends=True)) == ["a", "b", "c"]


def test_a_log_that_says_nothing_is_waited_for_while_the_job_runs():
    client = Client(JobStatus.RUNNING, JobStatus.RUNNING, JobStatus.SUCCEEDED, texts=("a",))
    assert followed(client) == ["a"]
    assert client.answers == []
    assert client.is_closed


def test_a_head_that_falls_silent_is_no_answer():
    client = Client(JobStatus.RUNNING, requests.Timeout(), texts=("a",))
    with pytest.raises(NoAnswerError, match="nothing came for"):
        followed(client)
    assert client.is_closed


def test_a_token_that_is_not_taken_is_looked_for_anew():
    jobs = connected(Client(AuthenticationError("Authentication failed\nlong")))
    with pytest.raises(TokenError, match=r"wants Ray's authentication token .*RAY_AUTH_TOKEN_PATH"):
        jobs.get("a")
    assert jobs._connected is None


def test_an_answer_that_nobody_expects_has_a_remedy():
    jobs = connected(Client(RuntimeError("Request failed with status code 500: Traceback")))
    with pytest.raises(NoAnswerError, match=r"did not do it: .*status code 500.*dashboard\.log"):
        jobs.get("a")
