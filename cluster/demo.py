"""The whole way in one command: photographs to a trained MAE on local S3 and local Ray, killed halfway.

Run by `make demo`. Nothing here is special to the demo but the photographs and the kill: every step is a `tarmac`
command that a user would type, and is shown as such.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

from cluster.demo_photos import write_demo_photos
from cluster.demo_run import RunWatcher, StepError, Terminal
from cluster.local_s3 import runs_juicefs, start_local_s3
from pipeline.dataset import open_dataset
from trainer import recipes
from trainer.config import num_steps

BUCKET = "demo"
RECIPE = "demo"
DATASET = f"s3://{BUCKET}/photos"
RUN = f"s3://{BUCKET}/runs/first"
PICTURE = ("--num-samples", "6", "--seed", "5")
RESULTS = ("loss.png", "report.html", "reconstruction.png")
LOSS_GOAL = 0.8  # of the loss at the start


def main() -> int:
    """Run the demo and return its exit code: 0 done, 1 something did not hold, 130 interrupted."""
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, _interrupt)
    out: Path = arguments.out
    console = Console()
    try:
        prepare_folder(out)
        with Terminal(out / "demo.log", console) as terminal:
            return run_demo(terminal, out, arguments.source, arguments.num_photos)
    except StepError as error:
        console.print(f"[red]{error}[/red]\nThe whole log is in {out / 'demo.log'}.", highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted; the server and the cluster are stopped.")
        return 130


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.demo",
        description="Photographs -> S3 -> Ray -> a kill -> a trained MAE and its pictures, on this machine.",
    )
    parser.add_argument("--source", type=Path, help="folder of your own images instead of the built-in photographs")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="where everything is put")
    parser.add_argument("--num-photos", type=int, default=2000, help="photographs to make without --source")
    return parser.parse_args()


def run_demo(terminal: Terminal, out: Path, source: Path | None, num_photos: int) -> int:
    """Every step, in order.

    Returns:
        0, or 1 if the run did not do what it should.
    """
    started = time.monotonic()
    terminal.title("Photographs")
    photos = source or make_photos(terminal, out / "photos", num_photos)
    terminal.say(f"Images: {photos}")
    with start_local_s3(out / "s3") as server:
        os.environ.update(server.environment())
        server.make_bucket(BUCKET)
        terminal.title(f"A local S3 server ({server.endpoint})")
        terminal.say("It speaks S3 over HTTP as a cloud does; every path from here on is an s3:// URL.")
        make_dataset(terminal, photos, max_bad=0 if source is None else 100)
        watcher = train_and_kill(terminal)
        terminal.title("Pictures")
        terminal.tarmac("curve", RUN, "--out", str(out / "loss.png"))
        terminal.tarmac("report", RUN, "--out", str(out / "report.html"))
        terminal.tarmac("reconstruct", RUN, "--data", DATASET, "--out", str(out / "reconstruction.png"), *PICTURE)
        return summarise(terminal, out, photos, watcher, time.monotonic() - started)


def prepare_folder(out: Path) -> None:
    """Empty the folder of an earlier demo; refuse one that holds anything else."""
    if out.is_dir() and any(out.iterdir()):
        if not (out / "demo.log").is_file():
            raise StepError(f"--out {out} holds files that no demo made; give an empty folder")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)


def make_photos(terminal: Terminal, folder: Path, num_photos: int) -> Path:
    """Cut the built-in photographs into JPEG files."""
    terminal.say(f"Cutting {num_photos:,} JPEGs out of the photographs that scikit-image and scikit-learn ship.")
    with terminal.progress("photographs", num_photos) as update:
        for written in write_demo_photos(folder, num_photos):
            update(written, "")
    return folder


def make_dataset(terminal: Terminal, photos: Path, max_bad: int) -> None:
    """Shard the images into the bucket and check what arrived."""
    terminal.title("Shards: images -> tar files, index and manifest in the bucket")
    options = ("--num-workers", "2", "--shard-bytes", str(8 * 2**20), "--max-bad", str(max_bad))
    terminal.tarmac("shard", str(photos), DATASET, *options)
    terminal.tarmac("verify", DATASET)


def train_and_kill(terminal: Terminal) -> RunWatcher:
    """Pretrain on two Ray workers; kill one of them halfway; wait until the run has finished by itself."""
    terminal.title("Pretraining on two Ray workers, and a SIGKILL halfway")
    recipe = recipes.get(RECIPE)
    total = num_steps(recipe, open_dataset(DATASET).num_samples)
    kill_at = total // 2 + recipe.checkpoint.every_steps // 2  # between two checkpoints: there is something to lose
    watcher, told = RunWatcher(RUN), False
    command = ("pretrain", RECIPE, "--data", DATASET, "--run", RUN, "--num-workers", "2", "--log.flush-s", "2")
    with terminal.background(*command) as process, terminal.progress("pretraining", total) as update:
        while process.poll() is None:
            watcher.refresh()
            update(watcher.last_step, watcher.describe())
            if not watcher.killed_at and watcher.last_step >= kill_at:
                pid = watcher.kill_worker(rank=1)
                terminal.say(f"KILL: SIGKILL to rank 1 (process {pid}) at step {watcher.last_step} of {total}.")
            if watcher.resumed_from is not None and not told:
                told = True
                terminal.say(f"RESUME: no one did anything. {watcher.recovery()}")
            time.sleep(2)
        watcher.refresh()
        update(watcher.last_step, watcher.describe())
    if process.returncode != 0:
        raise StepError(f"`tarmac pretrain` ended with exit code {process.returncode}:\n{terminal.log_tail()}")
    return watcher


def summarise(terminal: Terminal, out: Path, photos: Path, watcher: RunWatcher, elapsed_s: float) -> int:
    """Print what was made and where, and whether it holds."""
    first, last = watcher.loss_at_start(), watcher.loss_at_end()
    checks = {
        f"loss {first:.3f} -> {last:.3f}, {last / first:.0%} of its start (goal: below {LOSS_GOAL:.0%})": last
        < LOSS_GOAL * first,
        f"{watcher.num_attempts} attempts: the kill was survived. {watcher.recovery()}": watcher.num_attempts >= 2
        and watcher.resumed_from is not None,
        "the pictures and the report are there": all((out / name).is_file() for name in RESULTS),
    }
    terminal.title(f"Done in {elapsed_s / 60:.1f} minutes" if all(checks.values()) else "Something did not hold")
    terminal.show(_made(out, photos))
    for text, holds in checks.items():
        terminal.say(f"{'ok  ' if holds else 'FAIL'} {text}")
    terminal.say(_again(out))
    return 0 if all(checks.values()) else 1


def _made(out: Path, photos: Path) -> Table:
    manifest = open_dataset(DATASET).manifest
    table = Table()
    table.add_column("What", no_wrap=True)
    table.add_column("Where", overflow="fold")
    table.add_column("About it")
    table.add_row("images", str(photos), "the source")
    table.add_row(
        "dataset",
        DATASET,
        f"{manifest.num_samples:,} images, {len(manifest.shards)} shards, {manifest.num_bytes / 1e6:.0f} MB",
    )
    table.add_row("run", RUN, "config, checkpoints, one record a step, events")
    table.add_row("loss curve", str(out / "loss.png"), "")
    table.add_row("report", str(out / "report.html"), "where every second went")
    table.add_row("reconstruction", str(out / "reconstruction.png"), "masked | reconstruction | original")
    table.add_row("log", str(out / "demo.log"), "every command, the kill and the resume")
    return table


def _again(out: Path) -> str:
    if not runs_juicefs():
        return "The bucket was in memory and is gone: the server that keeps it on disk does not run on this machine."
    return (
        f"The bucket stays in {out / 's3'}. This starts its server again and prints the variables to set:\n"
        f"   $ {sys.executable} -m cluster.local_s3 {out / 's3'} --bucket {BUCKET}\n"
        f"   $ tarmac inspect {DATASET} --grid grid.png"
    )


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
