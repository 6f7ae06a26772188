"""Running `tarmac` commands, and watching a run from outside through what it writes to its bucket.

Used by the demo and by tests/chaos/verify_resume.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pipeline.store import Store
from trainer.metrics import Event, StepRecord, read_events, read_metrics

NUM_LOSSES = 5  # averaged at either end of the run
STOP_TIMEOUT_S = 8.0


class StepError(Exception):
    """A command failed, or the run did not do what it should."""


class Terminal:
    """Numbered steps on the screen, and everything, with the commands' output, in a log file."""

    def __init__(self, log: Path, console: Console) -> None:
        self.console = console
        self._path = log
        self._log = log.open("a", encoding="utf-8")
        self._num_titles = 0

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:
            self._write(f"{kind.__name__ if kind else ''}: {error}")
        self._log.close()

    def title(self, text: str) -> None:
        """Start the next numbered step."""
        self._num_titles += 1
        self.console.print(f"\n[bold]{self._num_titles}. {text}[/bold]", highlight=False)
        self._write(f"== {self._num_titles}. {text}")

    def say(self, text: str) -> None:
        """One line on the screen and in the log."""
        self.console.print(f"   {text}", highlight=False, markup=False, soft_wrap=True)
        self._write(text)

    def show(self, table: RenderableType) -> None:
        """A table on the screen and in the log."""
        self.console.print(table)
        Console(file=self._log, width=120).print(table)

    def tarmac(self, *arguments: str) -> None:
        """Run one `tarmac` command to its end, its output on the screen.

        Raises:
            StepError: it ended with a non-zero exit code.
        """
        self.say("$ " + " ".join(("tarmac", *arguments)))
        with _started(arguments, subprocess.PIPE) as process:
            assert process.stdout is not None
            for line in process.stdout:
                self.say("  " + line.decode(errors="replace").rstrip())
        if process.returncode != 0:
            raise StepError(f"`tarmac {arguments[0]}` ended with exit code {process.returncode}")

    @contextlib.contextmanager
    def background(self, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run a `tarmac` command beside us, its output in the log; stopped when the block is left."""
        self.say("$ " + " ".join(("tarmac", *arguments)))
        self._log.flush()
        with _started(arguments, self._log) as process:
            yield process

    @contextlib.contextmanager
    def progress(self, name: str, total: int) -> Iterator[Callable[[int, str], None]]:
        """A progress bar, or, where the screen is no terminal, a line each tenth of the way."""
        if not self.console.is_terminal:
            yield self._plain_progress(name, total)
            return
        columns = (TextColumn("   " + name), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=self.console) as bar:
            task = bar.add_task(name, total=total, note="")
            yield lambda done, note: bar.update(task, completed=done, note=note)

    def log_tail(self, num_lines: int = 30) -> str:
        """The last lines of the log."""
        self._log.flush()
        return "\n".join(self._path.read_text(errors="replace").splitlines()[-num_lines:])

    def _plain_progress(self, name: str, total: int) -> Callable[[int, str], None]:
        shown = 0

        def update(done: int, note: str) -> None:
            nonlocal shown
            if done * 10 // total > shown:
                shown = done * 10 // total
                self.say(f"{name} {done}/{total} {note}")

        return update

    def _write(self, text: str) -> None:
        self._log.write(f"{time.strftime('%H:%M:%S')} {text}\n")
        self._log.flush()


@contextlib.contextmanager
def _started(arguments: tuple[str, ...], stdout: Any) -> Iterator[subprocess.Popen[bytes]]:
    # Its own session: a Ctrl-C reaches only us, and we can end it with everything that it started.
    command = [str(Path(sys.executable).with_name("tarmac")), *arguments]
    # On this machine, whatever cluster the user has: processes are killed by their ids here.
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(
        command, env=environment, stdout=stdout, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        yield process
        process.wait()
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes], timeout_s: float = STOP_TIMEOUT_S) -> None:
    """End a command that still runs, and everything in its session; one that has ended is left as it is."""
    if process.poll() is not None:
        return
    for _ in range(2):  # `tarmac pretrain` saves a checkpoint at the first interrupt, and ends at once at the second
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout_s)
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class _PartsReadOnce(Store):
    """A run's store that reads each part of its records once: a part never changes, and there are many."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._parts: dict[str, bytes] = {}

    def read(self, path: str) -> bytes:
        """The whole object."""
        if "/metrics-" not in path:
            return super().read(path)
        if path not in self._parts:
            self._parts[path] = super().read(path)
        return self._parts[path]


class RunWatcher:
    """What a run has written so far, seen from outside."""

    def __init__(self, run: str) -> None:
        self._store = _PartsReadOnce(run)
        self.records: list[StepRecord] = []
        self.events: list[Event] = []
        self.killed_at: list[int] = []
        """Steps at which we killed a process, by the records that had been written."""
        self._kill_time = 0.0
        self._attempts_at_kill = 0

    def refresh(self) -> None:
        """Read the run's records and events."""
        self.records = read_metrics(self._store)
        self.events = read_events(self._store)

    @property
    def last_step(self) -> int:
        """Newest step that a record was written of."""
        return max((record["step"] for record in self.records), default=0)

    @property
    def starts(self) -> list[Event]:
        """The `start` event of every attempt, oldest first."""
        return [event for event in self.events if event["event"] == "start"]

    @property
    def num_attempts(self) -> int:
        """Attempts that have begun."""
        return len(self.starts)

    def kill_worker(self, rank: int) -> int:
        """SIGKILL the process of a rank of the newest attempt, as a lost machine would end it.

        Returns:
            The process's id.
        """
        pid = int(next(event for event in reversed(self.events) if "pids" in event)["pids"][rank])
        os.kill(pid, signal.SIGKILL)
        self.killed_at.append(self.last_step)
        self._kill_time = time.time()
        self._attempts_at_kill = self.num_attempts
        return pid

    @property
    def resumed_from(self) -> int | None:
        """Step of the checkpoint that the attempt after the kill began from; None until it has begun."""
        if not self.killed_at or self.num_attempts <= self._attempts_at_kill:
            return None
        return int(self.starts[self._attempts_at_kill]["step"])

    def recovery(self) -> str:
        """What the kill cost, in words."""
        if self.resumed_from is None:
            return "It has not resumed."
        seconds = float(self.starts[self._attempts_at_kill]["time"]) - self._kill_time
        lost = max(self.killed_at[-1] - self.resumed_from, 0)
        return f"It resumed from step {self.resumed_from} after {seconds:.0f} s; {lost} steps were done again."

    def describe(self) -> str:
        """The newest record in words."""
        if not self.records:
            return "starting"
        newest = self.records[-1]
        return f"loss {newest['loss']:.3f}, {newest['images_per_s']:.0f} images/s"

    def loss_at_start(self) -> float:
        """Mean loss of the first steps."""
        return _mean(self.records[:NUM_LOSSES])

    def loss_at_end(self) -> float:
        """Mean loss of the last steps."""
        return _mean(self.records[-NUM_LOSSES:])


def _mean(records: list[StepRecord]) -> float:
    if not records:
        raise StepError("the run has written no records")
    return sum(record["loss"] for record in records) / len(records)
