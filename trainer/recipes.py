"""Named runs. Each is a plain function whose docstring says how it is started, what it takes and what to expect.

Numbers marked [P] are published ones, with their source; what this project has run itself says so.
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.config import AugmentConfig, DataConfig
from trainer.config import (
    CheckpointConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)
from trainer.recipe_book import RecipeBook


def mae_base_800ep() -> TrainConfig:
    """ViT-B/16, 800 epochs of ImageNet-1K.

    Command: tarmac pretrain mae_base_800ep --data s3://BUCKET/imagenet/train --run s3://BUCKET/runs/base
        --num-workers 8 --gpus-per-worker 1
    Hardware: 8 A100, one rank each.
    Hours: 18 [P: DailyMAE, its own loader, 15.8 k images/s a node]; not yet run by us.
    Expected: top-1 83.3 fine-tuned, 65.1 linear probe [P: MMSelfSup's model zoo, 800 epochs]; the paper reports 83.6
        and 68.0 after 1600.
    """
    return _imagenet(_BASE, patch_size=16, num_epochs=800, micro_batch_size=512)


def mae_base_cross_800ep() -> TrainConfig:
    """ViT-B/16 with CrossMAE's decoder, 800 epochs of ImageNet-1K: the fast variant.

    Twelve decoder blocks in which each mask token looks at the encoder's tokens only, and a quarter of the patches
    predicted.

    Command: tarmac pretrain mae_base_cross_800ep --data s3://BUCKET/imagenet/train --run s3://BUCKET/runs/cross
        --num-workers 4 --gpus-per-worker 1
    Hardware: 4 A100, one rank each.
    Hours: 42, from 1,689 images/s a GPU [P: the CrossMAE paper] and no loss in between; not yet run by us.
    Expected: top-1 83.7 fine-tuned [P: the CrossMAE release, which predicts all removed patches: leave out
        --model.predict-ratio for that]. Its optimizer settings are MAE's.
    """
    cross = replace(_BASE, decoder="cross", decoder_depth=12, predict_ratio=0.25)
    return _imagenet(cross, patch_size=16, num_epochs=800, micro_batch_size=512)


def mae_large_800ep() -> TrainConfig:
    """ViT-L/16, 800 epochs of ImageNet-1K: the paper's ablation setting.

    Command: tarmac pretrain mae_large_800ep --data s3://BUCKET/imagenet/train --run s3://BUCKET/runs/large
        --num-workers 64 --gpus-per-worker 1
    Hardware: 64 V100, one rank each.
    Hours: 42 [P: the official PyTorch release]; 15.4 on 128 TPUv3 cores [P: the paper's table 2]; not yet run by us.
        V100s have no bfloat16: add --parallel.precision fp32 there.
    Expected: top-1 85.4 fine-tuned, 73.7 linear probe [P: MMSelfSup's model zoo, 800 epochs].
    """
    return _imagenet(_LARGE, patch_size=16, num_epochs=800, micro_batch_size=256)


def mae_large_1600ep() -> TrainConfig:
    """ViT-L/16, 1600 epochs of ImageNet-1K: the paper's headline for this size.

    Command: tarmac pretrain mae_large_1600ep --data s3://BUCKET/imagenet/train --run s3://BUCKET/runs/large
        --num-workers 64 --gpus-per-worker 1
    Hardware: 64 V100, one rank each (see mae_large_800ep).
    Hours: 84, twice those of 800 epochs [P]; not yet run by us.
    Expected: top-1 85.9 fine-tuned, 75.8 linear probe [P: the paper]; 85.1 fine-tuned without norm_pix_loss [P].
    """
    return _imagenet(_LARGE, patch_size=16, num_epochs=1600, micro_batch_size=256)


def mae_huge_1600ep() -> TrainConfig:
    """ViT-H/14, 1600 epochs of ImageNet-1K: the paper's best.

    Command: tarmac pretrain mae_huge_1600ep --data s3://BUCKET/imagenet/train --run s3://BUCKET/runs/huge
        --num-workers 64 --gpus-per-worker 1
    Hardware: 64 GPUs of 32 GiB or more, one rank each.
    Hours: 69 on 128 TPUv3 cores, twice the 34.5 of 800 epochs [P: the paper's table 2]; not yet run by us.
    Expected: top-1 86.9 fine-tuned at 224 px, 87.8 at 448 px, 76.6 linear probe [P: the paper].
    """
    return _imagenet(_HUGE, patch_size=14, num_epochs=1600, micro_batch_size=128)


def imagenet_tiny() -> TrainConfig:
    """ViT-tiny/16 at 224 px with a small decoder, 200 steps: the whole machinery on a laptop, not a good model.

    Command: tarmac pretrain imagenet_tiny --data s3://BUCKET/imagenet-samples --run s3://BUCKET/runs/tiny
        --num-workers 2
    Hardware: 2 CPU cores, one rank each.
    Hours: 0.06, 37 images/s, measured on an AMD EPYC by `make verify-resume` with 1,000 ImageNet photographs.
    Expected: loss 0.98 at step 20, 0.74 at step 200, measured likewise; 200 steps give no accuracy to speak of.
    """
    return TrainConfig(
        data=DataConfig(global_batch_size=32, num_lanes=8),
        model=ModelConfig(
            embed_dim=192, depth=12, num_heads=3, decoder_embed_dim=128, decoder_depth=2, decoder_num_heads=4
        ),
        optim=OptimConfig(base_lr=8e-3, num_steps=200, warmup_fraction=0.1),
        parallel=ParallelConfig(precision="fp32"),
        checkpoint=CheckpointConfig(every_steps=20),
        log=LogConfig(every_steps=5),
    )


def imagenet_small() -> TrainConfig:
    """ViT-S/16 at 224 px with a small decoder: the largest that is of use on a few CPUs.

    Command: tarmac pretrain imagenet_small --data s3://BUCKET/imagenet-samples --run s3://BUCKET/runs/small
        --num-workers 2
    Hardware: 16 CPU cores or more, or one GPU.
    Hours: not yet run by us.
    Expected: no published number for this setting, and not yet run by us.
    """
    return TrainConfig(
        data=DataConfig(global_batch_size=256, num_lanes=32),
        model=ModelConfig(
            embed_dim=384, depth=12, num_heads=6, decoder_embed_dim=192, decoder_depth=4, decoder_num_heads=6
        ),
        optim=OptimConfig(base_lr=1e-3, num_epochs=100.0),
        checkpoint=CheckpointConfig(every_steps=200),
    )


def cifar_tiny() -> TrainConfig:
    """A small ViT with 4-pixel patches on CIFAR-10's 32-pixel images, 20 epochs.

    Command: tarmac shard cifar10/train s3://BUCKET/cifar10
        tarmac pretrain cifar_tiny --data s3://BUCKET/cifar10 --run s3://BUCKET/runs/cifar --num-workers 2
    Hardware: 2 CPU cores, one rank each.
    Hours: about 1: the model alone takes 168 images/s a core, measured on an AMD EPYC; not yet run by us to the end.
    Expected: no published number for this setting, and not yet run by us.
    """
    return TrainConfig(
        data=DataConfig(global_batch_size=256, num_lanes=32, augment=AugmentConfig(image_size=(32, 32), patch_size=4)),
        model=ModelConfig(
            embed_dim=192, depth=6, num_heads=3, decoder_embed_dim=96, decoder_depth=2, decoder_num_heads=3
        ),
        optim=OptimConfig(base_lr=1e-3, num_epochs=20.0, warmup_fraction=0.1),
        parallel=ParallelConfig(precision="fp32"),
        checkpoint=CheckpointConfig(every_steps=200),
    )


def demo() -> TrainConfig:
    """A small ViT at 96 px that learns the built-in photographs' shapes and colours in 600 steps; for `make demo`.

    The pixel loss is not normalised: the picture then shows what the model alone makes of a removed patch, with no
    mean or contrast lent by the original.

    Command: tarmac pretrain demo --data s3://BUCKET/photos --run s3://BUCKET/runs/demo --num-workers 2
    Hardware: 2 CPU cores, one rank each.
    Hours: 0.04 for the model alone, 0.24 s a step, measured in one process on 2 cores of an AMD EPYC.
    Expected: loss 1.67 over the first 10 steps, 0.41 over the last 10, measured likewise on 2,000 crops of the
        photographs in scikit-image and scikit-learn.
    """
    return TrainConfig(
        data=DataConfig(
            global_batch_size=32,
            num_lanes=8,
            # Few photographs and few steps: crops that show most of one are learned sooner.
            augment=AugmentConfig(image_size=(96, 96), patch_size=8, crop_scale=(0.35, 1.0)),
        ),
        model=ModelConfig(
            embed_dim=192,
            depth=4,
            num_heads=3,
            decoder_embed_dim=128,
            decoder_depth=2,
            decoder_num_heads=4,
            norm_pix_loss=False,
        ),
        optim=OptimConfig(base_lr=1.6e-2, num_steps=600, warmup_fraction=0.1),
        parallel=ParallelConfig(precision="fp32"),
        checkpoint=CheckpointConfig(every_steps=50),
        log=LogConfig(every_steps=5),
    )


_BASE = ModelConfig(embed_dim=768, depth=12, num_heads=12)
_LARGE = ModelConfig(embed_dim=1024, depth=24, num_heads=16)
_HUGE = ModelConfig(embed_dim=1280, depth=32, num_heads=16)


def _imagenet(model: ModelConfig, *, patch_size: int, num_epochs: int, micro_batch_size: int) -> TrainConfig:
    """The paper's pretraining (table 8): 4096 images a step, 40 epochs of warm-up, peak rate 2.4e-3."""
    return TrainConfig(
        data=DataConfig(
            global_batch_size=4096,
            num_lanes=256,
            decode_device="mixed",
            micro_batch_size=micro_batch_size,
            augment=AugmentConfig(patch_size=patch_size),
        ),
        model=model,
        optim=OptimConfig(num_epochs=float(num_epochs), warmup_fraction=40 / num_epochs),
    )


BOOK = RecipeBook(
    mae_base_800ep,
    mae_base_cross_800ep,
    mae_large_800ep,
    mae_large_1600ep,
    mae_huge_1600ep,
    imagenet_tiny,
    imagenet_small,
    cifar_tiny,
    demo,
)
names, get, summary = BOOK.names, BOOK.get, BOOK.summary
