"""The forms that lines of `tarmac pretrain` on a file have: the run's own, and nobody else's."""

from __future__ import annotations

import re

_DETAIL = r"(, with room for \d+ of \d+ workers beside what else runs|; Ray found no place for them there, .+)?"
EVENTS = (
    r"attempt \d+: \d+ workers?, from (the start|the checkpoint of step \d+)(; resumed by itself, \d+ steps? again)?",
    r"checkpoint damaged, walked past: [^:]+: .+",
    r"damaged sample \d+ was replaced by \d+ in step \d+: .+",
    r"workers were lost( after step \d+)?: .+",
    r"node \w+ will be taken away( in \d+ s)? \([^)]+\): saving a checkpoint, and going on( without it)?",
    r"there is room for more workers: saved, and starting again with them",
    r"epoch \d+\.\d\d: top-1 [\d.]+%, top-5 [\d.]+% of [\d,]+ images",
    rf"waiting: the workers need [^,;]+, the nodes that stay have [^,;]+{_DETAIL}",
    r"(SIGTERM|SIGINT|tarmac stop): saving a checkpoint, then stopping; once more to stop at once",
    r"step \d+ was skipped: loss \S+, gradient norm \S+; its samples are in the events",
)
_STEP = r"step \d+/\d+  epoch \d+\.\d\d  loss \S+  lr \S+  images/s \d+  data wait \d+%  left [\d:]+"
_LAST = (
    r"finished: \S+ is at step \d+ of \d+",
    r"stopped at step \d+ of \d+; the same command goes on",
)
_FORMS = (_STEP, *_LAST, *(rf"\d\d:\d\d:\d\d {event}" for event in EVENTS))


def strange_lines(text: str) -> list[str]:
    """The lines of a run's standard output and error that are of no known form: Ray's, for example."""
    return [line for line in text.splitlines() if not any(re.fullmatch(form, line) for form in _FORMS)]
