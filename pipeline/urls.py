"""Secrets in URLs: refused where a URL comes in, and left out of texts."""

from __future__ import annotations

import re

_SCHEME = r"(?P<scheme>\b[a-z][\w+.-]*://)"
_PORT = r"[^\s/:?\"'@]*:\d{1,5}(?:[/?#,;)\]}>\s\"']|$)"
# A password may have '/', '?' and '@' in it, as keys of AWS have: it ends at the last '@' of the word. The '@' in the
# path of host:port/img@2x.jpg ends none; buckets have no port, so there whatever follows a ':' may be a key.
_PASSWORD = rf"(?!\[)(?:(?<=\bs3://)|(?<=\bs3a://)|(?<=\bgs://)|(?!{_PORT}))[^\s/:?\"'@]*:[^\s\"']*@"
_LOGIN = re.compile(rf"{_SCHEME}(?:{_PASSWORD}|[^\s/?\"']*@)", re.IGNORECASE)
_QUERY = re.compile(rf"(?P<before>{_SCHEME}[^\s\"'?]*)\?[^\s\"']*", re.IGNORECASE)
_HOST = re.compile(r"(\[[^\]]*\]|[^:@\[\]]*)(:\d{1,5})?")
_BUCKET = re.compile(r"[^:@]*")
_LITERAL = ("file", "local")
"""In their paths a '?' is a character like others."""


def without_secrets(text: str) -> str:
    """`text` with every URL in it stripped of user, password and query. Spaces and quotes end a URL."""
    if "://" not in text:
        return text
    return _QUERY.sub(r"\g<before>", _LOGIN.sub(r"\g<scheme>", text))


def check_url(url: str) -> None:
    """Refuse a URL that may hold a secret: it would be kept in records, job descriptions and logs.

    Raises:
        ValueError: it has a user, a password or a query. Bare paths have none.
    """
    scheme, *rest = url.split("://")
    scheme = scheme.rpartition(":")[2].lower()  # the last of a chain: simplecache::s3
    pattern = _BUCKET if scheme in ("s3", "s3a") else _HOST
    authorities = [re.sub(r"::\w+$", "", re.split("[/?#]", part, maxsplit=1)[0]) for part in rest]
    login = any(not pattern.fullmatch(authority) for authority in authorities)
    literal = scheme in _LITERAL
    if login or (rest and not literal and without_secrets(url) != url):
        # What follows a ':' may be a key whose '@' was forgotten.
        shown = re.sub(r"(://[^/:]*:).*", r"\g<1>...", without_secrets(url)) if login else without_secrets(url)
        raise ValueError(
            f"store url {shown!r} must have no user, password or query, and a bucket's name no ':': they would be kept "
            "in records and logs; credentials come from the standard chain of the storage, such as AWS's"
        )
