"""A run's events as sentences: those that a human cares about."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.options import shortage
from trainer.metrics import Event

_MAX_CHARS = 300


@dataclass(frozen=True)
class Told:
    """An event as the report has it."""

    time: float
    attempt: int
    text: str
    is_bad: bool


def tell_events(events: Sequence[Event]) -> list[Told]:
    """What happened, oldest first; of events of a kind that come in a row, such as waiting, the last one."""
    told = []
    for event, following in itertools.zip_longest(events, events[1:]):
        if event["event"] not in _SENTENCES:
            continue
        if event["event"] == "waiting" and following is not None and following["event"] == "waiting":
            continue
        told.append(Told(event["time"], event["attempt"], _SENTENCES[event["event"]](event), event["event"] in _BAD))
    return told


def _first_line(error: str) -> str:
    line = error.partition("\n")[0]
    return line if len(line) <= _MAX_CHARS else f"{line[:_MAX_CHARS]} ..."


def _start(event: Event) -> str:
    workers = f"{event['world_size']} worker" + ("s" if event["world_size"] > 1 else "")
    hosts = sorted(set(event.get("hosts", [])))
    shown = ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if len(hosts) > 4 else "")
    where = "from the start" if event["step"] == 0 else f"from the checkpoint of step {event['step']}"
    return f"training with {workers}{' on ' + shown if hosts else ''}, {where}"


def _lost(event: Event) -> str:
    how = {"silence": " (no sign of life)", "stall": " (no step came to its end)"}.get(event["detected"], "")
    return f"lost{how}: {_first_line(str(event['error']))}"


def _notice(event: Event) -> str:
    actions = {"move": "saved, and moved away", "save": "saved", "stop": "saved and stopped: the driver was on it"}
    return (
        f"notice ({event['source']}): node {event['node']} goes away; {actions.get(event['action'], event['action'])}"
    )


def _stop(event: Event) -> str:
    reasons = {"finished": "finished", "stopped": "saved and stopped"}
    return f"{reasons.get(event['reason'], 'stopped: ' + str(event['reason']))} at step {event['step']}"


def _waiting(event: Event) -> str:
    return f"waited: {shortage(event)}"


_SENTENCES: dict[str, Callable[[Event], str]] = {
    "start": _start,
    "waiting": _waiting,
    "notice": _notice,
    "stopping": lambda event: f"{event['signal']}: asked to save and stop",
    "lost": _lost,
    "damage": lambda event: f"checkpoint damaged, walked past: {event['path']}: {event['reason']}",
    "skipped": lambda event: (
        f"step {event['step']} was skipped ({event['reason']}); samples {', '.join(map(str, event['sample_ids']))}"
    ),
    "quarantined": lambda event: (
        f"damaged sample {event['sample_id']} was replaced by {event['replacement_id']} in step {event['step']}: "
        f"{event['reason']}"
    ),
    "stop": _stop,
}

_BAD = frozenset({"lost", "damage", "skipped", "quarantined"})
