"""Secrets in URLs: refused where a URL comes in, and left out of texts."""

from __future__ import annotations

import re

_SCHEME = r"(?P<scheme>\b[a-z][\w+.-]*://)"
_PORT = r"[^\s/:?\"'@]*:\d{1,5}(?:[/?#,;)\]}>\s\"']|$)"
# A password may have '/', '?' and '@' in it, as keys of AWS have: it ends at the last '@' of the word. The '@' in the
# path of host:port/img@2x.jpg ends none; buckets have no port, so there whatever follows a ':' may be a key.
_PASSWORD = rf"(?!\[)(?:(?<=\bs3://)|(?<=\bs3a://)|(?<=\bgs://)|(?!{_PORT}))[^\s/:?\"'@]*:[^\s\"']*@"
_LOGIN = re.compile(rf"{_SCHEME}(?:{_PASSWORD}|(?<!\babfs://)(?<!\babfss://)[^\s/?\"']*@)", re.IGNORECASE)
_QUERY = re.compile(rf"(?P<before>{_SCHEME}[^\s\"'?]*)\?[^\s\"']*", re.IGNORECASE)
_HOST = re.compile(r"(\[[^\]]*\]|[^:@\[\]]*)(:\d{1,5})?")
_BUCKET = re.compile(r"[^:@]*")
_CONTAINER = re.compile(r"[^:@]*(@[^:@]*)?")
"""Of Azure: abfs://container@account.dfs.core.windows.net/path."""
_PLACES = {"s3": _BUCKET, "s3a": _BUCKET, "abfs": _CONTAINER, "abfss": _CONTAINER}
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
    clean = without_secrets(url)
    login = not all(map(_is_host, _authorities(url)))
    if login or (clean != url and _scheme(url) not in _LITERAL):
        # What follows a ':' may be a key whose '@' was forgotten, and what is before it a key's id.
        shown = clean if all(map(_is_host, _authorities(clean))) else f"{_scheme(url)}://..."
        raise ValueError(
            f"store url {shown!r} must have no user, password or query, and a bucket's name no ':': they would be kept "
            "in records and logs; credentials come from the standard chain of the storage, such as AWS's"
        )


def _scheme(url: str) -> str:
    """The last one of a chain: s3 of simplecache::s3://bucket."""
    return url.partition("://")[0].rpartition(":")[2].lower()


def _authorities(url: str) -> list[tuple[str, str]]:
    """Scheme, and what stands between the // and the next /; more than one in a chain, none in a bare path."""
    places = url.split("://")[1:]
    return [(_scheme(url), re.sub(r"::\w+$", "", re.split("[/?#]", place, maxsplit=1)[0])) for place in places]


def _is_host(authority: tuple[str, str]) -> bool:
    """Whether it is a host, a bucket or a container, and nothing more but a port."""
    scheme, name = authority
    return bool(_PLACES.get(scheme, _HOST).fullmatch(name))
