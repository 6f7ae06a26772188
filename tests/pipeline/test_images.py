from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import skimage.data
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

from pipeline.images import BadImageError, StoredImage, measure_image, prepare_image

PHOTO = Image.fromarray(skimage.data.astronaut()).crop((100, 0, 253, 101))
GREY = PHOTO.convert("L")
WIDE = np.asarray(GREY).astype(np.uint16) * 257


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def rotated_exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    return exif


def png_of_16_bit_rgb() -> bytes:
    """Written by hand: Pillow reads such files, but does not write them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    lines = b"".join(b"\0" + bytes(range(y, y + 42)) for y in range(5))  # [5, 7, 3] of two bytes
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def decode_with_dali(data: bytes) -> np.ndarray:
    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def decode() -> object:
        bytes_in = fn.external_source(lambda: [np.frombuffer(data, np.uint8)], batch=True)
        return fn.decoders.image(bytes_in, device="cpu", output_type=types.RGB, adjust_orientation=False)

    (images,) = decode().run()
    return np.array(images.at(0))


KEPT = {
    "jpeg": (encoded(PHOTO, "JPEG"), "jpg"),
    "grey jpeg": (encoded(GREY, "JPEG"), "jpg"),
    "progressive jpeg": (encoded(PHOTO, "JPEG", progressive=True), "jpg"),
    "jpeg with rotation": (encoded(PHOTO, "JPEG", exif=rotated_exif()), "jpg"),
    "jpeg with more after its end": (encoded(PHOTO, "JPEG") + b"more" * 9, "jpg"),
    "jpeg of two pictures": (encoded(PHOTO, "MPO", save_all=True, append_images=[GREY.rotate(90)]), "jpg"),
    "png": (encoded(PHOTO, "PNG"), "png"),
    "grey png": (encoded(GREY, "PNG"), "png"),
    "png with a transparent colour": (encoded(PHOTO, "PNG", transparency=(0, 0, 0)), "png"),
    "animated png": (encoded(PHOTO, "PNG", save_all=True, append_images=[PHOTO.rotate(90)]), "png"),
    "16-bit rgb png": (png_of_16_bit_rgb(), "png"),
    "webp": (encoded(PHOTO, "WEBP"), "webp"),
    "lossless webp": (encoded(PHOTO, "WEBP", lossless=True), "webp"),
    "one pixel": (encoded(PHOTO.resize((1, 1)), "JPEG"), "jpg"),
}
SHADE = Image.new("L", PHOTO.size, 77)
RGBA = Image.merge("RGBA", (*PHOTO.split(), SHADE))
CONVERTED = {
    "cmyk jpeg": (encoded(PHOTO.convert("CMYK"), "JPEG"), None),
    "palette png": (encoded(PHOTO.quantize(16), "PNG"), PHOTO.quantize(16).convert("RGB")),
    "png with alpha": (encoded(RGBA, "PNG"), PHOTO),
    "grey png with alpha": (encoded(Image.merge("LA", (GREY, SHADE)), "PNG"), GREY.convert("RGB")),
    "16-bit grey png": (encoded(Image.fromarray(WIDE), "PNG"), GREY.convert("RGB")),
    "16-bit grey tiff": (encoded(Image.fromarray(WIDE), "TIFF"), GREY.convert("RGB")),
    "black and white png": (encoded(PHOTO.convert("1"), "PNG"), PHOTO.convert("1").convert("RGB")),
    "webp with alpha": (encoded(RGBA, "WEBP", lossless=True, exact=True), PHOTO),
    "animated webp": (
        encoded(PHOTO, "WEBP", lossless=True, save_all=True, append_images=[PHOTO.rotate(90)]),
        PHOTO,
    ),
    "bmp": (encoded(PHOTO, "BMP"), PHOTO),
    "tiff": (encoded(PHOTO, "TIFF", compression="tiff_lzw"), PHOTO),
    "gif": (encoded(PHOTO.quantize(16), "GIF"), PHOTO.quantize(16).convert("RGB")),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_training_decodes_is_kept_byte_for_byte(name: str) -> None:
    data, extension = KEPT[name]
    image = prepare_image(data)
    decoded = decode_with_dali(image.data)
    assert image == StoredImage(data, extension, *decoded.shape[:2], converted=False)
    reference = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decoded - reference).max() <= 1  # 16 bits are rounded by one, and cut by the other


@pytest.mark.parametrize("name", CONVERTED)
def test_everything_else_becomes_an_rgb_png(name: str) -> None:
    data, reference = CONVERTED[name]
    image = prepare_image(data)
    decoded = decode_with_dali(image.data)
    assert (image.extension, image.height, image.width, image.converted) == ("png", *decoded.shape[:2], True)
    if reference is None:
        reference = Image.open(io.BytesIO(data)).convert("RGB")
    np.testing.assert_array_equal(decoded, np.asarray(reference))
    assert Image.open(io.BytesIO(image.data)).mode == "RGB"
    assert prepare_image(data).data == image.data


def test_16_bits_scale_to_the_ends() -> None:
    values = np.array([[0, 128, 129, 32768, 65406, 65407, 65535]], np.uint16)
    image = prepare_image(encoded(Image.fromarray(values), "PNG"))
    assert decode_with_dali(image.data)[0, :, 0].tolist() == [0, 0, 1, 128, 254, 255, 255]


def test_a_conversion_drops_the_old_colour_profile() -> None:
    image = prepare_image(encoded(PHOTO.convert("CMYK"), "JPEG", icc_profile=b"a profile for CMYK"))
    assert "icc_profile" not in Image.open(io.BytesIO(image.data)).info


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in few bytes: its header says so."""
    data = bytearray(encoded(Image.new("L", (8, 8)), "PNG"))
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


JPEG, PNG = encoded(PHOTO, "JPEG"), encoded(PHOTO, "PNG")
BAD = {
    "empty": (b"", "the file is empty"),
    "text": (b"not an image\n", "no JPEG, PNG, WebP"),
    "zeros": (bytes(1000), "no JPEG, PNG, WebP"),
    "half a jpeg": (JPEG[: len(JPEG) // 2], "truncated"),
    "jpeg without its end": (JPEG[:-2], "truncated"),
    "jpeg header": (JPEG[:300], "cannot be decoded|no JPEG"),
    "half a png": (PNG[: len(PNG) // 2], "cannot be decoded"),
    "png without its end": (PNG[:-12], "the PNG is cut off"),
    "png with a wrong checksum": (PNG[:-1] + b"?", "checksum"),
    "half a webp": (encoded(PHOTO, "WEBP")[:-20], "cannot be decoded"),
    "half a gif": (encoded(PHOTO, "GIF")[:-2000], "truncated"),
    "bomb": (bomb(), "pixels|decompression bomb"),
    "large": (encoded(Image.new("1", (10_000, 9_000)), "PNG"), "10000 x 9000 pixels are more than"),
    "float tiff": (encoded(GREY.convert("F"), "TIFF"), "32-bit pixels"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_has_a_reason(name: str) -> None:
    data, reason = BAD[name]
    with pytest.raises(BadImageError, match=reason) as error:
        prepare_image(data)
    assert " at 0x" not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [*KEPT, *CONVERTED])
def test_large_images_become_smaller(name: str) -> None:
    data = {**KEPT, **CONVERTED}[name][0]
    whole = prepare_image(data)
    longer = max(whole.height, whole.width)
    assert prepare_image(data, longer) == whole
    if longer == 1:
        return
    image = prepare_image(data, longer // 2)
    decoded = decode_with_dali(image.data)
    assert (image.height, image.width) == decoded.shape[:2]
    assert max(image.height, image.width) == longer // 2
    scale = longer // 2 / longer
    assert abs(image.height - whole.height * scale) <= 0.5
    assert abs(image.width - whole.width * scale) <= 0.5
    assert (image.extension, image.converted) == ("jpg" if "jpeg" in name else "png", True)
    original = Image.fromarray(decode_with_dali(whole.data))
    reference = original.resize((image.width, image.height), Image.Resampling.LANCZOS)
    error = np.abs(decoded - np.asarray(reference).astype(int)).mean()
    assert error < (2.5 if "jpeg" in name else 1.0)
    assert prepare_image(data, longer // 2) == image


def test_a_smaller_image_keeps_its_colours_and_its_rotation_as_stored() -> None:
    data = encoded(PHOTO, "JPEG", exif=rotated_exif(), icc_profile=b"a profile")
    small = Image.open(io.BytesIO(prepare_image(data, 50).data))
    assert (small.size, small.info["icc_profile"], len(small.getexif())) == ((50, 33), b"a profile", 0)
    narrow = prepare_image(encoded(Image.new("RGB", (1000, 2)), "PNG"), 10)
    assert (narrow.height, narrow.width) == (1, 10)
    cmyk = encoded(PHOTO.convert("CMYK"), "JPEG", icc_profile=b"a profile for CMYK")
    assert "icc_profile" not in Image.open(io.BytesIO(prepare_image(cmyk, 50).data)).info


NOT_IN_PLACE = ("16-bit grey png", "16-bit grey tiff", "gif")


@pytest.mark.parametrize("name", [*KEPT, *CONVERTED])
def test_an_image_in_place_is_measured_as_it_decodes_or_refused(name: str) -> None:
    data = {**KEPT, **CONVERTED}[name][0]
    if name in NOT_IN_PLACE:
        with pytest.raises(BadImageError, match="cannot be trained on in place"):
            measure_image(data)
        return
    decoded = decode_with_dali(data)
    assert measure_image(data) == decoded.shape[:2]
    reference = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decoded - reference).max() <= 1


@pytest.mark.parametrize("name", [name for name in BAD if name != "half a gif"])
def test_a_bad_image_in_place_has_a_reason(name: str) -> None:
    with pytest.raises(BadImageError, match=r"cut off|pixels|empty|decoded|no JPEG|decompression bomb|checksum"):
        measure_image(BAD[name][0])
