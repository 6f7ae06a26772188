"""Logging of our processes: ours in full, others' without their debugging, and no secret that stands in a URL."""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

from pipeline.urls import without_secrets

__all__ = ["redact_logs", "set_up_logging", "without_secrets"]

_OURS = ("pipeline", "trainer", "cluster")


def set_up_logging(verbose: bool) -> None:
    """Log to stderr: warnings, or with `verbose` all of ours and others' from INFO on.

    Tracebacks of errors that nothing catches, of any thread, go there without secrets too.

    Others' debugging stays out: botocore's has the headers of requests, session token and all.
    """
    redact_logs()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])
    if verbose:
        for package in _OURS:
            logging.getLogger(package).setLevel(logging.DEBUG)
    sys.excepthook = _print_error
    if threading.excepthook is threading.__excepthook__:  # a test runner has its own
        threading.excepthook = _print_thread_error


def redact_logs() -> None:
    """Keep the secrets of URLs out of every record that this process logs from now on, whoever handles it.

    Ray Train has its own handlers in place, for files and the console, before a worker's function begins.
    """
    factory = logging.getLogRecordFactory()
    if not isinstance(factory, _Redacted):
        logging.setLogRecordFactory(_Redacted(factory))


class _Redacted:
    """A factory of log records, which takes the secrets out of those of another one: text, traceback and stack."""

    def __init__(self, factory: Callable[..., logging.LogRecord]) -> None:
        self._factory = factory

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record = self._factory(*args, **kwargs)
        try:
            text = record.getMessage()
        except Exception:  # arguments that do not fit: logging itself tells, and shows them
            text = f"{record.msg} {record.args}"
        if (clean := without_secrets(text)) != text:
            record.msg, record.args = clean, ()
        if record.exc_info and record.exc_info[0] is not None:
            text = _PLAIN.formatException(record.exc_info)
            if (clean := without_secrets(text)) != text:
                record.exc_text = clean  # which formatters take in place of their own
        if record.stack_info:
            record.stack_info = without_secrets(record.stack_info)
        return record


def _print_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(without_secrets("".join(traceback.format_exception(kind, error, trace))))


def _print_thread_error(what: threading.ExceptHookArgs) -> None:
    if what.exc_value is None or issubclass(what.exc_type, SystemExit):
        return
    sys.stderr.write(f"Exception in thread {what.thread.name if what.thread else 'of no name'}:\n")
    _print_error(what.exc_type, what.exc_value, what.exc_traceback)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


_PLAIN = logging.Formatter()
