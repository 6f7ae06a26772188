"""Batches to weights. Knows no Ray."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trainer.config import TrainConfig

if TYPE_CHECKING:
    from trainer import recipes
    from trainer.evaluate.trained import TrainedModel, load_trained
    from trainer.mae import MAE, build_mae

__all__ = ["MAE", "TrainConfig", "TrainedModel", "build_mae", "load_trained", "recipes"]

_HOMES = {
    "MAE": "trainer.mae",
    "build_mae": "trainer.mae",
    "TrainedModel": "trainer.evaluate.trained",
    "load_trained": "trainer.evaluate.trained",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use, as in `pipeline`: a config needs no torch.
    if name == "recipes":
        return importlib.import_module("trainer.recipes")
    if name not in _HOMES:
        raise AttributeError(f"module 'trainer' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
