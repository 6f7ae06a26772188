"""Logging of our processes: ours in full, others' without their debugging, and no secret that stands in a URL."""

from __future__ import annotations

import logging
import re
import sys
import threading
import traceback
from types import TracebackType

_OURS = ("pipeline", "trainer", "cluster")
_URL = re.compile(r"(?P<scheme>\b[a-zA-Z][\w+.-]*://)(?:[^/\s\"'@?]*@)?(?P<rest>[^\s\"'?]*)(?:\?[^\s\"']*)?")


def set_up_logging(verbose: bool) -> None:
    """Log to stderr: warnings, or with `verbose` all of ours and others' from INFO on.

    Tracebacks of errors that nothing catches, of any thread, go there without secrets too.

    Others' debugging stays out: botocore's has the headers of requests, session token and all.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])
    if verbose:
        for package in _OURS:
            logging.getLogger(package).setLevel(logging.DEBUG)
    sys.excepthook = _print_error
    if threading.excepthook is threading.__excepthook__:  # a test runner has its own
        threading.excepthook = _print_thread_error


def without_secrets(text: str) -> str:
    """`text` with every URL in it stripped of user, password and query."""
    return _URL.sub(r"\g<scheme>\g<rest>", text)


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
