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
    """Ray Train workers, one rank each; the most of them, if `min_workers` is given."""
    min_workers: int | None = execution(None)
    """With fewer than `num_workers` the run goes on as long as there are these; None insists on `num_workers`."""
    cpus_per_worker: float = execution(1.0)
    gpus_per_worker: float = execution(0.0)
    """1 trains on CUDA with nccl, 0 on CPUs with gloo."""
    max_attempts_without_progress: int = execution(3)
    """Attempts in a row that committed nothing, after which the run stops as a crash loop."""
    silence_timeout_s: float = execution(20.0)
    """A worker that gives no sign of life for this long is killed, and the run restarted."""
    stall_timeout_s: float = execution(600.0)
    """Workers that complete no step for this long are killed, and the run restarted; starting and loading count."""
    standby: bool = execution(True)
    """On spare nodes a process waits that has imported for the workers to come, and takes memory."""

    def __post_init__(self) -> None:
        require(bool(self.data), "data must be the URL of a dataset")
        require(bool(self.run), "run must be a URL")
        require(self.num_workers >= 1, f"num_workers ({self.num_workers}) must be at least 1")
        require(
            self.min_workers is None or 1 <= self.min_workers <= self.num_workers,
            f"min_workers ({self.min_workers}) must be from 1 to num_workers ({self.num_workers})",
        )
        for name in ("silence_timeout_s", "stall_timeout_s"):
            require(getattr(self, name) >= 5, f"{name} ({getattr(self, name)}) must be at least 5 seconds")
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

    @property
    def least_workers(self) -> int:
        """The fewest workers that it runs with."""
        return self.num_workers if self.min_workers is None else self.min_workers


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
