"""What a fine-tuning or a linear probe is told. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from pipeline.config import AugmentConfig, DataConfig, StoreConfig, execution, require
from trainer.config import (
    CheckpointConfig,
    EncoderConfig,
    LogConfig,
    ParallelConfig,
    UpdateConfig,
    require_betas,
    require_floor,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifierConfig(EncoderConfig):
    """A pretrained encoder, whose size must be the pretrained run's, and a linear head."""

    num_classes: int | None = None
    """Outputs of the head; None takes the dataset's classes."""
    frozen_encoder: bool = False
    """Train the head alone, on features normalised over the batch: a linear probe."""
    pool: Literal["mean", "class"] = "mean"
    """What the head sees: the mean of the patches' tokens, normalised by a norm of its own, or the class token."""
    drop_path: float = 0.0
    """Probability that the last block's attention or MLP is left out for an image; it rises linearly from 0 at the
    first block (stochastic depth)."""
    head_std: float = 2e-5
    """Standard deviation of the head's first weights."""

    def __post_init__(self) -> None:
        EncoderConfig.__post_init__(self)
        require(
            self.num_classes is None or self.num_classes >= 2,
            f"model.num_classes ({self.num_classes}) must be at least 2; leave it out for the dataset's",
        )
        require(self.pool in ("mean", "class"), f"model.pool ({self.pool!r}) must be 'mean' or 'class'")
        require(0 <= self.drop_path < 1, f"model.drop_path ({self.drop_path}) must be in [0, 1)")
        require(
            not (self.frozen_encoder and self.drop_path),
            f"model.drop_path ({self.drop_path}) must be 0 where model.frozen_encoder is on",
        )
        require(0 <= self.head_std < math.inf, f"model.head_std ({self.head_std}) must not be negative, and finite")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateOptimConfig(UpdateConfig):
    """AdamW with layer-wise decay of the rate, or LARS (He et al. 2022, tables 9 and 10)."""

    optimizer: Literal["adamw", "lars"] = "adamw"
    """`adamw` to fine-tune; `lars` (You et al. 2017) for the large batch of a linear probe."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    momentum: float = 0.9
    """Of LARS."""
    layer_decay: float = 1.0
    """Each layer's rate over that of the layer above it; the head has the whole rate."""

    def __post_init__(self) -> None:
        UpdateConfig.__post_init__(self)  # with slots there is no super() here
        require(self.optimizer in ("adamw", "lars"), f"optim.optimizer ({self.optimizer!r}) must be 'adamw' or 'lars'")
        require_betas(self.betas)
        require(0 <= self.momentum < 1, f"optim.momentum ({self.momentum}) must be in [0, 1)")
        require(0 < self.layer_decay <= 1, f"optim.layer_decay ({self.layer_decay}) must be in (0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class RegularizeConfig:
    """What is done to images and labels beside crop and flip; 0 leaves each out."""

    randaugment_magnitude: float = 0.0
    """Mean strength of two random operations an image, of 10 (RandAugment, Cubuk et al. 2020)."""
    randaugment_std: float = 0.5
    """Standard deviation of the strength."""
    erase_probability: float = 0.0
    """Probability that a random rectangle becomes noise (random erasing, Zhong et al. 2020)."""
    mixup_alpha: float = 0.0
    """Of the Beta distribution that two images' shares are drawn from (mixup, Zhang et al. 2018)."""
    cutmix_alpha: float = 0.0
    """Likewise, where a box of one is put into the other (CutMix, Yun et al. 2019). With both, either is as likely."""
    label_smoothing: float = 0.0
    """Share of a label that is spread over all classes."""

    def __post_init__(self) -> None:
        require(
            0 <= self.randaugment_magnitude <= 10,
            f"regularize.randaugment_magnitude ({self.randaugment_magnitude}) must be in [0, 10]",
        )
        for name in ("randaugment_std", "mixup_alpha", "cutmix_alpha"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"regularize.{name} ({value}) must not be negative, and finite")
        require(
            0 <= self.erase_probability <= 1,
            f"regularize.erase_probability ({self.erase_probability}) must be in [0, 1]",
        )
        require(0 <= self.label_smoothing < 1, f"regularize.label_smoothing ({self.label_smoothing}) must be in [0, 1)")


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationConfig:
    """How the classifier is judged."""

    every_epochs: int = execution(1)
    """Epochs between looks at the validation set; there is always one at the end."""
    crop_fraction: float = 0.875
    """Side of the centre crop over the shorter side of the image: 224 of 256."""

    def __post_init__(self) -> None:
        require(self.every_epochs >= 1, f"validation.every_epochs ({self.every_epochs}) must be at least 1")
        require(0 < self.crop_fraction <= 1, f"validation.crop_fraction ({self.crop_fraction}) must be in (0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """One fine-tuning or linear probe, whole."""

    data: DataConfig = DataConfig()
    model: ClassifierConfig = ClassifierConfig()
    optim: EvaluateOptimConfig = EvaluateOptimConfig()
    regularize: RegularizeConfig = RegularizeConfig()
    validation: ValidationConfig = ValidationConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = execution(CheckpointConfig())
    log: LogConfig = execution(LogConfig())
    store: StoreConfig = execution(StoreConfig())
    """For the datasets and the runs alike."""

    def __post_init__(self) -> None:
        require_floor(self)
        data, regularize = self.data, self.regularize
        require(
            data.decode_device == "cpu",
            f"data.decode_device ({data.decode_device!r}) must be 'cpu': what follows the decoding is done there",
        )
        require(
            not (mixes(regularize) and data.global_batch_size == data.num_lanes),
            f"data.num_lanes ({data.num_lanes}) must be less than data.global_batch_size ({data.global_batch_size}): "
            "an image is mixed with another of its lane; use half as many lanes",
        )
        require(
            self.optim.layer_decay == 1 or not self.model.frozen_encoder,
            f"optim.layer_decay ({self.optim.layer_decay}) must be 1 where model.frozen_encoder is on",
        )


def mixes(regularize: RegularizeConfig) -> bool:
    """Whether images are mixed with each other."""
    return regularize.mixup_alpha > 0 or regularize.cutmix_alpha > 0


def require_encoder_of(config: EvaluateConfig, pretrained: Any, augment: AugmentConfig) -> None:
    """Raise ValueError unless a pretrained encoder is the one that `config` describes.

    Args:
        config: of the evaluation.
        pretrained: the ModelConfig of the pretraining run.
        augment: of the pretraining run.
    """
    pairs = [
        (f"model.{name}", getattr(config.model, name), getattr(pretrained, name))
        for name in ("embed_dim", "depth", "num_heads", "mlp_ratio")
    ]
    pairs += [
        (f"data.augment.{name}", getattr(config.data.augment, name), getattr(augment, name))
        for name in ("patch_size", "mean", "std")
    ]
    wrong = [(name, ours, theirs) for name, ours, theirs in pairs if ours != theirs]
    require(
        not wrong,
        "the recipe is for another encoder than the pretrained run's: "
        + "; ".join(f"{name} is {ours} and there {theirs}" for name, ours, theirs in wrong)
        + ". Take the recipe of its size, or give "
        + " ".join(f"--{name.replace('_', '-')} {_as_words(theirs)}" for name, _, theirs in wrong),
    )


def _as_words(value: Any) -> str:
    return " ".join(str(item) for item in value) if isinstance(value, tuple) else str(value)


def validation_data(config: EvaluateConfig, num_samples: int) -> DataConfig:
    """How the loader reads a validation set of `num_samples` images: one crop each, in steps that are not too large."""
    data = config.data
    full = -(-num_samples // data.num_lanes) * data.num_lanes
    batch = min(data.global_batch_size // data.crops_per_image, full)
    return replace(data, global_batch_size=batch, crops_per_image=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """The encoder that an evaluation begins with."""

    run: str
    """URL of the pretraining run."""
    step: int
    """Of the checkpoint that is taken."""
    average: bool = False
    """The encoder's averaged weights, in place of its last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationRecord:
    """What makes an evaluation this one and no other, beside its training data: its part of run.json."""

    train: EvaluateConfig
    source: SourceConfig
    val_digest: str
    """Of the validation set's manifest."""
