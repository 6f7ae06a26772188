"""A cluster that has Ray alone: `tarmac submit` has it install the pinned environment, and the run goes to its end.

Run by `make submit-pinned`. The head runs in a virtual environment of its own with `ray[default]` and nothing of ours.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from pathlib import Path

import ray
from rich.console import Console

from cluster.demo_run import StepError, Terminal
from cluster.run_state import read_state
from pipeline.store import Store
from tests.chaos.verify_resume import find_photos
from tests.ray_head import RayHead

OUT = Path("build/submit-pinned")
PINS = Path(__file__).parents[2] / "constraints.txt"
NUM_STEPS = 20


def main() -> int:
    """Run it. Returns 0 if both jobs finished."""
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    console = Console()
    with Terminal(OUT / "submit-pinned.log", console) as terminal:
        try:
            submit_twice(terminal)
        except StepError as error:
            console.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
            return 1
    return 0


def submit_twice(terminal: Terminal) -> None:
    """The first job makes the environment, the second finds it."""
    terminal.title("A head with Ray alone")
    python = make_python(terminal)
    terminal.title("Dataset")
    dataset = str((OUT / "dataset").absolute())
    terminal.tarmac("shard", str(find_photos(terminal, OUT, num_photos=60)), dataset, "--num-workers", "2")
    with RayHead(num_cpus=2, python=python) as head:
        os.environ |= head.client_environment()
        for title in ("A job, which installs", "Another job, which finds it installed"):
            terminal.title(title)
            run = OUT.absolute() / title.partition(" ")[0].lower()
            took_s = timed(lambda run=run: submit(terminal, head.address, dataset, run))
            state = read_state(Store(run.as_uri()))
            if (state.state, state.step) != ("finished", NUM_STEPS):
                raise StepError(f"the run is {state.state} at step {state.step}: {state.reason}")
            terminal.say(f"finished after {took_s:.0f} s")


def make_python(terminal: Terminal) -> Path:
    """A Python that has Ray in our version and, as is checked, no PyTorch."""
    folder = (OUT / "ray-alone").absolute()
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    terminal.say(f"installing ray[default]=={ray.__version__} into {folder}")
    install = [python, "-m", "pip", "install", "--quiet", "--constraint", PINS, f"ray[default]=={ray.__version__}"]
    if subprocess.run(install, check=False).returncode != 0:
        raise StepError("pip could not install Ray")
    if subprocess.run([python, "-c", "import torch"], stderr=subprocess.DEVNULL, check=False).returncode == 0:
        raise StepError(f"{python} has PyTorch, so nothing would be shown")
    return python


def submit(terminal: Terminal, address: str, dataset: str, run: Path) -> None:
    urls = ("--data", dataset, "--run", str(run), "--address", address)
    small = (
        *("--data.global-batch-size", "12", "--data.num-lanes", "6", "--data.augment.image-size", "64", "64"),
        *("--model.embed-dim", "32", "--model.depth", "2", "--model.num-heads", "2", "--parallel.precision", "fp32"),
        *("--optim.num-steps", str(NUM_STEPS), "--checkpoint.every-steps", "7"),
    )
    terminal.tarmac("submit", "demo", *urls, *small, "--num-workers", "2", "--wait")


def timed(do: Callable[[], object]) -> float:
    """Seconds that it took."""
    began = time.monotonic()
    do()
    return time.monotonic() - began


if __name__ == "__main__":
    sys.exit(main())
