"""The goals, and whether what was measured meets them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

Rows = list[dict[str, Any]]
"""Dicts of name, kind, images_per_s, images_per_cpu_s; the last two are None where a contender did not run."""


@dataclass(frozen=True)
class Goal:
    """`measured` is None where a part of it could not be measured; such a goal is missed."""

    name: str
    goal: float
    measured: float | None
    at_most: bool = False

    @property
    def met(self) -> bool:
        if self.measured is None:
            return False
        return self.measured <= self.goal if self.at_most else self.measured >= self.goal

    def record(self) -> dict[str, Any]:
        """For the JSON file."""
        return asdict(self) | {"met": self.met}


def speed_goals(rows: Rows) -> list[Goal]:
    """Ours against the PIL loader, the best peer, the limit, and itself from S3."""
    speeds = {row["name"]: row["images_per_s"] for row in rows}
    costs = {row["name"]: row["images_per_cpu_s"] for row in rows}
    ours, own_cost = speeds.get("tarmac, local disk"), costs.get("tarmac, local disk")
    ran = {row["name"]: float(row["images_per_s"]) for row in rows if row["kind"] == "peer" and row["images_per_s"]}
    best = max(ran, key=lambda name: ran[name], default="no peer ran")
    return [
        Goal("x torchvision's PIL DataLoader, images/s", 2.5, ratio(ours, speeds.get("torchvision, PIL"))),
        Goal(f"x the best peer ({best}), images/s", 1.4, ratio(ours, ran.get(best))),
        Goal("of the ROI-decode limit, images/s", 0.7, ratio(ours, speeds.get("limit: ROI decode alone"))),
        Goal("S3 against local disk, images/CPU-s", 0.8, ratio(costs.get("tarmac, S3"), own_cost)),
        Goal("S3 once cached against local disk, images/CPU-s", 0.99, ratio(costs.get("tarmac, S3, cached"), own_cost)),
    ]


def resume_goal(first_batches: dict[str, dict[str, float]]) -> Goal:
    """The slowest first batch in the middle of an epoch against the one at step 0.

    Args:
        first_batches: contender -> position -> seconds; the first position is the start.
    """
    times = list(first_batches.get("tarmac, local disk", {}).values())
    start, worst = (times[0], max(times[1:])) if len(times) > 1 else (None, None)
    return Goal("first batch in the middle of an epoch / at step 0", 1.5, ratio(worst, start), at_most=True)


def sharding_goals(speeds: dict[str, float]) -> list[Goal]:
    """Ours against ShardWriter and a plain copy, in MB/s."""
    disk, s3 = speeds.get("ours, to disk"), speeds.get("ours, to S3")
    return [
        Goal("sharding x a serial ShardWriter", 1.5, ratio(disk, speeds.get("ShardWriter, serial, to disk"))),
        Goal("sharding of a plain parallel copy, disk", 0.7, ratio(disk, speeds.get("plain copy, to disk"))),
        Goal("sharding of a plain parallel copy, S3", 0.7, ratio(s3, speeds.get("plain copy, to S3"))),
    ]


def numerics_goal(differences: dict[str, float]) -> Goal:
    """Mean absolute difference to PIL."""
    return Goal("mean absolute difference to PIL's crops", 1 / 255, differences.get("ours"), at_most=True)


def ratio(part: float | None, whole: float | None) -> float | None:
    """part / whole, None if either is missing."""
    return part / whole if part is not None and whole else None
