"""Shards written by tasks of a Ray cluster, wherever it has CPUs. Same plan, same bytes as on one machine."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Generator
from itertools import islice
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.options import CommandError, UsageError
from cluster.ray_access import check_access
from pipeline.shards import ShardResult, ShardTask, ShardWriter

_MAX_RETRIES = 5
"""Of a task whose node or process dies. It leaves nothing visible, and another one writes the same bytes."""
_TASKS_A_CPU = 2
_CHECK_S = 60.0
_CONNECT_S = 10.0


class RayTasks:
    """Runs `pipeline.write`'s tasks on a cluster: what `write_dataset` takes as `run_tasks`.

    Credentials are each node's own, from the standard chains. Tarmac has to be installed on the nodes.

    Args:
        address: of the cluster, as `ray.init` takes it.
        num_workers: tasks at once; None takes as many as the cluster has CPUs.
        paths: local paths that all nodes must have, those of source and dataset.

    Raises:
        CommandError: the cluster does not answer.
        UsageError: it is on another machine, and is used or open without a token.
    """

    def __init__(self, address: str, num_workers: int | None, paths: list[str]) -> None:
        self._address, self._num_workers, self._paths = address, num_workers, paths

    def __call__(self, writer: ShardWriter, tasks: list[ShardTask]) -> Generator[ShardResult, None, None]:
        """Results as they come. Closing ends the tasks in flight."""
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            _check_listens(self._address)
            check_access(self._address)
            ray.init(address=self._address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError, RuntimeError) as error:
            raise CommandError(
                f"the Ray cluster at {self._address} does not answer ({error}); check --address, or leave it out to "
                "write here"
            ) from error
        try:
            self._check_paths()
            yield from self._run(writer, tasks)
        finally:
            ray.shutdown()

    def _run(self, writer: ShardWriter, tasks: list[ShardTask]) -> Generator[ShardResult, None, None]:
        shared, waiting = ray.put(writer), iter(tasks)
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        at_once = self._num_workers or max(int(resources.get("CPU", 1)), 1)
        # Few more than can run: a task holds the paths of all its images.
        most = at_once if self._num_workers else _TASKS_A_CPU * at_once
        running = [_write_shard.remote(shared, task) for task in islice(waiting, most)]
        try:
            while running:
                done, running = ray.wait(running, num_returns=1)
                running += [_write_shard.remote(shared, task) for task in islice(waiting, len(done))]
                for reference in done:
                    yield _result(reference)
        finally:
            for reference in running:
                ray.cancel(reference, force=True)

    def _check_paths(self) -> None:
        """Raise UsageError if a node lacks one of the local paths."""
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]  # type: ignore[no-untyped-call]
        for node in nodes if self._paths else []:
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            absent = ray.get(_absent_paths.options(scheduling_strategy=here).remote(self._paths), timeout=_CHECK_S)
            if absent:
                raise UsageError(
                    f"{absent[0]} is not on node {node['NodeManagerHostname']} ({node['NodeManagerAddress']}); put it "
                    "where all nodes of the cluster see it, for example in a bucket, or leave --address out"
                )


@ray.remote(num_cpus=1, max_retries=_MAX_RETRIES)
def _write_shard(writer: ShardWriter, task: ShardTask) -> ShardResult:
    return writer.run(task, threading.Event())


@ray.remote(num_cpus=0)
def _absent_paths(paths: list[str]) -> list[str]:
    return [path for path in paths if not os.path.exists(path)]


def _check_listens(address: str) -> None:
    """Raise OSError if nothing listens at `host:port`: Ray would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()


def _result(reference: Any) -> ShardResult:
    """A task's result; its own error where it raised one."""
    try:
        result: ShardResult = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise CommandError(
            f"a shard could not be written on the cluster: {str(error).splitlines()[0]}; run the same command again to "
            "go on from the finished shards"
        ) from error
    return result
