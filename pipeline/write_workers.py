"""Processes of this machine that write shards."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Generator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from types import TracebackType
from typing import Self

from pipeline.errors import SourceError
from pipeline.shards import Flag, ShardResult, ShardTask, ShardWriter


class WriteWorkers:
    """Worker processes, started at once: they import what they need while the source is still being listed."""

    def __init__(self, num_workers: int) -> None:
        """Start them.

        Args:
            num_workers: processes; 1 starts none, and `run` writes in this one.
        """
        self._num_workers = num_workers
        if num_workers == 1:
            return
        context = multiprocessing.get_context("spawn")
        self._stop = context.Event()
        self._inbox = context.SimpleQueue()
        self._told = False
        self._pool = ProcessPoolExecutor(num_workers, context, _start_worker, (self._inbox, self._stop))
        # A pool starts its processes with its first task.
        self._pool.submit(_nothing)

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def run(self, writer: ShardWriter, tasks: list[ShardTask]) -> Generator[ShardResult, None, None]:
        """Write the shards; results as they come, in any order. Once: at its end, or closed, the workers are too.

        Raises:
            SourceError: a worker process died.
        """
        if self._num_workers == 1:
            never = threading.Event()
            yield from (writer.run(task, never) for task in tasks)
            return
        self._tell(writer)
        waiting = iter(tasks)
        try:
            # Few at a time: a task holds the paths of all its images.
            running = {self._pool.submit(_run_in_worker, task) for task in islice(waiting, 2 * self._num_workers)}
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                running |= {self._pool.submit(_run_in_worker, task) for task in islice(waiting, len(done))}
                yield from (future.result() for future in done)
        except BrokenProcessPool as error:
            raise SourceError(
                f"a worker process died while it read {writer.source}: it was killed, or ran out of memory. Run the "
                f"same command again to go on from the finished shards, with fewer workers if memory is short"
            ) from error
        finally:
            self.close()

    def close(self) -> None:
        """Stop the shards in flight, which leave nothing visible, and end the processes."""
        if self._num_workers == 1:
            return
        self._stop.set()
        self._tell(None)
        self._pool.shutdown(cancel_futures=True)

    def _tell(self, writer: ShardWriter | None) -> None:
        if not self._told:
            self._told = True
            # Its labels may be more than a pipe holds, and a worker that was killed does not take them.
            threading.Thread(target=self._put, args=(writer,), daemon=True).start()

    def _put(self, writer: ShardWriter | None) -> None:
        for _ in range(self._num_workers):
            self._inbox.put(writer)


# Set once in each worker process, so that a task need not carry it.
_worker: tuple[ShardWriter, Flag] | None = None


def _start_worker(inbox: multiprocessing.SimpleQueue[ShardWriter | None], stop: Flag) -> None:
    global _worker  # noqa: PLW0603
    # Ctrl-C reaches the whole process group: the parent decides. If the parent is killed, nobody waits for us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    writer = inbox.get()
    if writer is not None:
        _worker = writer, stop


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _nothing() -> None:
    return


def _run_in_worker(task: ShardTask) -> ShardResult:
    assert _worker is not None
    writer, stop = _worker
    return writer.run(task, stop)
