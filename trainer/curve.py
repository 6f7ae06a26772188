"""The loss curve of a run as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

LOSS, RATE, RESTART = "#1f5aa6", "#5a7d3a", "#c8502d"


def draw_loss_curve(
    records: Sequence[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
    path: str | Path,
) -> None:
    """Draw loss and learning rate over the steps of a run, restarts marked, as a PNG.

    Args:
        records: one a step, with `step`, `loss` and `lr`; in any order.
        events: of the run; every attempt's `start` but the first marks a restart at its `step`.
        path: the file to write.

    Raises:
        ValueError: there are no records.
    """
    if not records:
        raise ValueError("a loss curve needs at least one record; has the run completed a step?")
    records = sorted(records, key=lambda record: record["step"])
    steps = np.array([record["step"] for record in records])
    loss = np.array([record["loss"] for record in records], dtype=float)
    rate = np.array([record["lr"] for record in records], dtype=float)

    figure = Figure(figsize=(9, 5.5), dpi=120, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    _draw_loss(above, steps, loss)
    below.plot(steps, rate, color=RATE, linewidth=1.6)
    below.set_ylabel("learning rate")
    below.set_xlabel("step (optimizer updates)")
    below.set_ylim(bottom=0)
    _mark_restarts((above, below), events)
    for axes in (above, below):
        axes.grid(color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    above.legend(frameon=False, loc="upper right")
    figure.savefig(path, format="png")


def _draw_loss(axes: Axes, steps: npt.NDArray[np.int64], loss: npt.NDArray[np.float64]) -> None:
    window = max(1, len(loss) // 40)
    if window == 1:
        axes.plot(steps, loss, color=LOSS, linewidth=1.6, marker="o", markersize=3, label="loss")
    else:
        axes.plot(steps, loss, color=LOSS, linewidth=0.8, alpha=0.35, label="loss of each step")
        smooth = np.convolve(loss, np.full(window, 1 / window), mode="valid")
        middle = steps[(window - 1) // 2 :][: len(smooth)]
        axes.plot(middle, smooth, color=LOSS, linewidth=1.8, label=f"mean of {window} steps")
    axes.set_ylabel("loss (mean over removed patches)")
    tail = loss[-window:]
    if math.isfinite(loss[0]) and np.isfinite(tail).all():
        axes.set_title(f"Loss {loss[0]:.3f} at step {steps[0]}, {tail.mean():.3f} at step {steps[-1]}", loc="left")


def _mark_restarts(panels: Sequence[Axes], events: Sequence[Mapping[str, Any]]) -> None:
    restarts = restart_steps(events)
    for axes in panels:
        for i, step in enumerate(restarts):
            label = f"restart ({len(restarts)})" if i == 0 else None
            axes.axvline(step, color=RESTART, linewidth=1.2, linestyle="--", label=label)


def restart_steps(events: Sequence[Mapping[str, Any]]) -> list[int]:
    """The step that each attempt but the first began from."""
    return [int(event["step"]) for event in events if event["event"] == "start"][1:]
