"""Logging of our processes: ours in full, others' without their debugging, and no secret that stands in a URL."""

from __future__ import annotations

import logging
import re
import sys

_OURS = ("pipeline", "trainer", "cluster")
_URL = re.compile(r"(?P<scheme>\b[a-zA-Z][\w+.-]*://)(?:[^/\s\"'@?]*@)?(?P<rest>[^\s\"'?]*)(?:\?[^\s\"']*)?")


def set_up_logging(verbose: bool) -> None:
    """Log to stderr: warnings, or with `verbose` all of ours and others' from INFO on.

    Others' debugging stays out: botocore's has the headers of requests, session token and all.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])
    if verbose:
        for package in _OURS:
            logging.getLogger(package).setLevel(logging.DEBUG)


def without_secrets(text: str) -> str:
    """`text` with every URL in it stripped of user, password and query."""
    return _URL.sub(r"\g<scheme>\g<rest>", text)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))
