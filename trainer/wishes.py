"""What may be asked of a run in training. Standard library only: whoever asks needs no torch."""

from __future__ import annotations

import enum


class Wish(enum.IntEnum):
    """The larger one counts."""

    GO_ON = 0
    SAVE = 1
    """Take a checkpoint now, beside training."""
    STOP = 2
    """Take a checkpoint, and return."""
