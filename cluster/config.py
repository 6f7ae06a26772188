"""Where a run runs and with what. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config import execution, require
from trainer.config import TrainConfig
from trainer.evaluate.config import EvaluateConfig, SourceConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class JobConfig:
    """A TrainConfig, the two URLs, and the workers."""

    train: TrainConfig = TrainConfig()
    data: str
    """URL of a sharded dataset."""
    run: str
    """URL of the run; a run that exists goes on."""
    num_workers: int = execution(1)
    """Ray Train workers, one rank each."""
    cpus_per_worker: float = execution(1.0)
    gpus_per_worker: float = execution(0.0)
    """1 trains on CUDA with nccl, 0 on CPUs with gloo."""
    max_attempts_without_progress: int = execution(3)
    """Attempts in a row that committed nothing, after which the run stops as a crash loop."""

    def __post_init__(self) -> None:
        require(bool(self.data), "data must be the URL of a dataset")
        require(bool(self.run), "run must be a URL")
        require(self.num_workers >= 1, f"num_workers ({self.num_workers}) must be at least 1")
        require(self.cpus_per_worker > 0, f"cpus_per_worker ({self.cpus_per_worker}) must be positive")
        require(
            self.gpus_per_worker in (0.0, 1.0),
            f"gpus_per_worker ({self.gpus_per_worker}) must be 0 or 1: a rank drives one device",
        )
        require(
            self.train.data.decode_device == "cpu" or self.gpus_per_worker > 0,
            f"data.decode_device ({self.train.data.decode_device!r}) needs a GPU a worker; "
            "use --gpus-per-worker 1, or --data.decode-device cpu for a new run",
        )
        require(
            self.max_attempts_without_progress >= 1,
            f"max_attempts_without_progress ({self.max_attempts_without_progress}) must be at least 1",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateJob(JobConfig):
    """An evaluation, which runs on workers as pretraining does: `data` is what it learns from."""

    train: EvaluateConfig = EvaluateConfig()  # type: ignore[assignment]  # in place of a TrainConfig
    val: str
    """URL of the sharded dataset that it is judged by."""
    source: SourceConfig
    """The encoder that it begins with."""

    def __post_init__(self) -> None:
        JobConfig.__post_init__(self)  # with slots there is no super() here
        require(bool(self.val), "val must be the URL of a dataset")
