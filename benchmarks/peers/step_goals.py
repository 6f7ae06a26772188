"""The goals of the step benchmark, and whether what was measured meets them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.peers.goals import Goal, Rows, ratio
from benchmarks.peers.step_rows import BARE, CROSS, LIMIT, OURS, SHALLOW, UNDER_RAY, WITH_MASKS

OF_LIMIT = {"fp32": 0.9, "bf16": 0.75}
TITLES = {"base": "ViT-B", "large": "ViT-L"}


def all_goals(rows: Rows) -> list[Goal]:
    """From the rows of all tables."""
    return [*peer_goals(rows), *limit_goals(rows), *paper_goals(rows), *loop_goals(rows)]


def peer_goals(rows: Rows) -> Iterator[Goal]:
    """Ours against the fastest and the smallest peer of the same size and precision."""
    for table, title in TITLES.items():
        for precision in OF_LIMIT:
            ours = find(rows, table, OURS, precision)
            peers = [row for row in _of(rows, table, precision) if row["kind"] == "peer" and row["images_per_s"]]
            fastest = max(peers, key=lambda row: row["images_per_s"], default={"name": "no peer ran"})
            smallest = min(peers, key=lambda row: row["peak_bytes"], default={"name": "no peer ran"})
            what = f"{title} {precision}"
            speed = ratio(ours.get("images_per_s"), fastest.get("images_per_s"))
            memory = ratio(ours.get("peak_bytes"), smallest.get("peak_bytes"))
            yield Goal(f"{what}: x the fastest peer ({fastest['name']})", 1.0, speed)
            yield Goal(f"{what}: memory / the smallest peer's ({smallest['name']})", 1.0, memory, at_most=True)


def limit_goals(rows: Rows) -> Iterator[Goal]:
    """Achieved FLOP/s against those of the matrix products alone."""
    for table, title in TITLES.items():
        for precision, goal in OF_LIMIT.items():
            ours, limit = (find(rows, table, name, precision).get("flops_per_s") for name in (OURS, LIMIT))
            yield Goal(f"{title} {precision}: of the matmul-only limit, FLOP/s", goal, ratio(ours, limit))


def paper_goals(rows: Rows) -> Iterator[Goal]:
    """What the paper claims for an encoder without mask tokens; what the cross decoder gains."""
    ours, slow, shallow = (find(rows, "large", name, "fp32") for name in (OURS, WITH_MASKS, SHALLOW))
    speed, slow_speed = ours.get("images_per_s"), slow.get("images_per_s")
    yield Goal("ViT-L encoder without mask tokens against with, x in time", 2.5, ratio(speed, slow_speed))
    kept = ratio(slow.get("saved_bytes"), ours.get("saved_bytes"))
    yield Goal("ViT-L encoder without mask tokens against with, x in activations", 2.5, kept)
    faster = ratio(shallow.get("images_per_s"), slow_speed)
    yield Goal("ViT-L with decoder depth 1 besides, x in time", 2.5, faster)
    for precision in OF_LIMIT:
        cross, own = (find(rows, "base", name, precision).get("images_per_s") for name in (CROSS, OURS))
        yield Goal(f"ViT-B {precision}: cross decoder, x our own default", 1.4, ratio(cross, own))


def loop_goals(rows: Rows) -> Iterator[Goal]:
    """What a step takes longer under Ray Train and the loop than in a bare loop, by the clock and in CPU seconds.

    The second leaves out what Ray's own processes take of the same cores, and most of what the machine does meanwhile.
    """
    bare, under_ray = (find(rows, "loop", name, "fp32") for name in (BARE, UNDER_RAY))
    for key, what in (("images_per_s", "share of a step"), ("images_per_cpu_s", "share of a step's CPU time")):
        longer = ratio(bare.get(key), under_ray.get(key))
        share = None if longer is None else longer - 1
        yield Goal(f"Ray Train and the loop, {what}", 0.03, share, at_most=True)


def find(rows: Rows, table: str, name: str, precision: str) -> dict[str, Any]:
    """A row; {} if there is none."""
    return next((row for row in _of(rows, table, precision) if row["name"] == name), {})


def _of(rows: Rows, table: str, precision: str) -> Rows:
    return [row for row in rows if row["table"] == table and row["precision"] == precision]
