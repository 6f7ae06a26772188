"""How a worker tells what broke it."""

import pytest

from cluster.worker import one_line

LOST = "\n[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711. "


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError(LOST), "RuntimeError: Connection closed by peer [127.0.0.1]:4711."),
        (ValueError("two\n  lines"), "ValueError: two lines"),
        (OSError("no s3://me:word@bucket/a?token=1 there"), "OSError: no s3://bucket/a there"),
    ],
)
def test_an_error_is_one_line_without_gloos_sources_and_secrets(error, line):
    assert one_line(error) == line
