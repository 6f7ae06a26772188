"""How a worker tells what broke it."""

import pickle
import traceback

import pytest

from cluster.worker import RedactedError, one_line, redacted

LOST = "\n[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711. "


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError(LOST), "RuntimeError: Connection closed by peer [127.0.0.1]:4711."),
        (ValueError("two\n  lines"), "ValueError: two lines"),
        (OSError("no s3://me:word@bucket/a?token=1 there"), "OSError: no s3://bucket/a there"),
        (OSError("no s3://KEY:wo/rd@bucket/a there"), "OSError: no s3://bucket/a there"),
    ],
)
def test_an_error_is_one_line_without_gloos_sources_and_secrets(error, line):
    assert one_line(error) == line


def raised(error, cause=None):
    try:
        raise error from cause
    except Exception as caught:
        return caught


def test_an_error_without_a_secret_leaves_the_worker_as_it_is():
    error = raised(ValueError("no s3://bucket/a"), OSError("http://host:80/img@2x"))
    assert redacted(error) is error


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        ("no s3://me:hid/hidden@bucket/a there", None),
        ("no checkpoint", "GET https://bucket.host/a?X-Amz-Signature=hidden"),
    ],
)
def test_an_error_with_a_secret_leaves_the_worker_without_it(message, cause):
    error = raised(ValueError(message), OSError(cause) if cause else None)
    leaving = pickle.loads(pickle.dumps(redacted(error)))
    text = "".join(traceback.format_exception(leaving))
    assert isinstance(leaving, RedactedError)
    assert "hidden" not in text
    assert "ValueError: no " in text
    assert "in raised" in text, "the traceback of the first one is told"
