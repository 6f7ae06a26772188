"""The model of a run, as its newest checkpoint that verifies has it."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from pipeline.config import require
from pipeline.store import Store
from trainer.average import EncoderAverage, ema_tensors
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


def load_trained(run_url: str, *, average: bool = False) -> TrainedModel:
    """Build a run's model on the CPU and load its newest checkpoint that verifies.

    Args:
        run_url: of the run; any fsspec URL or bare path.
        average: take the encoder's averaged weights, which a run with `optim.ema_decay` keeps, in place of its last.

    Raises:
        ValueError: `average`, of a run that keeps none.
        RunError: there is no run at that URL.
        CheckpointError: it has no checkpoint that verifies.
        StoreError: the store does not answer.
    """
    run = Store(run_url)
    config = read_run(run).config
    require(
        not average or config.optim.ema_decay is not None,
        f"{run} keeps no averaged weights: it was trained without optim.ema_decay",
    )
    commit = find_resume(run, lambda path, reason: logger.warning("damaged, walked past: %s %s", path, reason))
    if commit is None:
        raise CheckpointError(f"{run} has no checkpoint that verifies; train it, or wait for its first checkpoint")
    model = build_mae(config)
    averages = {name: weight.clone() for name, weight in EncoderAverage.weights(model).items()} if average else {}
    load(run, commit, model, extra=ema_tensors(averages))
    model.load_state_dict(averages, strict=False)
    return TrainedModel(model.eval(), config, commit)
