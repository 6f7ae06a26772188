"""Files as they are found in the wild: what is stored as it is, what is converted, and what is refused, and why."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import skimage.data
from PIL import Image

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
    "html": (b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n", "no JPEG, PNG, WebP"),
    "zeros": (bytes(1000), "no JPEG, PNG, WebP"),
    "half a jpeg": (JPEG[: len(JPEG) // 2], "truncated"),
    "jpeg without its end": (JPEG[:-2], "truncated"),
    "jpeg header": (JPEG[:300], "cannot be decoded|no JPEG"),
    "half a png": (PNG[: len(PNG) // 2], "cannot be decoded"),
    "png without its end": (PNG[:-12], "the PNG is cut off"),
    "png with a wrong checksum": (PNG[:-1] + b"?", "checksum"),
    "half a webp": (encoded(PHOTO, "WEBP")[:-20], "cannot be decoded|cut off"),
    "half a gif": (encoded(PHOTO, "GIF")[:-2000], "truncated"),
    "bomb": (bomb(), "pixels|decompression bomb"),
    "large": (encoded(Image.new("1", (10_000, 9_000)), "PNG"), "10000 x 9000 pixels are more than"),
    "float tiff": (encoded(GREY.convert("F"), "TIFF"), "32-bit pixels"),
}
