"""The goals of the step benchmark, and whether what was measured meets them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.peers.goals import Goal, Rows, ratio
from benchmarks.peers.step_rows import CROSS, LIMIT, OURS, SHALLOW, UNDER_RAY, WITH_MASKS

OF_LIMIT = {"fp32": 0.9, "bf16": 0.75}
TITLES = {"base": "ViT-B", "large": "ViT-L"}


def all_goals(rows: Rows) -> list[Goal]:
    """From the rows of all tables."""
    return [*peer_goals(rows), *limit_goals(rows), *paper_goals(rows), *loop_goals(rows)]


def peer_goals(rows: Rows) -> Iterator[Goal]:
    """Ours against the fastest and the smallest peer of the same size and precision."""
    for size, title in TITLES.items():
        for precision in OF_LIMIT:
            of_size = [row for row in rows if row["table"].startswith(f"{size}: ") and row["precision"] == precision]
            peers = [row for row in of_size if row["kind"] == "peer" and row["x_first"]]
            fastest = max(peers, key=lambda row: row["x_first"], default={"name": "no peer ran"})
            smallest = min(peers, key=lambda row: row["peak_bytes"], default={"name": "no peer ran"})
            ours = find(rows, smallest.get("table", ""), OURS, precision)
            what = f"{title} {precision}"
            memory = ratio(ours.get("peak_bytes"), smallest.get("peak_bytes"))
            yield Goal(f"{what}: x the fastest peer ({fastest['name']})", 1.0, ratio(1.0, fastest.get("x_first")))
            yield Goal(f"{what}: memory / the smallest peer's ({smallest['name']})", 1.0, memory, at_most=True)


def limit_goals(rows: Rows) -> Iterator[Goal]:
    """Achieved FLOP/s against those of the matrix products alone."""
    for size, title in TITLES.items():
        for precision, goal in OF_LIMIT.items():
            share = of_limit(rows, find(rows, f"{size}: limit", OURS, precision))
            yield Goal(f"{title} {precision}: of the matmul-only limit, FLOP/s", goal, share)


def of_limit(rows: Rows, row: dict[str, Any]) -> float | None:
    """A row's FLOP/s over those of the limit in the same table; None where there is none."""
    limit = find(rows, row.get("table", ""), LIMIT, row.get("precision", ""))
    flops = ratio(row.get("flops_per_image"), limit.get("flops_per_image"))
    speed = ratio(row.get("x_first"), limit.get("x_first"))
    return flops * speed if flops and speed else None


def paper_goals(rows: Rows) -> Iterator[Goal]:
    """What the paper claims for an encoder without mask tokens; what the cross decoder gains."""
    slow, ours = (find(rows, "large: encoder", name, "fp32") for name in (WITH_MASKS, OURS))
    shallow = find(rows, "large: decoder depth 1", SHALLOW, "fp32")
    yield Goal("ViT-L encoder without mask tokens against with, x in time", 2.5, ours.get("x_first"))
    kept = ratio(slow.get("saved_bytes"), ours.get("saved_bytes"))
    yield Goal("ViT-L encoder without mask tokens against with, x in activations", 2.5, kept)
    yield Goal("ViT-L with decoder depth 1 besides, x in time", 2.5, shallow.get("x_first"))
    for precision in OF_LIMIT:
        gained = find(rows, "base: decoder", CROSS, precision).get("x_first")
        yield Goal(f"ViT-B {precision}: cross decoder, x our own default", 1.4, gained)


def loop_goals(rows: Rows) -> Iterator[Goal]:
    """What a step takes longer under Ray Train and the loop than in a bare loop, by the clock and in CPU seconds.

    The second leaves out what Ray's own processes take of the same CPUs; where one is spared for them, so does the
    first.
    """
    for table, where in (("loop", "all CPUs"), ("loop, a CPU spared", "a CPU spared")):
        under_ray = find(rows, table, UNDER_RAY, "fp32")
        for key, what in (("x_first", "share of a step"), ("cpu_x_first", "share of a step's CPU time")):
            longer = ratio(1.0, under_ray.get(key))
            share = None if longer is None else longer - 1
            yield Goal(f"Ray Train and the loop, {where}: {what}", 0.03, share, at_most=True)


def find(rows: Rows, table: str, name: str, precision: str) -> dict[str, Any]:
    """A row; {} if there is none."""
    found = (row for row in rows if (row["table"], row["name"], row["precision"]) == (table, name, precision))
    return next(found, {})
