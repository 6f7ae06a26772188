"""Named evaluations, the counterparts of `trainer.recipes`: each says how it is started, what it takes, what to expect.

Numbers marked [P] are published ones, with their source; what this project has run itself says so. Settings are those
of He et al. 2022, tables 9 (fine-tuning) and 10 (linear probing), as the published release runs them on GPUs.
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.config import AugmentConfig, DataConfig
from trainer.config import CheckpointConfig, ParallelConfig
from trainer.evaluate.config import (
    ClassifierConfig,
    EvaluateConfig,
    EvaluateOptimConfig,
    RegularizeConfig,
    ValidationConfig,
)
from trainer.recipe_book import RecipeBook


def finetune_base() -> EvaluateConfig:
    """ViT-B/16 fine-tuned for 100 epochs of ImageNet-1K.

    Command: tarmac evaluate finetune_base --from s3://BUCKET/runs/base --data s3://BUCKET/imagenet/train
        --val s3://BUCKET/imagenet/val --run s3://BUCKET/runs/base-finetune --num-workers 32 --gpus-per-worker 1
    Hardware: 32 V100, one rank each. V100s have no bfloat16: add --parallel.precision fp32 there.
    Hours: 7.2 [P: the official release]; not yet run by us.
    Expected: top-1 83.6 after 1600 epochs of pretraining [P: the paper]; four seeds 83.57 +- 0.08, top-5 96.5 [P: the
        official release]; 83.3 after 800 [P: MMSelfSup's model zoo].
    """
    return _finetune(_BASE, patch_size=16, num_epochs=100, base_lr=5e-4, layer_decay=0.65, drop_path=0.1, micro=128)


def finetune_large() -> EvaluateConfig:
    """ViT-L/16 fine-tuned for 50 epochs of ImageNet-1K.

    Command: tarmac evaluate finetune_large --from s3://BUCKET/runs/large --data s3://BUCKET/imagenet/train
        --val s3://BUCKET/imagenet/val --run s3://BUCKET/runs/large-finetune --num-workers 32 --gpus-per-worker 1
    Hardware: 32 V100 of 32 GB, one rank each (see finetune_base).
    Hours: 8.9 [P: the official release]; not yet run by us.
    Expected: top-1 85.9 after 1600 epochs of pretraining [P: the paper]; four seeds 85.87 +- 0.07, top-5 97.6 [P: the
        official release]; 85.4 after 800 [P: MMSelfSup's model zoo].
    """
    return _finetune(_LARGE, patch_size=16, num_epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path=0.2, micro=64)


def finetune_huge() -> EvaluateConfig:
    """ViT-H/14 fine-tuned for 50 epochs of ImageNet-1K.

    Command: tarmac evaluate finetune_huge --from s3://BUCKET/runs/huge --data s3://BUCKET/imagenet/train
        --val s3://BUCKET/imagenet/val --run s3://BUCKET/runs/huge-finetune --num-workers 64 --gpus-per-worker 1
    Hardware: 64 V100 of 32 GB, one rank each (see finetune_base).
    Hours: 13.2 [P: the official release]; not yet run by us.
    Expected: top-1 86.9 after 1600 epochs of pretraining [P: the paper]; top-5 98.1 [P: the official release].
    """
    return _finetune(_HUGE, patch_size=14, num_epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path=0.3, micro=32)


def finetune_huge_448() -> EvaluateConfig:
    """ViT-H/14 fine-tuned for 50 epochs of ImageNet-1K at 448 pixels: four times the patches of its pretraining.

    Nothing was published about this setting but its result: it is that of 224 pixels here, and the middle of an image
    is judged whole.

    Command: tarmac evaluate finetune_huge_448 --from s3://BUCKET/runs/huge --data s3://BUCKET/imagenet/train
        --val s3://BUCKET/imagenet/val --run s3://BUCKET/runs/huge-448 --num-workers 64 --gpus-per-worker 1
        --parallel.activation-checkpointing selective
    Hardware: 64 GPUs of 40 GB or more, one rank each.
    Hours: not published, and not yet run by us.
    Expected: top-1 87.8 after 1600 epochs of pretraining [P: the paper].
    """
    config = _finetune(_HUGE, patch_size=14, num_epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path=0.3, micro=8)
    augment = replace(config.data.augment, image_size=(448, 448))
    whole = replace(config.validation, crop_fraction=1.0)
    return replace(config, data=replace(config.data, augment=augment), validation=whole)


def linear_base() -> EvaluateConfig:
    """Linear probe of ViT-B/16, 90 epochs of ImageNet-1K.

    Command: tarmac evaluate linear_base --from s3://BUCKET/runs/base --data s3://BUCKET/imagenet/train
        --val s3://BUCKET/imagenet/val --run s3://BUCKET/runs/base-linear --num-workers 32 --gpus-per-worker 1
    Hardware: 32 V100, one rank each (see finetune_base).
    Hours: 2.3 [P: the official release]; not yet run by us.
    Expected: top-1 68.0 after 1600 epochs of pretraining [P: the paper], 67.8 [P: the official release]; 65.1 after
        800 [P: MMSelfSup's model zoo].
    """
    return _linear(_BASE, patch_size=16, num_epochs=90)


def linear_large() -> EvaluateConfig:
    """Linear probe of ViT-L/16, 50 epochs of ImageNet-1K.

    Command: tarmac evaluate linear_large --from s3://BUCKET/runs/large --data s3://BUCKET/imagenet/train
        --val s3://BUCKET/imagenet/val --run s3://BUCKET/runs/large-linear --num-workers 32 --gpus-per-worker 1
    Hardware: 32 V100, one rank each (see finetune_base).
    Hours: not published, and not yet run by us.
    Expected: top-1 75.8 after 1600 epochs of pretraining [P: the paper], 76.0 [P: the official release]; 73.7 after
        800 [P: MMSelfSup's model zoo].
    """
    return _linear(_LARGE, patch_size=16, num_epochs=50)


def linear_huge() -> EvaluateConfig:
    """Linear probe of ViT-H/14, 50 epochs of ImageNet-1K.

    Command: tarmac evaluate linear_huge --from s3://BUCKET/runs/huge --data s3://BUCKET/imagenet/train
        --val s3://BUCKET/imagenet/val --run s3://BUCKET/runs/huge-linear --num-workers 32 --gpus-per-worker 1
    Hardware: 32 V100, one rank each (see finetune_base).
    Hours: not published, and not yet run by us.
    Expected: top-1 76.6 after 1600 epochs of pretraining [P: the paper], 77.2 [P: the official release].
    """
    return _linear(_HUGE, patch_size=14, num_epochs=50)


def finetune_cifar_tiny() -> EvaluateConfig:
    """What `cifar_tiny` pretrained, fine-tuned on CIFAR-10 for 20 epochs.

    Command: tarmac evaluate finetune_cifar_tiny --from s3://BUCKET/runs/cifar --data s3://BUCKET/cifar10/train
        --val s3://BUCKET/cifar10/test --run s3://BUCKET/runs/cifar-finetune --num-workers 2
    Hardware: 2 CPU cores, one rank each.
    Hours: not yet run by us to the end.
    Expected: no published number for this setting, and not yet run by us to the end.
    """
    return EvaluateConfig(
        data=DataConfig(global_batch_size=256, num_lanes=32, augment=_CIFAR),
        model=replace(_CIFAR_TINY, drop_path=0.1),
        optim=EvaluateOptimConfig(
            base_lr=1e-3, min_lr=1e-6, num_epochs=20.0, warmup_fraction=0.1, layer_decay=0.75, clip_norm=1.0
        ),
        regularize=replace(_STRONG, erase_probability=0.0),
        validation=ValidationConfig(crop_fraction=1.0),
        parallel=ParallelConfig(precision="fp32"),
        checkpoint=CheckpointConfig(every_steps=200),
    )


def linear_cifar_tiny() -> EvaluateConfig:
    """Linear probe of what `cifar_tiny` pretrained, on CIFAR-10 for 20 epochs.

    Command: tarmac evaluate linear_cifar_tiny --from s3://BUCKET/runs/cifar --data s3://BUCKET/cifar10/train
        --val s3://BUCKET/cifar10/test --run s3://BUCKET/runs/cifar-linear --num-workers 2
    Hardware: 2 CPU cores, one rank each.
    Hours: not yet run by us to the end.
    Expected: no published number for this setting, and not yet run by us to the end.
    """
    return EvaluateConfig(
        data=DataConfig(global_batch_size=1024, num_lanes=32, micro_batch_size=256, augment=_CIFAR),
        model=replace(_CIFAR_TINY, frozen_encoder=True, pool="class", head_std=0.01),
        optim=_probe_optim(num_epochs=20, warmup_epochs=2, base_lr=1.6),
        validation=ValidationConfig(crop_fraction=1.0),
        parallel=ParallelConfig(precision="fp32"),
        checkpoint=CheckpointConfig(every_steps=200),
    )


_BASE = ClassifierConfig(embed_dim=768, depth=12, num_heads=12)
_LARGE = ClassifierConfig(embed_dim=1024, depth=24, num_heads=16)
_HUGE = ClassifierConfig(embed_dim=1280, depth=32, num_heads=16)
_CIFAR_TINY = ClassifierConfig(embed_dim=192, depth=6, num_heads=3)
_CIFAR = AugmentConfig(image_size=(32, 32), patch_size=4)
_STRONG = RegularizeConfig(
    randaugment_magnitude=9.0,
    randaugment_std=0.5,
    erase_probability=0.25,
    mixup_alpha=0.8,
    cutmix_alpha=1.0,
    label_smoothing=0.1,
)
_SUPERVISED_CROP = (0.08, 1.0)


def _finetune(
    model: ClassifierConfig,
    *,
    patch_size: int,
    num_epochs: int,
    base_lr: float,
    layer_decay: float,
    drop_path: float,
    micro: int,
) -> EvaluateConfig:
    """The paper's fine-tuning (table 9): 1024 images a step, 5 epochs of warm-up; 16 images to mix in a lane."""
    return EvaluateConfig(
        data=DataConfig(
            global_batch_size=1024,
            num_lanes=64,
            micro_batch_size=micro,
            augment=AugmentConfig(patch_size=patch_size, crop_scale=_SUPERVISED_CROP),
        ),
        model=replace(model, pool="mean", drop_path=drop_path, head_std=2e-5),
        optim=EvaluateOptimConfig(
            base_lr=base_lr,
            min_lr=1e-6,
            weight_decay=0.05,
            betas=(0.9, 0.999),
            num_epochs=float(num_epochs),
            warmup_fraction=5 / num_epochs,
            layer_decay=layer_decay,
        ),
        regularize=_STRONG,
    )


def _linear(model: ClassifierConfig, *, patch_size: int, num_epochs: int) -> EvaluateConfig:
    """The paper's linear probe (table 10): 16384 images a step, 10 epochs of warm-up, nothing but crops and flips."""
    return EvaluateConfig(
        data=DataConfig(
            global_batch_size=16384,
            num_lanes=256,
            micro_batch_size=512,
            augment=AugmentConfig(patch_size=patch_size, crop_scale=_SUPERVISED_CROP),
        ),
        model=replace(model, pool="class", frozen_encoder=True, head_std=0.01),
        optim=_probe_optim(num_epochs, warmup_epochs=10),
    )


def _probe_optim(num_epochs: int, warmup_epochs: int, base_lr: float = 0.1) -> EvaluateOptimConfig:
    return EvaluateOptimConfig(
        optimizer="lars",
        base_lr=base_lr,
        min_lr=0.0,
        weight_decay=0.0,
        momentum=0.9,
        num_epochs=float(num_epochs),
        warmup_fraction=warmup_epochs / num_epochs,
    )


BOOK = RecipeBook(
    finetune_base,
    finetune_large,
    finetune_huge,
    finetune_huge_448,
    linear_base,
    linear_large,
    linear_huge,
    finetune_cifar_tiny,
    linear_cifar_tiny,
)
names, get, summary = BOOK.names, BOOK.get, BOOK.summary
