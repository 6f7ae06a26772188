"""How many workers the cluster can hold: pure functions of what Ray says about its nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from cluster.config import JobConfig
from trainer.config import check_world

_ROUNDING = 1e-6
"""Ray counts resources in ten-thousandths."""
_PAUSE_S, _LONGEST_PAUSE_S = 30.0, 600.0


def worker_resources(job: JobConfig) -> dict[str, float]:
    """What one worker reserves."""
    needs = {"CPU": job.cpus_per_worker, "GPU": job.gpus_per_worker}
    return {kind: amount for kind, amount in needs.items() if amount > 0}


def num_fitting(
    nodes: Iterable[Mapping[str, Any]],
    free: Mapping[str, Mapping[str, float]],
    running: Iterable[str],
    need: Mapping[str, float],
) -> int:
    """Workers that fit, node by node, beside what else is there: in what is free, and where ours are already.

    Args:
        nodes: those that count, from `ray.nodes()`.
        free: what nobody has reserved, by the node's id.
        running: the node's id of each worker of ours; nodes that do not count may be among them.
        need: resources of one worker.
    """
    held = Counter(running)
    # Free resources are known late: just after a start they still have what ours took. A node holds no more than all.
    return sum(
        min(num_within(node["Resources"], need), num_within(free.get(node["NodeID"], {}), need) + held[node["NodeID"]])
        for node in nodes
    )


def num_within(resources: Mapping[str, float], need: Mapping[str, float]) -> int:
    """Workers that `resources` are enough for."""
    return min(int(resources.get(kind, 0.0) / amount + _ROUNDING) for kind, amount in need.items())


def world_within(job: JobConfig, num_workers: int) -> int | None:
    """The largest world size that the job may have with at most `num_workers` workers; None if there is none."""
    for size in range(min(num_workers, job.num_workers), job.least_workers - 1, -1):
        try:
            check_world(job.train, size)
        except ValueError:
            continue
        return size
    return None


class Refusals:
    """World sizes that Ray found no place for, although they seemed to fit: they are not asked for again at once.

    Not all that Ray goes by is seen here, and each try takes half a minute in which nothing trains. A size is tried
    again when another number of workers fits than did then, or after a pause that doubles with each refusal.
    Times are in seconds, of any clock that only goes forward.
    """

    def __init__(self) -> None:
        self._num = self._size = self._fitting = 0
        self._until = 0.0

    def note(self, size: int, fitting: int, now: float, *, found: bool) -> None:
        """Workers were asked for.

        Args:
            size: how many.
            fitting: how many seemed to fit.
            now: the time.
            found: whether Ray had a place for them.
        """
        if not found:
            self._num += 1
            self._size, self._fitting = size, fitting
            self._until = now + min(_LONGEST_PAUSE_S, _PAUSE_S * 2.0 ** (self._num - 1))
        elif size >= self._size:
            self._num, self._until = 0, now

    def most(self, fitting: int, now: float) -> int:
        """Of so many workers that fit, how many may be asked for."""
        if fitting != self._fitting:
            self._until = now
        return min(fitting, self._size - 1) if now < self._until else fitting

    def left_s(self, now: float) -> float:
        """Time until a size that was refused may be asked for again; 0 if none is held back."""
        return max(0.0, self._until - now)
