"""The demo's view of a run from outside, and its hold over processes."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.demo_run import RunWatcher, StepError, Terminal, stop
from pipeline.store import Store
from trainer.metrics import EventLog


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    yield process
    process.kill()
    process.wait()


def write_attempt(run: Store, attempt: int, first_step: int, losses: list[float], **start: Any) -> None:
    store = run.child(f"attempts/{attempt:04d}")
    EventLog(store).add("start", step=first_step, **start)
    lines = [
        f'{{"step": {first_step + 1 + i}, "loss": {loss}, "images_per_s": 9.0}}\n' for i, loss in enumerate(losses)
    ]
    store.write("metrics-000000.jsonl", "".join(lines).encode())


def test_watcher_sees_steps_the_kill_and_the_resume(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    run = Store(str(tmp_path / "run"))
    write_attempt(run, 1, 0, [2.0] * 6 + [1.5] * 4, pids=[1, sleeper.pid])
    watcher = RunWatcher(run.url)
    watcher.refresh()
    assert (watcher.last_step, watcher.num_attempts, watcher.resumed_from) == (10, 1, None)

    assert watcher.kill_worker(rank=1) == sleeper.pid
    assert sleeper.wait(10) == -signal.SIGKILL
    assert watcher.killed_at == [10]
    assert watcher.recovery() == "It has not resumed."

    write_attempt(run, 2, 8, [1.0] * 7, pids=[3, 4])
    watcher.refresh()
    assert (watcher.last_step, watcher.num_attempts, watcher.resumed_from) == (15, 2, 8)
    assert watcher.recovery() == "It resumed from step 8 after 0 s; 2 steps were done again."
    assert watcher.loss_at_start() == 2.0
    assert watcher.loss_at_end() == 1.0
    assert [record["loss"] for record in watcher.records][8:10] == [1.0, 1.0], "the later attempt counts"


def test_a_run_without_records_has_no_loss(tmp_path: Path) -> None:
    watcher = RunWatcher(str(tmp_path / "run"))
    watcher.refresh()
    assert (watcher.last_step, watcher.describe()) == (0, "starting")
    with pytest.raises(StepError, match="no records"):
        watcher.loss_at_end()


def test_stop_ends_a_process_that_ignores_interrupts() -> None:
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        stop(process, timeout_s=0.2)
        assert process.returncode == -signal.SIGKILL


def test_screen_and_log_both_have_the_steps_and_tenths_of_progress(tmp_path: Path) -> None:
    screen = StringIO()
    with Terminal(tmp_path / "log", Console(file=screen, width=200)) as terminal:
        terminal.title("Photographs")
        terminal.say("[not markup] s3://demo/photos")
        with terminal.progress("photographs", 20) as update:
            for done in range(21):
                update(done, "")
    for text in (screen.getvalue(), (tmp_path / "log").read_text()):
        assert "1. Photographs" in text
        assert "[not markup] s3://demo/photos" in text
        assert text.count("photographs ") == 10
