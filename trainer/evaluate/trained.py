"""The model of a run, as its newest checkpoint that verifies has it."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from pipeline.store import Store
from trainer.checkpoint import Commit, find_resume, load
from trainer.config import TrainConfig
from trainer.errors import CheckpointError
from trainer.mae import MAE, build_mae
from trainer.run_files import read_run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedModel:
    """A whole model on one device, and where it comes from."""

    model: MAE
    config: TrainConfig
    commit: Commit


def load_trained(run_url: str) -> TrainedModel:
    """Build a run's model on the CPU and load its newest checkpoint that verifies.

    Args:
        run_url: of the run; any fsspec URL or bare path.

    Raises:
        RunError: there is no run at that URL.
        CheckpointError: it has no checkpoint that verifies.
        StoreError: the store does not answer.
    """
    run = Store(run_url)
    config = read_run(run).config
    commit = find_resume(run, lambda path, reason: logger.warning("damaged, walked past: %s %s", path, reason))
    if commit is None:
        raise CheckpointError(f"{run} has no checkpoint that verifies; train it, or wait for its first checkpoint")
    model = build_mae(config)
    load(run, commit, model)
    return TrainedModel(model.eval(), config, commit)
