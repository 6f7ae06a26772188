"""Two runs of one recipe, one of them killed twice: are losses, samples and final weights the same bits?

Run by `make verify-resume`. The undisturbed run and the killed one train on the same shards in a local S3 bucket with
two Ray workers. A worker is killed by SIGKILL at a third of the steps, the driver at two thirds; after that the same
command is given again, as a person would.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from cluster.demo_photos import write_demo_photos
from cluster.demo_run import RunWatcher, StepError, Terminal
from cluster.local_s3 import start_local_s3
from pipeline.store import Store

BUCKET = "verify-resume"
DATASET = f"s3://{BUCKET}/photos"
UNDISTURBED, KILLED = f"s3://{BUCKET}/runs/undisturbed", f"s3://{BUCKET}/runs/killed"
POLL_S = 2.0


def main() -> int:
    """Run the comparison.

    Returns:
        0 if everything is identical, 1 otherwise.
    """
    arguments = parse_arguments()
    out: Path = arguments.out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    console = Console()
    try:
        with Terminal(out / "verify-resume.log", console) as terminal, start_local_s3(out / "s3") as server:
            os.environ.update(server.environment())
            server.make_bucket(BUCKET)
            return compare_runs(terminal, arguments)
    except StepError as error:
        console.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        return 1


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.verify_resume", description=__doc__)
    parser.add_argument("--source", type=Path, help="tar or folder of images; default: the 1,000 ImageNet photographs")
    parser.add_argument("--out", type=Path, default=Path("build/verify-resume"))
    parser.add_argument("--recipe", default="imagenet_tiny")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--checkpoint-every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--global-batch-size", type=int, help="default: the recipe's")
    parser.add_argument("--num-lanes", type=int, help="default: the recipe's")
    parser.add_argument("--num-photos", type=int, default=1000, help="demo photographs where ImageNet's are missing")
    return parser.parse_args()


def compare_runs(terminal: Terminal, arguments: argparse.Namespace) -> int:
    """Shard, train twice, compare."""
    terminal.title("Dataset")
    source = arguments.source or find_photos(terminal, arguments.out, arguments.num_photos)
    terminal.tarmac("shard", str(source), DATASET, "--num-workers", "2", "--shard-bytes", str(16 * 2**20))
    terminal.tarmac("verify", DATASET, "--deep")

    terminal.title("The undisturbed run")
    undisturbed = train(terminal, arguments, UNDISTURBED, [])

    terminal.title("The same run, killed twice")
    kills = [
        Kill(arguments.steps // 3, "worker of rank 1", kill_worker),
        Kill(2 * arguments.steps // 3, "driver", kill_driver),
    ]
    killed = train(terminal, arguments, KILLED, kills)

    terminal.title("Comparison")
    return report(terminal, arguments.steps, undisturbed, killed)


def find_photos(terminal: Terminal, out: Path, num_photos: int) -> Path:
    """The ImageNet photographs of TARMAC_TEST_DATA, or else demo photographs."""
    folder = Path(os.environ.get("TARMAC_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
    tar = folder / "imagenet-samples.tar"
    if tar.is_file():
        return tar
    terminal.say(f"{tar} is missing (TARMAC_TEST_DATA names its folder): using {num_photos} demo photographs instead.")
    for _ in write_demo_photos(out / "photos", num_photos):
        pass
    return out / "photos"


@dataclass(frozen=True)
class Kill:
    """A process to kill once a step has been recorded."""

    step: int
    what: str
    kill: Callable[[RunWatcher, Any], int]

    def is_due(self, step: int, checkpoint_every: int) -> bool:
        """Whether to kill now: past `self.step`, and well past a checkpoint, so that there is something to lose."""
        in_between = step % checkpoint_every >= checkpoint_every // 2
        return (step >= self.step and in_between) or step >= self.step + checkpoint_every


def kill_worker(watcher: RunWatcher, process: Any) -> int:
    """SIGKILL rank 1. Returns its process id."""
    return watcher.kill_worker(rank=1)


def kill_driver(watcher: RunWatcher, process: Any) -> int:
    """SIGKILL the `tarmac pretrain` process. Returns its process id."""
    process.kill()
    watcher.killed_at.append(watcher.last_step)
    return int(process.pid)


def train(terminal: Terminal, arguments: argparse.Namespace, run: str, kills: list[Kill]) -> RunWatcher:
    """Pretrain to the end, with `kills` on the way; after the driver's death the command is given again."""
    watcher, pending, driver_killed = RunWatcher(run), list(kills), True
    while driver_killed:
        driver_killed = False
        command = pretrain_command(arguments, run)
        with terminal.background(*command) as process, terminal.progress(run, arguments.steps) as update:
            while process.poll() is None:
                watcher.refresh()
                update(watcher.last_step, watcher.describe())
                if pending and pending[0].is_due(watcher.last_step, arguments.checkpoint_every):
                    kill = pending.pop(0)
                    driver_killed = kill.kill is kill_driver
                    pid = kill.kill(watcher, process)
                    terminal.say(f"KILL: SIGKILL to the {kill.what} (process {pid}) at step {watcher.last_step}.")
                time.sleep(POLL_S)
        if process.returncode != 0 and not driver_killed:
            raise StepError(f"`tarmac pretrain` ended with {process.returncode}:\n{terminal.log_tail()}")
    watcher.refresh()
    if pending:
        raise StepError(f"the run ended before the {pending[0].what} could be killed; give more --steps")
    return watcher


def pretrain_command(arguments: argparse.Namespace, run: str) -> list[str]:
    """The command of either run; only the run's URL differs."""
    command = ["pretrain", arguments.recipe, "--data", DATASET, "--run", run]
    options = {
        "num-workers": arguments.num_workers,
        "optim.num-steps": arguments.steps,
        "checkpoint.every-steps": arguments.checkpoint_every,
        "log.every-steps": 1,
        "log.flush-s": 2,
        "data.global-batch-size": arguments.global_batch_size,
        "data.num-lanes": arguments.num_lanes,
    }
    return command + [part for name, value in options.items() if value for part in (f"--{name}", str(value))]


def report(terminal: Terminal, steps: int, undisturbed: RunWatcher, killed: RunWatcher) -> int:
    """Print the comparison.

    Returns:
        0 if all is identical, 1 otherwise.
    """
    table = Table("What", "Undisturbed", "Killed twice", "Identical")
    table.add_row("attempts", str(undisturbed.num_attempts), str(killed.num_attempts), "")
    table.add_row("killed at step", "", ", ".join(map(str, killed.killed_at)), "")
    table.add_row("resumed from step", "", ", ".join(str(start["step"]) for start in killed.starts[1:]), "")
    results = [_row(table, steps, undisturbed, killed, name) for name in ("loss", "sample_ids_digest")]
    ours, theirs = final_tensors(UNDISTURBED, steps), final_tensors(KILLED, steps)
    different = different_tensors(ours, theirs)
    results.append(bool(ours) and not different)
    counts = (f"{len(tensors)} tensors, {_numel(tensors):,} values" for tensors in (ours, theirs))
    table.add_row("final checkpoint", *counts, f"{len(ours) - len(different)} of {len(ours)}")
    terminal.show(table)
    results.append(killed.num_attempts >= 3)
    for name in different[:10]:
        terminal.say(f"differs: {name}")
    same = all(results)
    terminal.say("Bit for bit the same run." if same else "The runs DIFFER, or a kill did not start a new attempt.")
    return 0 if same else 1


def _row(table: Table, steps: int, undisturbed: RunWatcher, killed: RunWatcher, name: str) -> bool:
    ours, theirs = ({row["step"]: row[name] for row in map(dict, run.records)} for run in (undisturbed, killed))
    wanted = range(1, steps + 1)
    same = sum(step in ours and ours.get(step) == theirs.get(step) for step in wanted)
    ends = (f"{len(column)} steps, last {column.get(steps)}" for column in (ours, theirs))
    table.add_row(name, *ends, f"{same} of {steps}")
    return same == steps and len(ours) == len(theirs) == steps


def final_tensors(run: str, steps: int) -> dict[str, torch.Tensor]:
    """Every tensor of a run's last checkpoint, weights and optimizer state, read by PyTorch's own converter."""
    store = Store(run).child(f"checkpoints/step_{steps:09d}")
    names = [entry.path for entry in store.list()]
    if "commit.json" not in names:
        raise StepError(f"{store} has no commit.json: the run's last step was not committed")
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            (Path(folder) / name).write_bytes(store.read(name))
        whole = Path(folder) / "whole.pt"
        dcp_to_torch_save(folder, whole)
        return flatten(torch.load(whole, weights_only=True))


def flatten(tree: Any, path: str = "") -> dict[str, torch.Tensor]:
    """The tensors of nested dicts and lists, by their path."""
    if isinstance(tree, torch.Tensor):
        return {path: tree}
    if isinstance(tree, dict):
        items: Any = tree.items()
    elif isinstance(tree, (list, tuple)):
        items = enumerate(tree)
    else:
        return {}
    return {name: leaf for key, value in items for name, leaf in flatten(value, f"{path}/{key}").items()}


def different_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are missing on one side or differ in any bit."""
    same = {
        name
        for name in ours.keys() & theirs.keys()
        if ours[name].dtype == theirs[name].dtype
        and ours[name].shape == theirs[name].shape
        and _bits(ours[name]) == _bits(theirs[name])
    }
    return sorted((ours.keys() | theirs.keys()) - same)


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _numel(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


if __name__ == "__main__":
    sys.exit(main())
