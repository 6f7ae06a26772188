import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.augment import draw_crops
from pipeline.config import AugmentConfig, DataConfig
from trainer.config import ModelConfig, TrainConfig
from trainer.curve import draw_loss_curve, restart_steps
from trainer.evaluate.reconstruct import draw_reconstructions, reconstruct_images, whole_image_config
from trainer.mae import build_mae, normalize
from trainer.vit import patchify

AUGMENT = AugmentConfig(image_size=(32, 48), patch_size=8)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (2, 3, 32, 48), generator=generator, dtype=torch.uint8)
    images[0, :, :8, :8] = 77  # a flat patch: its deviation is next to nothing
    order = torch.rand(2, 24, generator=generator).argsort(dim=1)
    return images, order[:, :6], order[:, 6:]


def build(norm_pix_loss):
    model = ModelConfig(
        embed_dim=16, depth=1, num_heads=2, decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2,
        norm_pix_loss=norm_pix_loss,
    )  # fmt: skip
    return build_mae(TrainConfig(model=model, data=DataConfig(augment=AUGMENT)))


def predict_perfectly(model, images, kept_ids, masked_ids):
    """Make the model's last layer say what the loss asks for."""
    patches = patchify(normalize(images, AUGMENT.mean, AUGMENT.std), 8)
    if model.norm_pix_loss:
        mean = patches.mean(-1, keepdim=True)
        patches = (patches - mean) / (((patches - mean) ** 2).sum(-1, keepdim=True) / 191 + 1e-6) ** 0.5
    answer = torch.stack([patches[i][ids] for i, ids in enumerate(masked_ids)])
    model.decoder_pred.register_forward_hook(lambda module, args, out: answer)


def patch_of(images, i, patch):
    row, column = divmod(patch, 6)
    return images[i, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_perfect_prediction_reproduces_the_image(batch, norm_pix_loss):
    images, kept_ids, masked_ids = batch
    model = build(norm_pix_loss)
    predict_perfectly(model, images, kept_ids, masked_ids)
    pixels = normalize(images, AUGMENT.mean, AUGMENT.std)
    assert model(pixels, kept_ids, masked_ids).max() < 1e-8
    torch.testing.assert_close(model.reconstruct(pixels, kept_ids, masked_ids), pixels)
    *_, both = reconstruct_images(model, AUGMENT, images, kept_ids, masked_ids)
    assert torch.equal(both, images)


def test_visible_and_predicted_patches_are_kept_apart(batch):
    images, kept_ids, masked_ids = batch
    visible, predicted, both = reconstruct_images(build(True), AUGMENT, images, kept_ids, masked_ids)
    for i in range(2):
        for patch in range(24):
            if patch in kept_ids[i]:
                assert torch.equal(patch_of(visible, i, patch), patch_of(images, i, patch))
                assert torch.equal(patch_of(both, i, patch), patch_of(images, i, patch))
                assert (patch_of(predicted, i, patch) == 128).all()
            else:
                assert (patch_of(visible, i, patch) == 128).all()
                assert torch.equal(patch_of(both, i, patch), patch_of(predicted, i, patch))
                assert not torch.equal(patch_of(both, i, patch), patch_of(images, i, patch))


def test_pictures_are_of_whole_images():
    trained = DataConfig(augment=AUGMENT, decode_device="mixed", micro_batch_size=64)
    drawn = whole_image_config(trained, num_samples=5, seed=9)
    assert (drawn.global_batch_size, drawn.seed, drawn.decode_device) == (5, 9, "cpu")
    heights, widths = np.array([320, 300, 500]), np.array([480, 500, 200])
    crops = draw_crops(drawn.augment, 9, np.zeros(3, np.int64), np.arange(3), heights, widths)
    assert list(zip(crops.height, crops.width, strict=True)) == [(320, 480), (300, 450), (133, 200)]
    assert list(zip(crops.top, crops.left, strict=True)) == [(0, 0), (0, 25), (183, 0)]
    assert not crops.flip.any()


def test_picture_shows_four_columns(batch):
    images, kept_ids, masked_ids = batch
    model = build(True)
    predict_perfectly(model, images, kept_ids, masked_ids)
    picture = np.asarray(draw_reconstructions(model, AUGMENT, images, kept_ids, masked_ids))
    # 48 x 32 pixels magnified four times, with gaps of 6 and a header of 26.
    assert picture.shape == (26 + 2 * (128 + 6), 6 + 4 * (192 + 6), 3)
    for column in (2, 3):
        left = 6 + column * 198
        cell = picture[26 + 134 : 26 + 134 + 128 : 4, left : left + 192 : 4]
        np.testing.assert_array_equal(cell, images[1].permute(1, 2, 0).numpy())


def test_loss_curve_is_a_picture(tmp_path):
    records = [{"step": step, "loss": 1 / step, "lr": 1e-3 * step} for step in range(200, 0, -1)]
    events = [
        {"event": "start", "step": 0},
        {"event": "save", "step": 100},
        {"event": "start", "step": 100},
        {"event": "start", "step": 150},
    ]
    assert restart_steps(events) == [100, 150]
    for some in (records, records[-1:]):
        draw_loss_curve(some, events, tmp_path / "loss.png")
        with Image.open(tmp_path / "loss.png") as picture:
            assert picture.format == "PNG"
            assert picture.size == (1080, 660)


def test_loss_curve_needs_records(tmp_path):
    with pytest.raises(ValueError, match="at least one record"):
        draw_loss_curve([], [], tmp_path / "loss.png")
