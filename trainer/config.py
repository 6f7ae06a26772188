"""What the trainer is told: model, optimisation, parallelism, cadence. Standard library only."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from pipeline import config as data_config
from pipeline.config import (
    AugmentConfig,
    DataConfig,
    StoreConfig,
    execution,
    num_kept_patches,
    num_patches,
    require,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderConfig:
    """A vision transformer; image and patch size come from `data.augment`. Defaults are ViT-B's."""

    embed_dim: int = 768
    """Width D of the encoder."""
    depth: int = 12
    """Blocks of the encoder."""
    num_heads: int = 12
    """Attention heads of an encoder block."""
    mlp_ratio: float = 4.0
    """Hidden width of a block's MLP over the block's width, in encoder and decoder."""

    def __post_init__(self) -> None:
        require_blocks("", self.embed_dim, self.depth, self.num_heads)
        require(self.mlp_ratio > 0, f"model.mlp_ratio ({self.mlp_ratio}) must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(EncoderConfig):
    """The asymmetric MAE: an encoder, and a light decoder."""

    decoder_embed_dim: int = 512
    """Width of the decoder."""
    decoder_depth: int = 8
    """Blocks of the decoder."""
    decoder_num_heads: int = 16
    """Attention heads of a decoder block."""
    norm_pix_loss: bool = True
    """Normalise each target patch by its own mean and variance."""
    decoder: Literal["self", "cross"] = "self"
    """`self`: visible and mask tokens attend to each other, as in MAE; `cross`: mask tokens attend to the encoder's
    tokens only, those of all its depths mixed by learned weights (CrossMAE, arXiv:2401.14391)."""
    predict_ratio: float | None = None
    """Fraction of all patches that the cross decoder predicts in training, a random part of the removed ones; None
    predicts all of these."""
    masking_in_encoder: bool = False
    """Give the encoder mask tokens for the removed patches, as BERT does: the paper's slow comparison (table 1c)."""

    def __post_init__(self) -> None:
        EncoderConfig.__post_init__(self)
        require_blocks("decoder_", self.decoder_embed_dim, self.decoder_depth, self.decoder_num_heads)
        require(self.decoder in ("self", "cross"), f"model.decoder ({self.decoder!r}) must be 'self' or 'cross'")
        require(
            self.predict_ratio is None or self.decoder == "cross",
            f"model.predict_ratio ({self.predict_ratio}) needs model.decoder 'cross': in the other one the mask tokens "
            "see each other",
        )
        require(
            not self.masking_in_encoder or self.decoder == "self",
            "model.masking_in_encoder needs model.decoder 'self': the cross decoder looks at visible tokens only",
        )


def require_blocks(prefix: str, width: int, depth: int, num_heads: int) -> None:
    """ValueError unless transformer blocks can be so; `prefix` is that of their fields' names in `model`."""
    require(
        num_heads >= 1 and width >= 1 and width % num_heads == 0,
        f"model.{prefix}embed_dim ({width}) must be divisible by model.{prefix}num_heads ({num_heads})",
    )
    require(
        width % 4 == 0,
        f"model.{prefix}embed_dim ({width}) must be divisible by 4 for the 2-D sin-cos position embedding",
    )
    require(depth >= 1, f"model.{prefix}depth ({depth}) must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateConfig:
    """What every training says about its updates: rate, decay, length, and what is done about harmful ones."""

    base_lr: float = 1.5e-4
    """Learning rate for a batch of 256; the peak is `base_lr * global_batch_size / 256`."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    weight_decay: float = 0.05
    """Not applied to 1-D tensors and biases."""
    num_epochs: float = 800.0
    """Length of the run, in epochs; `num_steps` overrides it."""
    num_steps: int | None = None
    """Length of the run, in optimizer steps."""
    warmup_fraction: float = 0.05
    """Share of the run that the learning rate rises from 0: 40 of 800 epochs in the paper."""
    clip_norm: float | None = None
    """Longest gradient, by its 2-norm over all parameters; a longer one is scaled down to it. None clips nothing."""
    spike_sigmas: float | None = None
    """Skip an update whose loss or gradient norm is this many standard deviations above the mean of about the last 128
    updates; None skips only what is not finite."""
    max_skipped_steps: int = execution(10)
    """Updates in a row that may be skipped before the run stops."""

    def __post_init__(self) -> None:
        require(0 < self.base_lr < math.inf, f"optim.base_lr ({self.base_lr}) must be positive and finite")
        require(0 <= self.min_lr < math.inf, f"optim.min_lr ({self.min_lr}) must not be negative, and finite")
        require(
            0 <= self.weight_decay < math.inf,
            f"optim.weight_decay ({self.weight_decay}) must not be negative, and finite",
        )
        require(0 < self.num_epochs < math.inf, f"optim.num_epochs ({self.num_epochs}) must be positive")
        require(
            self.num_steps is None or self.num_steps >= 1,
            f"optim.num_steps ({self.num_steps}) must be at least 1",
        )
        require(
            0 <= self.warmup_fraction < 1,
            f"optim.warmup_fraction ({self.warmup_fraction}) must be in [0, 1)",
        )
        for name in ("clip_norm", "spike_sigmas"):
            value = getattr(self, name)
            require(
                value is None or 0 < value < math.inf,
                f"optim.{name} ({value}) must be positive and finite; leave it out for none",
            )
        require(
            self.max_skipped_steps >= 0,
            f"optim.max_skipped_steps ({self.max_skipped_steps}) must not be negative",
        )


def require_betas(betas: tuple[float, float]) -> None:
    """Raise ValueError unless they can be AdamW's."""
    require(all(0 <= beta < 1 for beta in betas), f"optim.betas {betas} must be in [0, 1)")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig(UpdateConfig):
    """AdamW with linear warm-up and cosine decay (He et al. 2022, table 8)."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's two moments."""
    ema_decay: float | None = None
    """Of a moving average of the encoder's weights that is kept beside them; None keeps none."""

    def __post_init__(self) -> None:
        UpdateConfig.__post_init__(self)  # with slots there is no super() here
        require_betas(self.betas)
        require(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            f"optim.ema_decay ({self.ema_decay}) must be between 0 and 1, for example 0.9999",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How the model is spread over ranks, and in which precision it runs."""

    precision: Literal["fp32", "bf16"] = "bf16"
    """Of parameters in forward and backward; gradients are reduced, and weights kept, in fp32."""
    shard_size: int | None = execution(None)
    """Ranks that share one copy of the model (FSDP2); None takes all. Fewer, for example those of a node, keep one copy
    each group, and gather weights within it only (HSDP)."""
    activation_checkpointing: Literal["none", "selective", "full"] = execution("none")
    """What backward computes again: nothing; all but matrix products and attention; each block as a whole."""
    compile: bool = execution(False)
    """Compile each block with torch.compile."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("precision", ("fp32", "bf16")),
            ("activation_checkpointing", ("none", "selective", "full")),
        ):
            value = getattr(self, name)
            words = ", ".join(repr(choice) for choice in choices)
            require(value in choices, f"parallel.{name} ({value!r}) must be one of {words}")
        require(
            self.shard_size is None or self.shard_size >= 1,
            f"parallel.shard_size ({self.shard_size}) must be at least 1",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When checkpoints are taken and which are kept."""

    every_steps: int = execution(500)
    """Optimizer steps between checkpoints; a last one is always taken at the end and on a stop."""
    keep_last: int = execution(3)
    """Newest committed checkpoints that are kept; older ones are deleted after a commit."""
    keep_every_steps: int | None = execution(None)
    """Checkpoints at multiples of this many steps are kept for good; None keeps none for that."""
    asynchronous: bool = execution(True)
    """Write beside training, from a copy of the rank's shards in host memory; otherwise training waits."""

    def __post_init__(self) -> None:
        require(self.every_steps >= 1, f"checkpoint.every_steps ({self.every_steps}) must be at least 1")
        require(
            self.keep_last >= 2,
            f"checkpoint.keep_last ({self.keep_last}) must be at least 2: one may be damaged",
        )
        require(
            self.keep_every_steps is None
            or (self.keep_every_steps >= 1 and self.keep_every_steps % self.every_steps == 0),
            f"checkpoint.keep_every_steps ({self.keep_every_steps}) must be a multiple of checkpoint.every_steps "
            f"({self.every_steps})",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """How often numbers leave the training loop."""

    every_steps: int = execution(10)
    """Optimizer steps between reads from the device, progress updates and checks for a stop request."""
    flush_s: float = execution(30.0)
    """Longest time that a record waits before it is written to the run, in seconds."""

    def __post_init__(self) -> None:
        require(self.every_steps >= 1, f"log.every_steps ({self.every_steps}) must be at least 1")
        require(self.flush_s > 0, f"log.flush_s ({self.flush_s}) must be positive")


@runtime_checkable
class LoopConfig(Protocol):
    """What the loop, its schedule and its checkpoints read of a run's config, whatever the run trains."""

    @property
    def data(self) -> DataConfig:
        """Batch, order, seed."""

    @property
    def optim(self) -> UpdateConfig:
        """Rate and length."""

    @property
    def parallel(self) -> ParallelConfig:
        """Ranks and precision."""

    @property
    def checkpoint(self) -> CheckpointConfig:
        """When to save."""

    @property
    def log(self) -> LogConfig:
        """When to tell."""

    @property
    def store(self) -> StoreConfig:
        """How patient to be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One pretraining run, whole: the CLI's options, the Ray payload and the record in run.json."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = execution(CheckpointConfig())
    log: LogConfig = execution(LogConfig())
    store: StoreConfig = execution(StoreConfig())
    """For the dataset and the run alike."""

    def __post_init__(self) -> None:
        require_floor(self)
        augment, ratio = self.data.augment, self.model.predict_ratio
        require(
            1 <= num_predicted_patches(self.model, augment) <= num_patches(augment) - num_kept_patches(augment),
            f"model.predict_ratio ({ratio}) must predict at least one patch, and at most those that "
            f"data.augment.mask_ratio ({augment.mask_ratio}) removes",
        )


def num_predicted_patches(model: ModelConfig, augment: AugmentConfig) -> int:
    """Patches that the loss is about: all removed ones, or `int(N * predict_ratio)`."""
    if model.predict_ratio is None:
        return num_patches(augment) - num_kept_patches(augment)
    return int(num_patches(augment) * model.predict_ratio)


def require_floor(config: LoopConfig) -> None:
    """Raise ValueError if the learning rate would end above its peak."""
    require(
        config.optim.min_lr <= peak_lr(config),
        f"optim.min_lr ({config.optim.min_lr}) must be at most the peak learning rate ({peak_lr(config):g} = "
        "optim.base_lr * data.global_batch_size / 256)",
    )


def peak_lr(config: LoopConfig) -> float:
    """Learning rate after warm-up, by the linear scaling rule (Goyal et al. 2017)."""
    return config.optim.base_lr * config.data.global_batch_size / 256


def num_steps(config: LoopConfig, num_samples: int) -> int:
    """Optimizer steps of the whole run over a dataset of `num_samples` images."""
    if config.optim.num_steps is not None:
        return config.optim.num_steps
    return max(1, math.ceil(config.optim.num_epochs * num_samples / config.data.global_batch_size))


def check_world(config: LoopConfig, world_size: int) -> None:
    """Raise ValueError if `world_size` ranks cannot train this config."""
    data_config.check_world(config.data, world_size)
    size = config.parallel.shard_size or world_size
    require(
        world_size % size == 0,
        f"num_workers ({world_size}) must be divisible by parallel.shard_size ({size}), or leave that out",
    )


def to_dict(config: Any) -> dict[str, Any]:
    """A config tree as plain JSON values."""
    return dataclasses.asdict(config)


def from_dict(kind: type[Any], values: dict[str, Any], path: str = "") -> Any:
    """A config tree from plain JSON values.

    Args:
        kind: the dataclass to build, for example TrainConfig.
        values: as `to_dict` wrote them; a missing field takes its default.
        path: where in the tree this is, for messages.

    Raises:
        ValueError: unknown field, or a value that the config refuses.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    require(not unknown, f"unknown field {path}{', '.join(unknown)}; known are {', '.join(fields)}")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _from_json(hints[name], value, f"{path}{name}.") for name, value in values.items()})


def _from_json(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type[Any], hint), value, path)
    origin = typing.get_origin(hint)
    if origin is tuple:
        return tuple(value)
    if origin in (typing.Union, types.UnionType) and isinstance(value, list):
        return tuple(value)
    return value


def differences(recorded: Any, given: Any) -> list[str]:
    """Fields that change a run's result and are not the same, as `path: recorded -> given`."""
    return _differences(recorded, given, "")


def _differences(recorded: Any, given: Any, path: str) -> list[str]:
    found: list[str] = []
    for field in dataclasses.fields(recorded):
        if not field.metadata.get("changes_result", True):
            continue
        before, after = getattr(recorded, field.name), getattr(given, field.name)
        if dataclasses.is_dataclass(before):
            found += _differences(before, after, f"{path}{field.name}.")
        elif before != after:
            found.append(f"{path}{field.name}: {before!r} -> {after!r}")
    return found
