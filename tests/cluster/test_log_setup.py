"""Errors that nothing catches: their tracebacks, as a process of its own prints them."""

import subprocess
import sys

import pytest

PROGRAM = """
import threading
from cluster.log_setup import set_up_logging

def fail():
    raise RuntimeError("cannot read s3://key:hidden@bucket/data?token=alsohidden")

set_up_logging(verbose=False)
import ray  # wraps what is there
{call}
"""


@pytest.mark.parametrize("call", ["fail()", "t = threading.Thread(target=fail, name='reader'); t.start(); t.join()"])
def test_a_traceback_has_no_secret_of_a_url(call):
    program = [sys.executable, "-c", PROGRAM.format(call=call)]
    done = subprocess.run(program, capture_output=True, text=True, check=False, timeout=120)
    assert "Traceback (most recent call last)" in done.stderr
    assert "RuntimeError: cannot read s3://bucket/data" in done.stderr
    assert "hidden" not in done.stderr
    assert ("in thread reader" in done.stderr) == (done.returncode == 0)
