"""A contender of the pipeline benchmark: a process of its own that delivers batches, and what it costs.

All contenders are opened first and each runs one warm epoch; then they are asked for one round after the other, in
turn, so that whatever else the machine does hits all alike.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# Batches that are not timed: at first, what a loader had ready before it was asked; at last, workers that run dry.
LEAD_BATCHES = 8
TAIL_BATCHES = 4
ROUND_TIMEOUT_S = 300.0
CLOSE_TIMEOUT_S = 5.0

Epoch = Callable[[], Iterator[int]]
"""Runs an epoch; yields the number of images of each batch as it arrives."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """The same images in every form that a contender reads. Paths are absolute."""

    folder: str
    """`class/name.jpg`."""
    dataset: str
    """Written by `tarmac shard`: also the tars and `.idx` files of webdataset and DALI."""
    mds: str
    litdata: str
    s3_dataset: str
    ffmpeg: str
    """Folders with FFmpeg's libraries, for SPDL."""
    log: str
    """Where everything goes that the contenders print."""
    num_images: int
    batch_size: int
    num_cpus: int
    s3_environment: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def num_batches(self) -> int:
        """Whole batches an epoch."""
        return self.num_images // self.batch_size

    def tars(self) -> list[str]:
        """The shards, in order."""
        return sorted(str(path) for path in Path(self.dataset).glob("*.tar"))


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A row of the table."""

    name: str
    output: str
    """What a batch is made of."""
    how: str
    open: str
    """`module:function` in this folder; the function makes an Epoch from Data."""
    first_batch: str | None = None
    """Likewise; from Data and a batch number to a callable that makes a loader and takes the batch of that number."""
    kind: str = "peer"
    """`peer`, `ours`, or `limit`."""
    form: str | None = None
    """Field of Data with the form that it reads, if it is one that only this contender needs."""
    needs_ffmpeg: bool = False
    needs_s3: bool = False


@dataclass(frozen=True)
class Round:
    """One timed run through part of an epoch."""

    images_per_s: float
    images_per_cpu_s: float


class ContenderError(Exception):
    """A contender does not run, and why."""


class Runner:
    """A contender's process. Use `close`, or as a context manager."""

    def __init__(self, contender: Contender, data: Data) -> None:
        self.contender, self._data = contender, data
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        # Not daemonic: data loaders have worker processes.
        self._process = context.Process(target=_serve, args=(contender, data, theirs), name=contender.name)
        with ExitStack() as stack:
            for name, value in _environment(contender, data).items():
                stack.callback(_restore, name, os.environ.get(name))
                os.environ[name] = value
            self._process.start()
        theirs.close()

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, method: str, *arguments: Any) -> Any:
        """Call a method of `_Server` over there. Raises ContenderError with its reason."""
        try:
            self._connection.send((method, arguments))
            if not self._connection.poll(ROUND_TIMEOUT_S):
                raise ContenderError(f"no answer within {ROUND_TIMEOUT_S:.0f} s")
            found, reason = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(5)
            raise ContenderError(f"its process ended (exit code {self._process.exitcode})") from error
        if reason is not None:
            raise ContenderError(reason)
        return found

    def close(self) -> None:
        """End the process and what it started."""
        self._connection.close()
        self._process.join(CLOSE_TIMEOUT_S)
        if self._process.pid is not None:
            with suppress(ProcessLookupError):  # workers may be left even when it has ended
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.join()


class _Server:
    def __init__(self, contender: Contender, data: Data) -> None:
        self._contender, self._data = contender, data
        self._epoch: Epoch | None = None

    def warm_up(self) -> None:
        self._epoch = load(self._contender.open)(self._data)
        self.round()

    def round(self) -> Round:
        assert self._epoch is not None
        return timed(self._epoch(), self._data.num_batches)

    def first_batch(self, batch: int) -> float:
        """Seconds from nothing to the batch of that number."""
        assert self._contender.first_batch is not None
        make = load(self._contender.first_batch)(self._data, batch)
        gc.collect()  # the loaders before it, whose workers may take seconds to end
        started = time.perf_counter()
        loader = make()
        elapsed = time.perf_counter() - started
        if hasattr(loader, "close"):
            loader.close()
        return elapsed


def timed(batches: Iterator[int], num_batches: int) -> Round:
    """Run through `batches` to their end; times those between the lead and the tail.

    Raises:
        ContenderError: fewer batches than there should be.
    """
    lead, tail = min(LEAD_BATCHES, num_batches // 4), min(TAIL_BATCHES, num_batches // 8)
    num_images = number = 0
    started = stopped = started_cpu = stopped_cpu = 0.0
    for number, size in enumerate(batches, start=1):
        if number == lead:
            started_cpu, started = tree_cpu_s(os.getpid()), time.perf_counter()
        elif lead < number <= num_batches - tail:
            num_images += size
            if number == num_batches - tail:
                stopped, stopped_cpu = time.perf_counter(), tree_cpu_s(os.getpid())
    if number < num_batches:
        raise ContenderError(f"an epoch had {number} batches instead of {num_batches}")
    return Round(num_images / (stopped - started), num_images / max(stopped_cpu - started_cpu, 1e-9))


def tree_cpu_s(root: int) -> float:
    """CPU seconds, user and system, of a process, its descendants, and those of them that ended.

    Source: proc(5), /proc/pid/stat.
    """
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                # The second field, the name, is in brackets and may hold anything.
                fields = (path / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it ended meanwhile
                continue
            parents[int(path.name)] = int(fields[1])
            ticks[int(path.name)] = sum(int(value) for value in fields[11:15])
    ours = {root}
    while added := {pid for pid, parent in parents.items() if parent in ours and pid not in ours}:
        ours |= added
    return sum(ticks.get(pid, 0) for pid in ours) / os.sysconf("SC_CLK_TCK")


def redirect_output(log: str) -> None:
    """Append what this process and its children print to a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def load(name: str) -> Callable[..., Any]:
    """The function `module:function` of this folder."""
    module, _, function = name.partition(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(f"{__package__}.{module}"), function)
    return loaded


def _serve(contender: Contender, data: Data, connection: Connection) -> None:
    os.setpgid(0, 0)  # so that all of it can be ended at once
    redirect_output(data.log)
    # A spawned process hands "spawn" on; data loaders start their workers the platform's own way.
    multiprocessing.set_start_method(None, force=True)
    server = _Server(contender, data)
    while True:
        try:
            method, arguments = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            connection.send((getattr(server, method)(*arguments), None))
        except Exception as error:
            print(f"{contender.name}:", file=sys.stderr)
            traceback.print_exc()
            connection.send((None, _one_line(error)))


def _one_line(error: Exception) -> str:
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:300]}"


def _environment(contender: Contender, data: Data) -> dict[str, str]:
    if contender.needs_s3:
        return data.s3_environment
    if contender.needs_ffmpeg and data.ffmpeg:
        return {"LD_LIBRARY_PATH": f"{data.ffmpeg}:{os.environ.get('LD_LIBRARY_PATH', '')}".rstrip(":")}
    return {}


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
