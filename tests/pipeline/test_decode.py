"""Pixels against PIL, independence of threads and batches, and recovery from inputs that kill a DALI pipeline."""

import io
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.augment import Crops
from pipeline.config import AugmentConfig
from pipeline.decode import DecodeError, Decoder, mixed_pipeline

CONFIG = AugmentConfig(image_size=(48, 64), patch_size=16)


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth areas, edges and noise, as photographs have."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [127 + 120 * np.sin(x / rng.uniform(3, 30) + y / rng.uniform(3, 30)) for _ in range(3)]
    pixels = np.stack(waves, axis=2) + rng.normal(0, 8, (height, width, 3))
    pixels[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_crops(boxes: list[tuple[int, int, int, int]], flip: bool = False) -> Crops:
    top, left, height, width = np.array(boxes).T
    return Crops(top, left, height, width, np.full(len(boxes), flip))


def pil_augment(data: bytes, box: tuple[int, int, int, int], size: tuple[int, int], flip: bool) -> np.ndarray:
    """Full decode, crop, one bicubic pass a direction, flip: [3, H, W]."""
    top, left, height, width = box
    crop = Image.open(io.BytesIO(data)).convert("RGB").crop((left, top, left + width, top + height))
    resized = crop.resize((size[1], height), Image.Resampling.BICUBIC).resize(size[::-1], Image.Resampling.BICUBIC)
    pixels = np.asarray(resized)[:, ::-1] if flip else np.asarray(resized)
    return pixels.transpose(2, 0, 1)


@pytest.fixture
def decoder():
    decoder = Decoder(CONFIG, device="cpu", num_threads=2, max_batch_size=4)
    yield decoder
    decoder.close()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    "box", [(0, 0, 200, 300), (13, 57, 120, 201), (3, 5, 30, 31), (199, 0, 1, 300), (7, 9, 48, 64)]
)
def test_matches_pil_within_one_level(decoder, box, flip):
    data = encode(photo(200, 300), quality=92)
    images = decoder.decode([data], make_crops([box], flip))
    expected = pil_augment(data, box, CONFIG.image_size, flip)
    difference = np.abs(images[0].numpy().astype(int) - expected)
    assert difference.max() <= 1
    assert difference.mean() < 0.02


def test_saturates_instead_of_wrapping(decoder):
    # Bicubic overshoots at black and white edges; an overflow would turn white into black.
    board = (np.indices((90, 120)).sum(axis=0) // 7 % 2 * 255).astype(np.uint8)
    data = encode(Image.fromarray(np.stack([board] * 3, axis=2)), "PNG")
    images = decoder.decode([data], make_crops([(0, 0, 30, 40)]))
    expected = pil_augment(data, (0, 0, 30, 40), CONFIG.image_size, False)
    assert images.min() == 0
    assert images.max() == 255
    assert np.abs(images[0].numpy().astype(int) - expected).max() <= 1


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_roi_decode_equals_full_decode_and_crop(options):
    # A crop of the output's size is not resized, so that the decoded pixels come through unchanged.
    data = encode(photo(211, 317), quality=88, **options)
    config = AugmentConfig(image_size=(64, 64))
    decoder = Decoder(config, device="cpu", num_threads=2, max_batch_size=8)
    boxes = [(0, 0, 64, 64), (1, 3, 64, 64), (147, 253, 64, 64), (17, 119, 64, 64), (8, 16, 64, 64)]
    images = decoder.decode([data] * len(boxes), make_crops(boxes)).numpy()
    decoder.close()
    full = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    for image, (top, left, height, width) in zip(images, boxes, strict=True):
        np.testing.assert_array_equal(image.transpose(1, 2, 0), full[top : top + height, left : left + width])


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_boxes_are_in_stored_pixels_whatever_exif_says(decoder, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo(100, 300), exif=exif)
    box = (20, 150, 80, 150)  # outside of the image if width and height are swapped
    images = decoder.decode([data], make_crops([box]))
    expected = pil_augment(data, box, CONFIG.image_size, False)
    assert np.abs(images[0].numpy().astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("L", "JPEG", {}),
        ("CMYK", "JPEG", {}),
        ("RGB", "PNG", {}),
        ("L", "PNG", {}),
        ("P", "PNG", {}),
        ("RGBA", "PNG", {}),
        ("RGB", "WEBP", {"quality": 80}),
        ("RGB", "WEBP", {"lossless": True}),
    ],
)
def test_other_formats(decoder, mode, kind, options):
    data = encode(photo(90, 130).convert(mode), kind, **options)
    images = decoder.decode([data], make_crops([(10, 20, 70, 100)], flip=True))
    expected = pil_augment(data, (10, 20, 70, 100), CONFIG.image_size, True)
    assert np.abs(images[0].numpy().astype(int) - expected).max() <= 1


def some_batch(num: int) -> tuple[list[bytes], Crops]:
    data = [encode(photo(80 + 7 * i, 150 - 5 * i, seed=i)) for i in range(num)]
    crops = make_crops([(i, 2 * i, 60 + i, 70) for i in range(num)])
    crops.flip[::2] = True
    return data, crops


def test_pixels_do_not_depend_on_threads_or_batches():
    data, crops = some_batch(11)
    results = []
    for num_threads, max_batch_size in [(1, 1), (1, 16), (4, 3), (4, 16)]:
        decoder = Decoder(CONFIG, device="cpu", num_threads=num_threads, max_batch_size=max_batch_size)
        results.append(decoder.decode(data, crops))
        again = decoder.decode([memoryview(data[5])], Crops(*(x[5:6] for x in columns(crops))))
        assert torch.equal(again[0], results[-1][5])
        decoder.close()
    assert all(torch.equal(result, results[0]) for result in results)
    assert results[0].is_contiguous(memory_format=torch.channels_last)
    assert results[0].dtype == torch.uint8


def columns(crops: Crops) -> tuple[np.ndarray, ...]:
    return crops.top, crops.left, crops.height, crops.width, crops.flip


def test_torch_starts_no_threads_beside_ours():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    decoder = Decoder(AugmentConfig(image_size=(512, 512)), device="cpu", num_threads=1)
    try:
        data, whole = [encode(photo(60, 80))] * 8, [(0, 0, 60, 80)] * 8
        decoder.decode(data, make_crops(whole))
        num_threads = len(os.listdir("/proc/self/task"))
        decoder.decode(data, make_crops(whole, flip=True))  # so large that torch would share it out
        assert len(os.listdir("/proc/self/task")) == num_threads
        with ThreadPoolExecutor(1) as another:  # the model's threads are as many as before
            assert torch.get_num_threads() == another.submit(torch.get_num_threads).result() == 2
    finally:
        decoder.close()
        torch.set_num_threads(before)


def test_no_images(decoder):
    empty = Crops(*(np.zeros(0, int) for _ in range(4)), np.zeros(0, bool))
    assert decoder.decode([], empty).shape == (0, 3, 48, 64)


def test_bad_inputs_are_named_and_the_decoder_goes_on(decoder, capfd):
    data, crops = some_batch(10)
    before = decoder.decode(data, crops)
    bad = list(data)
    bad[1] = b""
    bad[4] = b"<html>404 not found</html>" * 20
    bad[8] = data[8][:300]
    crops.height[9] = 10_000
    with pytest.raises(DecodeError) as caught:
        decoder.decode(bad, crops)
    assert caught.value.indices == [1, 4, 8, 9]
    assert "not an image" in caught.value.reasons[1]
    assert "not valid for image dimensions" in caught.value.reasons[3]
    assert all(0 < len(reason) < 200 and "\n" not in reason for reason in caught.value.reasons)
    assert "input 4: not an image" in str(caught.value)
    crops.height[9] = 69
    assert torch.equal(decoder.decode(data, crops), before)
    capfd.readouterr()  # the codecs' own complaints


def test_mixed_graph_is_well_formed():
    # It cannot be built without a GPU; DALI checks operators, arguments and devices when it is put together.
    pipe = mixed_pipeline(None, num_threads=1, max_batch_size=4, image_size=(224, 224))
    graph = pipe.serialize()
    for operator in (b"decoders__Image", b"Slice", b"Resize", b"Flip"):
        assert operator in graph


@pytest.mark.gpu
def test_mixed_is_close_to_cpu_and_repeats():
    data, crops = some_batch(11)
    images = []
    for device, max_batch_size in [("cpu", 16), ("mixed", 16), ("mixed", 3)]:
        decoder = Decoder(CONFIG, device=device, num_threads=2, max_batch_size=max_batch_size)
        images.append(decoder.decode(data, crops).cpu())
        decoder.close()
    assert torch.equal(images[1], images[2])
    assert (images[0].float() - images[1].float()).abs().mean() < 1
