"""Curves and bars as coordinates for the report's SVG: no more points than a screen has columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.ticker import MaxNLocator

from cluster.ledger import KINDS, Ledger
from trainer.step_columns import Floats

WIDTH, HEIGHT = 1000.0, 240.0
"""Of a chart, in SVG's units; the page stretches it."""
_NUM_COLUMNS = 400
_NUM_TICKS = 5


@dataclass(frozen=True)
class Tick:
    """A mark on an axis."""

    percent: float
    """From the left, or from the top."""
    label: str


@dataclass(frozen=True)
class Chart:
    """One curve over the steps."""

    title: str
    line: str
    """SVG path of the mean of each column."""
    band: str
    """SVG path around least and greatest; empty where every step has its own column."""
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    marks: list[float]
    """Restarts, in percent from the left."""
    summary: str


@dataclass(frozen=True)
class Slice:
    """A stretch of the run's time with one account on top of others, in percent of the picture."""

    kind: str
    left: float
    width: float
    top: float
    height: float


def draw_chart(
    title: str,
    steps: npt.NDArray[np.int64],
    values: Floats,
    *,
    restarts: list[int],
    label: Callable[[float], str],
    from_zero: bool = True,
) -> Chart | None:
    """A curve, or None if no value is a number.

    Args:
        title: what is drawn.
        steps: in order.
        values: one a step; what is not finite leaves a gap.
        restarts: steps to mark.
        label: how a value is written.
        from_zero: whether the axis begins at 0.
    """
    if not np.isfinite(values).any():
        return None
    x, mean, least, greatest = _thin_out(steps, values)
    low, high = _range(mean, from_zero)
    at_x = _scale(float(steps[0]), float(steps[-1]), 0.0, WIDTH)
    at_y = _scale(low, high, HEIGHT, 0.0)
    band = "" if len(x) == len(steps) else _band(at_x(x), *(at_y(side.clip(low, high)) for side in (greatest, least)))
    first, last = (float(mean[np.isfinite(mean)][i]) for i in (0, -1))
    return Chart(
        title=title,
        line=_path(at_x(x), at_y(mean)),
        band=band,
        x_ticks=_ticks(float(steps[0]), float(steps[-1]), lambda value: f"{value:,.0f}", whole=True),
        y_ticks=[Tick(100.0 - tick.percent, tick.label) for tick in _ticks(low, high, label)],
        marks=[float(at_x(np.array([step]))[0]) / WIDTH * 100 for step in restarts if steps[0] <= step <= steps[-1]],
        summary=f"{label(first)} at first, {label(last)} at last",
    )


def draw_time(ledger: Ledger) -> list[Slice]:
    """The run's time from left to right, in columns that show how each one was spent."""
    if not ledger.wall_s:
        return []
    edges = np.concatenate([ledger.rows[0].edges[:1], *(row.edges[1:] for row in ledger.rows)])
    kinds = np.concatenate([row.kinds for row in ledger.rows])
    columns = np.linspace(edges[0], edges[-1], _NUM_COLUMNS + 1)
    spent = np.stack(
        [
            np.diff(np.interp(columns, edges, np.concatenate([[0.0], np.cumsum(np.diff(edges) * (kinds == kind))])))
            for kind in range(len(KINDS))
        ]
    )
    shares = (spent / spent.sum(axis=0)).round(2)  # [kinds, columns]
    changes = np.flatnonzero((np.diff(shares, axis=1) != 0).any(axis=0)) + 1
    slices = []
    for begin, end in zip([0, *changes], [*changes, _NUM_COLUMNS], strict=True):
        top = 0.0
        for kind, share in zip(KINDS, shares[:, begin].tolist(), strict=True):
            if share > 0:
                width = (end - begin) / _NUM_COLUMNS * 100
                slices.append(Slice(kind, begin / _NUM_COLUMNS * 100, width, top * 100, share * 100))
                top += share
    return slices


def _thin_out(steps: npt.NDArray[np.int64], values: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Step, mean, least and greatest of each column; nan where no value is a number."""
    starts = np.unique(np.linspace(0, len(steps), _NUM_COLUMNS, endpoint=False).astype(np.int64))
    is_number = np.isfinite(values)
    count = np.add.reduceat(is_number.astype(float), starts)
    empty = count == 0
    mean = np.add.reduceat(np.where(is_number, values, 0.0), starts) / np.where(empty, 1.0, count)
    least = np.minimum.reduceat(np.where(is_number, values, np.inf), starts)
    greatest = np.maximum.reduceat(np.where(is_number, values, -np.inf), starts)
    sizes = np.diff([*starts, len(steps)])
    x = np.add.reduceat(steps.astype(float), starts) / sizes
    mean, least, greatest = (np.where(empty, np.nan, one) for one in (mean, least, greatest))
    return x, mean, least, greatest


def _range(mean: Floats, from_zero: bool) -> tuple[float, float]:
    low, high = (0.0 if from_zero else float(np.nanmin(mean))), float(np.nanmax(mean))
    margin = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
    return low - (0.0 if from_zero else margin), high + margin


def _scale(low: float, high: float, at_low: float, at_high: float) -> Callable[[Floats], Floats]:
    span = high - low or 1.0
    return lambda values: at_low + (values - low) / span * (at_high - at_low)


def _ticks(low: float, high: float, label: Callable[[float], str], whole: bool = False) -> list[Tick]:
    span = high - low or 1.0
    places = map(float, MaxNLocator(_NUM_TICKS, integer=whole).tick_values(low, high))
    return [Tick((place - low) / span * 100, label(place)) for place in places if low <= place <= high]


def _path(x: Floats, y: Floats) -> str:
    """A line through the points, broken where one is not a number. A point by itself is a line of no length."""
    words, pen_down = [], False
    for left, top in zip(x.tolist(), y.tolist(), strict=True):
        if np.isnan(top):
            pen_down = False
            continue
        words.append(f"{'L' if pen_down else 'M'}{left:.1f} {top:.1f}" + ("" if pen_down else "h0"))
        pen_down = True
    return "".join(words)


def _band(x: Floats, upper: Floats, lower: Floats) -> str:
    known = np.isfinite(upper)
    there = [f"{left:.1f} {top:.1f}" for left, top in zip(x[known], upper[known], strict=True)]
    back = [f"{left:.1f} {top:.1f}" for left, top in zip(x[known][::-1], lower[known][::-1], strict=True)]
    return f"M{'L'.join(there + back)}Z"
