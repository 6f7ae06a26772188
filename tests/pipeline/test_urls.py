"""No secret of a URL in a text, and none let in."""

from __future__ import annotations

import pickle

import pytest

from pipeline.store import Store
from pipeline.urls import check_url, without_secrets


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("Custom endpoint `http://me:wo/rd@host:80` was not valid", "Custom endpoint `http://host:80` was not valid"),
        ("no s3://me:word@bucket/a?token=1 there", "no s3://bucket/a there"),
        ("https://token@host/a", "https://host/a"),
        ("http://me:word@host:80/a", "http://host:80/a"),
        ("http://me:8080@host/a", "http://host/a"),
        ("ftp://me:a@b@host/a", "ftp://host/a"),
        ("s3://KEY:SEC/RET@bucket/x", "s3://bucket/x"),
        ("S3A://KEY:8080/RET+?@bucket/x", "S3A://bucket/x"),
        ("s3://KEY:S@C/RET@bucket/x", "s3://bucket/x"),
        ("sftp://me:sec/re?t@host/x", "sftp://host/x"),
        ("simplecache::s3://KEY:SEC/RET@bucket/x", "simplecache::s3://bucket/x"),
        ("s3://a/b,s3://me:word@c/d", "s3://a/b,s3://c/d"),
        ('{"url": "https://me:word@host/a?sig=1", "n": 1}', '{"url": "https://host/a", "n": 1}'),
        ("https://host/a?mail=me@host", "https://host/a"),
        ("http://host:80?next=me@host", "http://host:80"),
        ("abfss://images:word@account/a?sig=1", "abfss://account/a"),
    ],
)
def test_texts_lose_the_secrets_of_their_urls(text: str, clean: str) -> None:
    assert without_secrets(text) == clean
    assert without_secrets(clean) == clean


@pytest.mark.parametrize(
    "text",
    [
        "the cluster at http://host:8265/x answers me@host",
        "http://host:8265/img@2x.jpg, http://[::1]:8265/img@2x.jpg",
        "http://host:8265, me@host",
        '["http://host:8265","me@host"]',
        "s3://bucket/img@2x.jpg: no such key: me@host",
        "s3://bucket/a:b@c",
        "git+https://host/tarmac@v1",
        "file:///disk/me@host:80/a",
        "a photo of 3:4@2x, and https://host/",
        "tcp://127.0.0.1:4711 is closed",
        "s3://bucket",
        "abfs://images@account.dfs.core.windows.net/train",
    ],
)
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert without_secrets(text) == text


BAD = [
    *("s3://me:hidden@bucket/a", "s3://hidden@bucket/a", "s3a://bucket/a?sig=hidden", "s3://KEY:SEC/hidden@bucket/x"),
    *(
        "s3://KEY:5/hidden@bucket/x",
        "s3://KEY:hidden/bucket",
        "s3://hidden:hidden/bucket",
        "gs://me:hidden@bucket/a",
        "gs://bucket/a?hidden",
    ),
    *("sftp://me:hidden@host/a", "sftp://hidden@host/a", "http://me:hidden@host:80/a", "https://host/a?sig=hidden"),
    *("https://me:hid/hidden@host/a", "memory://me:hidden@host/a", "simplecache::s3://me:hidden@bucket/a"),
]


@pytest.mark.parametrize("url", BAD)
def test_a_store_takes_no_url_with_a_secret(url: str) -> None:
    with pytest.raises(ValueError, match=r"must have no user, password or query.*credentials come from") as caught:
        Store(url)
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        *("s3://bucket/a@b:c", "gs://bucket/a", "http://host:80/img@2x", "http://[::1]:80/a", "memory://host/a"),
        *("simplecache::s3://bucket/a", "/disk/what?/me@host:1", "relative:path@x?", "file:///disk/what?", "s3://"),
    ],
)
def test_other_urls_are_taken(url: str) -> None:
    check_url(url)


def test_a_pickled_store_has_its_url() -> None:
    assert str(pickle.loads(pickle.dumps(Store("memory://host/a")))) == "memory://host/a"
