"""The console of a run: one live line, and one line for each event a human cares about."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from cluster.options import duration, shortage
from cluster.relay import News

_PLAIN_EVERY_S = 10.0
"""Where the console is a file or a pipe, a plain line this often."""


_ERROR_CHARS = 160


class RunProgress:
    """Shows what `launch` hears. A context manager: the live line is there while it is open."""

    def __init__(self, console: Console, num_steps: int) -> None:
        """Args: console: where to; num_steps: of the whole run, for the bar and the time left."""
        self._console = console
        self._num_steps = num_steps
        self._live = Live(console=console, refresh_per_second=4, transient=True, redirect_stdout=False)
        self._last: dict[str, Any] | None = None
        self._printed = 0.0
        self._step_s = 0.0

    def __enter__(self) -> RunProgress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.stop()
        if self._last is not None:
            self._print(self._last)

    def show(self, news: News) -> None:
        """Take what came in since the last call."""
        for event in news.events:
            self._show_event(event)
        for record in news.records:
            step_s = float(record["step_s"])
            self._step_s = step_s if self._step_s == 0 else 0.9 * self._step_s + 0.1 * step_s
            self._last = record
            if record["skipped"]:
                found = f"loss {record['loss']:g}, gradient norm {record['grad_norm']:g}"
                self._say(f"step {record['step']} was skipped: {found}; its samples are in the events", "yellow")
        if self._last is None or not news.records:
            return
        if self._console.is_terminal:
            self._live.update(self._line(self._last))
        elif time.monotonic() - self._printed >= _PLAIN_EVERY_S:
            self._printed = time.monotonic()
            self._print(self._last)

    def _show_event(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "attempt":
            self._show_attempt(event)
        elif kind == "damage":
            self._say(f"checkpoint damaged, walked past: {escape(event['path'])}: {escape(event['reason'])}", "yellow")
        elif kind == "quarantined":
            self._say(_quarantined(event), "yellow")
        elif kind == "lost":
            after = "" if self._last is None else f" after step {self._last['step']}"
            self._say(f"workers were lost{after}: {_short(event['error'])}", "yellow")
        elif kind == "notice":
            self._say(_notice(event), "yellow")
        elif kind == "ended" and event["outcome"] == "resized":
            self._say("there is room for more workers: saved, and starting again with them", "green")
        elif kind == "validation":
            scores = ", ".join(f"top-{k} {event[f'val_top{k}']:.2%}" for k in (1, 5))
            self._say(f"epoch {event['epoch']:.2f}: {scores} of {event['val_num_samples']:,} images", "green")
        elif kind == "waiting":
            self._say(f"waiting: {shortage(event)}", "yellow")
        elif kind == "stopping":
            self._say(f"{event['signal']}: saving a checkpoint, then stopping; once more to stop at once", "yellow")

    def _show_attempt(self, event: dict[str, Any]) -> None:
        workers = _counted(event["world_size"], "worker")
        where = "from the start" if event["step"] == 0 else f"from the checkpoint of step {event['step']}"
        again = ""
        if self._last is not None and self._last["step"] > event["step"]:
            again = f"; resumed by itself, {_counted(self._last['step'] - event['step'], 'step')} again"
        self._say(f"attempt {event['attempt']}: {workers}, {where}{again}", "green")

    def _say(self, message: str, style: str) -> None:
        stamp = time.strftime("%H:%M:%S")
        # Not wrapped: one line an event, in a file too.
        self._console.print(f"[dim]{stamp}[/dim] [{style}]{message}[/{style}]", highlight=False, soft_wrap=True)

    def _print(self, record: dict[str, Any]) -> None:
        self._console.print(self._line(record), soft_wrap=True)

    def _line(self, record: dict[str, Any]) -> Text:
        step, step_s = int(record["step"]), self._step_s
        left_s = (self._num_steps - step) * step_s
        waiting = min(1.0, float(record["data_wait_s"]) / max(float(record["step_s"]), 1e-9))
        cells = {
            "step": f"{step}/{self._num_steps}",
            "epoch": f"{float(record['epoch']):.2f}",
            "loss": f"{float(record['loss']):.4f}",
            "lr": f"{float(record['lr']):.2e}",
            "images/s": f"{float(record['images_per_s']):.0f}",
            "data wait": f"{waiting:.0%}",
            "left": duration(left_s),
        }
        return Text.from_markup("  ".join(f"[dim]{name}[/dim] {value}" for name, value in cells.items()))


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number != 1 else "")


def _short(error: str) -> str:
    error = " ".join(error.split())
    return escape(error if len(error) <= _ERROR_CHARS else f"{error[:_ERROR_CHARS]} ...")


def _quarantined(event: dict[str, Any]) -> str:
    ids = f"damaged sample {event['sample_id']} was replaced by {event['replacement_id']}"
    return f"{ids} in step {event['step']}: {_short(event['reason'])}"


def _notice(event: dict[str, Any]) -> str:
    left = "" if event["deadline"] is None else f" in {max(0, event['deadline'] - time.time()):.0f} s"
    what = {"move": "going on without it", "save": "going on", "stop": "stopping: the driver is on it"}[event["action"]]
    return f"node {event['node'][:8]} will be taken away{left} ({event['source']}): saving a checkpoint, and {what}"
