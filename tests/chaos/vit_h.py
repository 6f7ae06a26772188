"""ViT-H/14 for real, on one machine: three steps, a checkpoint to S3, a kill, a resume, three more.

Run by `make vit-h`; needs 24 GiB of memory and 20 GB of disk. Two Ray workers share the 657 million parameters (FSDP2).
What it took goes to the screen and to build/vit-h/summary.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from cluster.demo_photos import write_demo_photos
from cluster.demo_run import RunWatcher, StepError, Terminal
from cluster.local_s3 import start_local_s3
from tests.chaos.verify_resume import BUCKET, DATASET

RUN = f"s3://{BUCKET}/runs/vit-h"
NUM_STEPS, KILL_AFTER = 6, 3
POLL_S = 0.5
NUM_PHOTOS = 200


def main() -> int:
    """Run it. Returns 0 if the run was killed, resumed and finished, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.vit_h", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/vit-h"))
    parser.add_argument("--global-batch-size", type=int, default=8)
    parser.add_argument("--recipe", default="mae_huge_1600ep")
    arguments = parser.parse_args()
    out: Path = arguments.out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    console = Console()
    try:
        with Terminal(out / "vit-h.log", console) as terminal, start_local_s3(out / "s3") as server:
            os.environ.update(server.environment())
            server.make_bucket(BUCKET)
            for _ in write_demo_photos(out / "photos", NUM_PHOTOS):
                pass
            terminal.tarmac("shard", str(out / "photos"), DATASET, "--num-workers", "2")
            watcher, peaks = train(terminal, arguments.recipe, arguments.global_batch_size)
            report(terminal, out, arguments, watcher, peaks)
    except StepError as error:
        console.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        return 1
    finally:
        shutil.rmtree(out / "s3", ignore_errors=True)  # gigabytes
    return 0


def train(terminal: Terminal, recipe: str, global_batch_size: int) -> tuple[RunWatcher, dict[int, int]]:
    """Pretrain with a kill on the way; what was seen, and each worker's largest resident memory by process id."""
    watcher, peaks, killed = RunWatcher(RUN), dict[int, int](), False
    options = {
        "num-workers": 2,
        "data.global-batch-size": global_batch_size,
        "data.num-lanes": global_batch_size,
        "data.decode-device": "cpu",
        "data.num-decode-threads": 1,
        "parallel.precision": precision(),
        "optim.num-steps": NUM_STEPS,
        "checkpoint.every-steps": KILL_AFTER,
        "log.every-steps": 1,
        "log.flush-s": 1,
    }
    words = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    # A copy of the shards for saving beside training would be 8 GB more, processes that wait 2 GB.
    words += ["--checkpoint.no-asynchronous", "--no-standby"]
    command = ("pretrain", recipe, "--data", DATASET, "--run", RUN, *words)
    with terminal.background(*command) as process, terminal.progress("vit-h", NUM_STEPS) as update:
        while process.poll() is None:
            watcher.refresh()
            update(watcher.last_step, watcher.describe())
            for start in watcher.starts:
                peaks |= {pid: peak for pid in start["pids"] if (peak := peak_bytes(pid))}
            if not killed and any(event["event"] == "save" for event in watcher.events):
                killed = True
                pid = watcher.kill_worker(rank=1)
                terminal.say(f"KILL: SIGKILL to the worker of rank 1 (process {pid}) after step {watcher.last_step}.")
            time.sleep(POLL_S)
    watcher.refresh()
    if process.returncode != 0:
        raise StepError(f"`tarmac pretrain` ended with {process.returncode}:\n{terminal.log_tail()}")
    if watcher.resumed_from is None or watcher.last_step != NUM_STEPS:
        raise StepError(f"it did not resume: {watcher.recovery()}")
    return watcher, peaks


def precision() -> str:
    """bf16, as the recipe has it, if the CPU has instructions for it (avx512 or amx): it is 40 times slower without."""
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"


def peak_bytes(pid: int) -> int:
    """The largest resident memory of a process so far; 0 if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def report(
    terminal: Terminal, out: Path, arguments: argparse.Namespace, watcher: RunWatcher, peaks: dict[int, int]
) -> None:
    """The table, and summary.json."""
    saves = [event for event in watcher.events if event["event"] == "save"]
    summary = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs",
        "recipe": arguments.recipe,
        "global_batch_size": arguments.global_batch_size,
        "precision": precision(),
        "losses": [record["loss"] for record in watcher.records],
        "step_s": [record["step_s"] for record in watcher.records],
        "peak_worker_bytes": max(peaks.values()),
        "checkpoint_bytes": saves[0]["num_bytes"],
        "save_s": [event["seconds"] for event in saves],
        "recovery": watcher.recovery(),
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    table = Table("What", "Measured")
    table.add_row("precision", summary["precision"])
    table.add_row("loss", ", ".join(f"{loss:.4f}" for loss in summary["losses"]))
    table.add_row("step, s", ", ".join(f"{seconds:.1f}" for seconds in summary["step_s"]))
    table.add_row("largest worker, resident", f"{summary['peak_worker_bytes'] / 2**30:.1f} GiB")
    table.add_row("checkpoint", f"{summary['checkpoint_bytes'] / 1e9:.2f} GB")
    table.add_row("save, s", ", ".join(f"{seconds:.0f}" for seconds in summary["save_s"]))
    table.add_row("the kill", watcher.recovery())
    terminal.show(table)


if __name__ == "__main__":
    sys.exit(main())
