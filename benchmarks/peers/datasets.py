"""The photographs, and the same photographs in every form that a contender reads."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import re
import tarfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.peers.contender import Data, load, redirect_output
from cluster.demo_photos import write_demo_photos
from pipeline.sources import FolderSource, open_source
from pipeline.write import write_dataset

NUM_DEMO_PHOTOS = 1000
SHARD_BYTES = 32 * 2**20


def find_photos(source: str | None, work: Path) -> tuple[Path, str]:
    """A folder of photographs, and what they are: the user's, ImageNet's 1,000 where they are, or the demo's."""
    if source is not None:
        return Path(source), f"the images of {Path(source).name}"
    beside_checkout = Path(__file__).parents[3] / "shared" / "data"
    archive = Path(os.environ.get("TARMAC_TEST_DATA", beside_checkout)) / "imagenet-samples.tar"
    folder = work / "photos"
    if archive.is_file():
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        return folder, "1,000 ImageNet photographs"
    for _ in write_demo_photos(folder, NUM_DEMO_PHOTOS, os.cpu_count() or 1):
        pass
    return folder, f"{NUM_DEMO_PHOTOS} demo photographs"


def link_photos(photos: Path, folder: Path, *, num_images: int) -> int:
    """Links to the JPEGs as `class/copy_name`, over and over until there are `num_images`; how many distinct ones."""
    refs = [ref for ref in open_source(str(photos)).scan().refs if ref.path.lower().endswith((".jpg", ".jpeg"))]
    if not refs:
        raise SystemExit(f"{photos} has no JPEG files; the benchmark compares JPEG pipelines")
    for number in range(num_images):
        copy, at = divmod(number, len(refs))
        path = folder / f"class{max(refs[at].label, 0):05d}" / f"{copy:03d}_{Path(refs[at].path).name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to((photos / refs[at].path).absolute())
    return min(len(refs), num_images)


def prepare(
    folder: Path, work: Path, log: Path, forms: set[str], *, batch_size: int, num_cpus: int
) -> tuple[Data, dict[str, str]]:
    """Write our dataset and the `forms`; also why a form could not be written, by the name of its field in Data."""
    images = [(str(path), int(path.parent.name.removeprefix("class"))) for path in sorted(folder.glob("*/*"))]
    data = Data(
        folder=str(folder),
        dataset=str(work / "tarmac"),
        mds=str(work / "mds"),
        litdata=str(work / "litdata"),
        s3_dataset="",
        ffmpeg=link_ffmpeg(work / "ffmpeg"),
        log=str(log.absolute()),
        num_images=len(images),
        batch_size=batch_size,
        num_cpus=num_cpus,
    )
    shard_bytes = min(SHARD_BYTES, sum(os.path.getsize(path) for path, _ in images) // 4 + 1)
    write_dataset(FolderSource(data.folder), data.dataset, shard_bytes=shard_bytes, num_workers=num_cpus)
    failures = {}
    for name in sorted(forms):
        try:
            in_process(f"streaming_loaders:write_{name}", data.log, images, getattr(data, name), num_cpus)
        except Exception as error:
            failures[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return data, failures


def in_process(name: str, log: str, *arguments: Any) -> Any:
    """Call `module:function` of this folder in a fresh process; what it prints goes to the log."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), redirect_output, (log,)) as pool:
        return pool.submit(_call, name, *arguments).result()


def link_ffmpeg(folder: Path) -> str:
    """Links to the FFmpeg libraries in PyAV's wheel, under the names that SPDL looks for; "" without PyAV.

    SPDL takes the system's FFmpeg, and many machines have none. The wheel's libraries are FFmpeg's with a hash in
    their names.
    """
    spec = importlib.util.find_spec("av")
    if spec is None or spec.origin is None:
        return ""
    bundled = Path(spec.origin).parents[1] / "av.libs"
    folder.mkdir()
    for library in bundled.glob("lib*.so*"):
        if found := re.match(r"(lib(?:av|sw)[a-z]+)-[0-9a-f]+\.so\.(\d+)", library.name):
            (folder / f"{found[1]}.so.{found[2]}").symlink_to(library)
    return f"{folder}:{bundled}"


def _call(name: str, *arguments: Any) -> Any:
    return load(name)(*arguments)
