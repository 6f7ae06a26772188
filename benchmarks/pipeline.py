"""The data pipeline against its peers and against the limit, side by side in one run on the same cores.

    make bench-pipeline
    python -m benchmarks.pipeline --source FOLDER     your own photographs instead of ImageNet's
    python -m benchmarks.pipeline --quick             fewer images and rounds: does everything run?

Prints one table and writes build/bench/pipeline.json. docs/benchmarks.md says how to read it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.peers import datasets, goals, sharding
from benchmarks.peers.contender import Contender, ContenderError, Data, Round, Runner
from benchmarks.peers.contenders import CONTENDERS
from benchmarks.peers.report import machine, print_goals, say
from cluster.local_s3 import LocalS3Error, start_local_s3
from pipeline.sources import FolderSource
from pipeline.write import write_dataset

# Nothing heavy is imported up here: every process that is spawned imports this module.
RESULT = Path("build/bench/pipeline.json")
BUCKET = "bench"
PACKAGES = (
    "torch torchvision nvidia-dali-cuda130 nvidia-dali-cuda120 pillow webdataset mosaicml-streaming litdata spdl av "
    "torchdata s3fs"
)


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    num_images: int = 3000
    """An epoch's; the photographs are repeated, so that the ends of an epoch weigh little."""
    batch_size: int = 64
    num_rounds: int = 5
    num_sharded_images: int = 20_000
    """2.2 GB, so that the start of the processes weighs little, as with a dataset."""
    num_sharding_rounds: int = 3
    num_compared_images: int = 1000
    num_first_batches: int = 3


QUICK = Size(
    num_images=640,
    batch_size=32,
    num_rounds=2,
    num_sharded_images=640,
    num_sharding_rounds=1,
    num_compared_images=100,
    num_first_batches=2,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 0 whether goals are met or not, since a shared machine may miss them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="a folder of JPEG photographs, with or without class folders")
    parser.add_argument("--quick", action="store_true", help="fewer images and rounds")
    parser.add_argument("--rounds", type=int, help="timed rounds of each contender")
    parser.add_argument("--only", default="", help="contenders whose names have this in them; no goals")
    parser.add_argument("--result", type=Path, default=RESULT, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    size = QUICK if options.quick else Size()
    if options.rounds:
        size = replace(size, num_rounds=options.rounds)
    options.result.parent.mkdir(parents=True, exist_ok=True)
    log = options.result.with_suffix(".log")
    log.unlink(missing_ok=True)
    found = measure(options.source, size, options.only, log)
    print_report(found)
    options.result.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\nwritten to {options.result}; what the contenders said, to {log}")
    return 0


def measure(source: str | None, size: Size, only: str, log: Path) -> dict[str, Any]:
    """Everything, as the JSON file has it."""
    contenders = [contender for contender in CONTENDERS if only in contender.name]
    cpus = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="tarmac-bench-") as folder, ExitStack() as stack:
        work = Path(folder)
        say("collecting photographs")
        photos, what = datasets.find_photos(source, work)
        num_distinct = datasets.link_photos(photos, work / "images", num_images=size.num_images)
        forms = {contender.form for contender in contenders if contender.form}
        say("writing them as shards" + "".join(f", {form}" for form in sorted(forms)))
        data, failures = datasets.prepare(
            work / "images", work, log, forms, batch_size=size.batch_size, num_cpus=len(cpus)
        )
        if any(contender.needs_s3 for contender in contenders):
            data, failures["s3_dataset"] = stack.enter_context(s3_dataset(data, work))
        load_before = os.getloadavg()[0]
        rows = throughput(contenders, data, failures, size.num_rounds)
        first_batches = {
            contender.name: measured
            for contender in contenders
            if contender.first_batch and (measured := first_batch_times(contender, data, size.num_first_batches))
        }
        shard_speeds: dict[str, float] = {}
        differences: dict[str, float] = {}
        if not only:
            say("sharding")
            datasets.link_photos(photos, work / "sharded", num_images=size.num_sharded_images)
            s3_url = f"s3://{BUCKET}/sharded" if data.s3_dataset else None
            with environment(data.s3_environment):
                shard_speeds = sharding.measure(work / "sharded", work, s3_url, len(cpus), size.num_sharding_rounds)
            say("comparing pixels")
            differences = datasets.in_process("numerics:differences", data.log, data.folder, size.num_compared_images)
    found: list[goals.Goal] = []
    if not only:
        found += [*goals.speed_goals(rows), goals.resume_goal(first_batches)]
        found += [*goals.sharding_goals(shard_speeds), goals.numerics_goal(differences)]
    return {
        "machine": machine(len(cpus), load_before, PACKAGES.split()),
        "images": f"{what} ({num_distinct} distinct, {data.num_images} an epoch), {size.num_rounds} rounds",
        "rows": rows,
        "first_batch_s": first_batches,
        "sharding_mb_per_s": shard_speeds,
        "mean_absolute_difference_to_pil": differences,
        "goals": [goal.record() for goal in found],
    }


def throughput(contenders: list[Contender], data: Data, failures: dict[str, str], num_rounds: int) -> goals.Rows:
    """A row a contender: medians over rounds in turn, or the reason why there are none."""
    runners: dict[str, Runner] = {}
    reasons: dict[str, str] = {}
    rounds: dict[str, list[Round]] = {contender.name: [] for contender in contenders}
    with ExitStack() as stack:
        for contender in contenders:
            say(f"warming up {contender.name}")
            runner = stack.enter_context(Runner(contender, data))
            try:
                if reason := missing(contender, data, failures):
                    raise ContenderError(reason)
                runner.run("warm_up")
                runners[contender.name] = runner
            except ContenderError as error:
                reasons[contender.name] = str(error)
                runner.close()
        for number in range(num_rounds):
            for name in list(runners):
                say(f"round {number + 1} of {num_rounds}: {name}")
                try:
                    rounds[name].append(runners[name].run("round"))
                except ContenderError as error:
                    reasons[name] = f"in round {number + 1}: {error}"
                    runners.pop(name).close()
    return [row(contender, rounds[contender.name], reasons.get(contender.name)) for contender in contenders]


def row(contender: Contender, rounds: list[Round], reason: str | None) -> dict[str, Any]:
    """What the table and the JSON file say about a contender."""
    speeds = [] if reason else [found.images_per_s for found in rounds]
    costs = [] if reason else [found.images_per_cpu_s for found in rounds]
    return {
        "name": contender.name,
        "kind": contender.kind,
        "images_per_s": statistics.median(speeds) if speeds else None,
        "images_per_cpu_s": statistics.median(costs) if costs else None,
        "lowest_images_per_s": min(speeds, default=None),
        "highest_images_per_s": max(speeds, default=None),
        "output": contender.output,
        "how": contender.how,
        "not_measured": reason,
    }


def missing(contender: Contender, data: Data, failures: dict[str, str]) -> str | None:
    """Why a contender's data is not there, if so."""
    if contender.needs_s3 and not data.s3_dataset:
        return failures.get("s3_dataset", "no S3 server")
    return failures.get(contender.form) if contender.form else None


def first_batch_times(contender: Contender, data: Data, num_times: int) -> dict[str, float]:
    """Position in the epoch -> median seconds from nothing to the first batch; {} if it does not run."""
    parts = (0.0, 0.25, 0.5, 0.9) if contender.kind == "ours" else (0.0, 0.5)
    positions = {f"{part:.0%}": int(part * data.num_batches) for part in parts}
    times: dict[str, list[float]] = {name: [] for name in positions}
    with Runner(contender, data) as runner:
        say(f"first batch of {contender.name}")
        try:
            runner.run("first_batch", 0)  # imports
            for _ in range(num_times):
                for name, batch in positions.items():
                    times[name].append(runner.run("first_batch", batch))
        except ContenderError as error:
            say(f"  {error}")
            return {}
    return {name: statistics.median(taken) for name, taken in times.items()}


@contextmanager
def s3_dataset(data: Data, work: Path) -> Iterator[tuple[Data, str]]:
    """Data with the dataset on an S3 server of this machine too, or without it and why."""
    with ExitStack() as stack:
        try:
            server = stack.enter_context(start_local_s3(work / "s3"))
            server.make_bucket(BUCKET)
        except LocalS3Error as error:
            yield data, str(error)
            return
        say("writing them to the S3 server")
        url = f"s3://{BUCKET}/images"
        with environment(server.environment()):
            write_dataset(FolderSource(data.folder), url, shard_bytes=datasets.SHARD_BYTES, num_workers=data.num_cpus)
        yield replace(data, s3_dataset=url, s3_environment=server.environment()), ""


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def print_report(found: dict[str, Any]) -> None:
    """The table, for people."""
    place = found["machine"]
    print(f"\n{found['images']}, on {place['cpus']} CPUs ({place['model']}, load {place['load_before']} before)")
    print("RandomResizedCrop 224 bicubic with antialias, flip; medians, and the lowest and highest round\n")
    print(f"{'':<26}{'images/s':>9}{'lowest':>8}{'highest':>8}{'images/CPU-s':>14}  {'output':<21}how")
    for line in found["rows"]:
        if line["not_measured"]:
            print(f"{line['name']:<26}not measured: {line['not_measured']}")
            continue
        numbers = [line[name] for name in ("images_per_s", "lowest_images_per_s", "highest_images_per_s")]
        columns = "".join(f"{value:>{width}.0f}" for value, width in zip(numbers, (9, 8, 8), strict=True))
        print(f"{line['name']:<26}{columns}{line['images_per_cpu_s']:>14.0f}  {line['output']:<21}{line['how']}")
    print_section("seconds to the first batch, from the start and in the middle of an epoch", found["first_batch_s"])
    print_section("sharding, MB/s of images", {name: {"": v} for name, v in found["sharding_mb_per_s"].items()}, ".0f")
    pixels = {name: {"": v * 255} for name, v in found["mean_absolute_difference_to_pil"].items()}
    print_section("mean absolute difference to PIL's crops, in levels of 255", pixels, ".3f")
    print_goals(found["goals"])


def print_section(title: str, lines: dict[str, dict[str, float]], digits: str = ".3f") -> None:
    """A table of a few numbers a line; nothing if there are none."""
    if lines:
        print(f"\n{title}")
    for name, numbers in lines.items():
        print(f"  {name:<34}" + "".join(f"{label:>6} {value:>8{digits}}" for label, value in numbers.items()))


if __name__ == "__main__":
    sys.exit(main())
