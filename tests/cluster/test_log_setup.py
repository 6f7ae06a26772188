"""No secret of a URL in any log, whoever set up its handlers, and in no traceback."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest
from ray._common.formatters import JSONFormatter

from cluster.log_setup import set_up_logging

URL = "s3://KEY:hidden/hidden@bucket/a?sig=hidden"
CLEAN = "s3://bucket/a"


@pytest.fixture
def logs() -> Iterator[dict[str, io.StringIO]]:
    """Handlers as Ray Train puts them up before our code begins: on the root, and on a logger that keeps its own."""
    streams = {"root": io.StringIO(), "ray.train": io.StringIO()}
    factory, put_up, levels = logging.getLogRecordFactory(), [], []
    for name, stream in streams.items():
        logger = logging.getLogger(None if name == "root" else name)
        handler = logging.StreamHandler(stream)
        handler.setFormatter(JSONFormatter())
        levels.append((logger, logger.level, logger.propagate))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = name == "root"
        put_up.append((logger, handler))
    ours = [(logging.getLogger(name), logging.getLogger(name).level) for name in ("pipeline", "trainer", "cluster")]
    try:
        set_up_logging(verbose=True)
        yield streams
    finally:
        logging.setLogRecordFactory(factory)
        for logger, handler in put_up:
            logger.removeHandler(handler)
        for logger, level, propagate in levels:
            logger.setLevel(level)
            logger.propagate = propagate
        for logger, level in ours:
            logger.setLevel(level)


@pytest.mark.parametrize("name", ["pipeline.store", "botocore", "ray.train"])
def test_handlers_that_were_there_first_get_no_secret(logs: dict[str, io.StringIO], name: str) -> None:
    logger = logging.getLogger(name)
    logger.error(f"Error in training function:\n{URL} is gone")
    logger.warning("args: %s and %r", URL, {"url": URL})
    try:
        try:
            raise OSError(f"no {URL}")
        except OSError as error:
            raise RuntimeError(f"no checkpoint in {URL}") from error
    except RuntimeError:
        logger.exception("of %s", URL, stack_info=True)
    text = logs["ray.train" if name == "ray.train" else "root"].getvalue()
    assert "hidden" not in text
    assert "KEY" not in text
    said, arguments, broken = [json.loads(line) for line in text.splitlines()]
    assert said["message"] == f"Error in training function:\n{CLEAN} is gone"
    assert arguments["message"] == f"args: {CLEAN} and {{'url': '{CLEAN}'}}"
    assert f"OSError: no {CLEAN}" in broken["exc_text"]
    assert f"RuntimeError: no checkpoint in {CLEAN}" in broken["exc_text"]


def test_other_records_stay_as_they_are(logs: dict[str, io.StringIO]) -> None:
    seen: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = seen.append  # type: ignore[method-assign]
    logger = logging.getLogger("pipeline.store")
    logger.addHandler(handler)
    try:
        logger.info("%d of %s", 3, "s3://bucket/a")
    finally:
        logger.removeHandler(handler)
    assert (seen[0].msg, seen[0].args) == ("%d of %s", (3, "s3://bucket/a"))


def test_setting_it_up_again_wraps_nothing_twice(logs: dict[str, io.StringIO]) -> None:
    factory = logging.getLogRecordFactory()
    set_up_logging(verbose=False)
    assert logging.getLogRecordFactory() is factory


def test_arguments_that_do_not_fit_are_logged_without_a_secret(
    logs: dict[str, io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", True)
    logging.getLogger("cluster").error(*("%d of %s", URL))
    assert json.loads(logs["root"].getvalue())["message"] == f"%d of %s ('{CLEAN}',)"


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
def test_a_traceback_has_no_secret_of_a_url(call: str) -> None:
    program = [sys.executable, "-c", PROGRAM.format(call=call)]
    done = subprocess.run(program, capture_output=True, text=True, check=False, timeout=120)
    assert "Traceback (most recent call last)" in done.stderr
    assert "RuntimeError: cannot read s3://bucket/data" in done.stderr
    assert "hidden" not in done.stderr
    assert ("in thread reader" in done.stderr) == (done.returncode == 0)
