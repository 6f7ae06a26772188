"""Images in a bucket that cannot be read: one of them is a bad sample, a store that fails is an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import s3fs
from faulty_proxy import Action, Faults

from pipeline.config import StoreConfig
from pipeline.errors import SourceError, StoreError, StoreNotFoundError, StoreRefusedError
from pipeline.listing import Listing
from pipeline.sources import BucketSource
from pipeline.store import Store
from pipeline.verify import verify_dataset
from pipeline.write import write_dataset


class ChangingSource(BucketSource):
    """A bucket where something happens after the listing."""

    def __init__(self, url: str, happens: Callable[[], object], num_attempts: int = 8) -> None:
        super().__init__(url, StoreConfig(num_attempts=num_attempts))
        self.happens = happens

    def scan(self) -> Listing:
        listing = super().scan()
        self.happens()
        return listing


@pytest.fixture
def source_url(bucket: str, small_photos: Path) -> str:
    """Eight photographs in a bucket, `cat/photo 0.v0.JPG` and so on."""
    store = Store(f"{bucket}/in")
    for number in range(4):
        for name in (f"cat/photo {number}.v0.JPG", f"hot dog/photo {number}.v1.JPG"):
            store.write(name, (small_photos / name).read_bytes())
    return store.url


def test_an_object_that_is_gone_or_refused_is_a_bad_sample(source_url: str, faults: Faults, tmp_path: Path) -> None:
    def happens() -> None:
        Store(source_url).remove("cat/photo 0.v0.JPG")
        faults.plan(("GET", "cat/photo%201", "403"))

    manifest = write_dataset(ChangingSource(source_url, happens), str(tmp_path / "dataset"), max_bad=2)
    gone, refused = manifest.bad_samples
    assert (gone.key, refused.key) == ("cat/photo 0.v0.JPG", "cat/photo 1.v0.JPG")
    assert "cannot be read" in gone.reason
    assert "no such object" in gone.reason
    assert "access refused (AccessDenied" in refused.reason
    assert manifest.num_samples == 6
    assert verify_dataset(Store(str(tmp_path / "dataset")), deep=True) == []
    faults.plan(("GET", "cat/photo%201", "403"))
    with pytest.raises(SourceError, match=r"more bad files than --max-bad \(0\)(.|\n)*AccessDenied"):
        write_dataset(BucketSource(source_url), str(tmp_path / "another"))
    assert Store(str(tmp_path / "another")).list() == []


REFUSED: tuple[Action, ...] = ("403", "503")


@pytest.mark.parametrize("action", REFUSED)
def test_a_store_that_fails_altogether_stops_the_run(
    source_url: str, faults: Faults, tmp_path: Path, action: Action
) -> None:
    def happens() -> None:
        one, all_ = ("GET", "cat/photo%201"), ("GET", "list-type=2")
        faults.plan((*one, action), (*one, action), (*all_, action), (*all_, action))

    source = ChangingSource(source_url, happens, num_attempts=2)
    with pytest.raises(StoreError, match="gave up" if action == "503" else "access refused") as caught:
        write_dataset(source, str(tmp_path / "dataset"), max_bad=100)
    assert isinstance(caught.value, StoreRefusedError) == (action == "403")
    assert not (tmp_path / "dataset" / "manifest.json").exists()


@pytest.mark.parametrize("store_url", ["moto"], indirect=True)
def test_a_bucket_that_is_gone_stops_the_run(store_url: str, tmp_path: Path) -> None:
    client = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    client.call_s3("create_bucket", Bucket="short-lived")
    Store("s3://short-lived/in").write("a.jpg", b"x")

    def happens() -> None:
        client.call_s3("delete_object", Bucket="short-lived", Key="in/a.jpg")
        client.call_s3("delete_bucket", Bucket="short-lived")

    with pytest.raises(StoreNotFoundError, match="no such bucket"):
        write_dataset(ChangingSource("s3://short-lived/in", happens), str(tmp_path / "dataset"), max_bad=100)


@pytest.mark.parametrize("store_url", ["moto"], indirect=True)  # the other server has neither
def test_archived_objects_and_names_that_the_store_does_not_take(
    store_url: str, small_photos: Path, tmp_path: Path
) -> None:
    client = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    photo = (small_photos / "cat" / "photo 0.v0.JPG").read_bytes()
    bucket, _, folder = store_url.removeprefix("s3://").partition("/")
    for name, storage_class in (
        ("good", "STANDARD"),
        ("cold", "GLACIER"),
        ("/slash", "STANDARD"),
        ("a//b", "STANDARD"),
    ):
        key = f"{folder}/cat/{name}.jpg"
        client.call_s3("put_object", Bucket=bucket, Key=key, Body=photo, StorageClass=storage_class)
    manifest = write_dataset(BucketSource(store_url), str(tmp_path / "dataset"), max_bad=3)
    reasons = {sample.key: sample.reason for sample in manifest.bad_samples}
    assert set(reasons) == {"cat/cold.jpg", "cat//slash.jpg", "cat/a//b.jpg"}
    assert "restore the object" in reasons["cat/cold.jpg"]
    assert "without empty" in reasons["cat//slash.jpg"]
    assert (manifest.num_samples, manifest.classes) == (1, ("cat",))
