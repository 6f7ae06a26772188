"""How many workers the cluster can hold: pure functions of what Ray says about its nodes."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

from cluster.config import JobConfig
from trainer.config import check_world

_ROUNDING = 1e-6
"""Ray counts resources in ten-thousandths."""


def worker_resources(job: JobConfig) -> dict[str, float]:
    """What one worker reserves."""
    needs = {"CPU": job.cpus_per_worker, "GPU": job.gpus_per_worker}
    return {kind: amount for kind, amount in needs.items() if amount > 0}


def num_fitting(nodes: Iterable[Mapping[str, Any]], avoid: Container[str], need: Mapping[str, float]) -> int:
    """Workers that fit on all nodes together, were nothing else on them.

    Args:
        nodes: from `ray.nodes()`.
        avoid: ids of nodes that are about to go.
        need: resources of one worker.
    """
    usable = (node["Resources"] for node in nodes if node["Alive"] and node["NodeID"] not in avoid)
    return sum(num_within(resources, need) for resources in usable)


def num_after_loss(nodes: Iterable[Mapping[str, Any]], need: Mapping[str, float]) -> int:
    """Workers that fit, were nothing else on the nodes, once the one that holds most of them is gone."""
    fitting = [num_within(node["Resources"], need) for node in nodes]
    return sum(fitting) - max(fitting, default=0)


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
