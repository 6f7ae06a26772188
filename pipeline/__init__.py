"""S3 bytes to batches. Knows no model and no Ray."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pipeline.config import AugmentConfig, DataConfig, StoreConfig

if TYPE_CHECKING:
    from pipeline.dataset import Dataset, open_dataset
    from pipeline.loader import Batch, Loader

__all__ = ["AugmentConfig", "Batch", "DataConfig", "Dataset", "Loader", "StoreConfig", "open_dataset"]

_HOMES = {
    "Batch": "pipeline.loader",
    "Loader": "pipeline.loader",
    "Dataset": "pipeline.dataset",
    "open_dataset": "pipeline.dataset",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: a job is written on a laptop that has the configs' standard library and nothing else.
    if name not in _HOMES:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
