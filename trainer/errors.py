"""The trainer's own errors: what failed, at which step or in which file, and what to do about it."""


class TrainingError(Exception):
    """Training cannot go on: the numbers are no longer finite, or the loader broke its promise."""


class CheckpointError(Exception):
    """A checkpoint cannot be written, or holds something other than it should."""


class RunError(Exception):
    """There is no run at this URL, or its record is damaged."""


class RunMismatchError(RunError):
    """The run at this URL belongs to another recipe or another dataset."""


class PeerError(Exception):
    """Another rank failed at a point that all ranks must pass together; its own error says why."""
