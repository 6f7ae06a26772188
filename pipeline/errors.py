"""The pipeline's own errors: what failed, on which object, and what to do about it."""


class StoreError(Exception):
    """Object storage answered with an error, not at all, or refused us."""


class StoreNotFoundError(StoreError):
    """The bucket or the object does not exist."""


class StoreRefusedError(StoreError):
    """Object storage knows us and says no, does not know us, or will not give out an archived object."""


class StoreSilentError(StoreError):
    """Object storage gave no answer, or none but "later", until the deadline was over."""


class StoreChangedError(StoreError):
    """An object is not the one that was read before."""


class ManifestError(Exception):
    """A dataset's manifest is missing, damaged, or does not add up."""


class ShardError(Exception):
    """A shard or its index does not hold what the manifest says."""


class SourceError(Exception):
    """A source of images is empty, unreadable, or has more bad images than allowed."""
