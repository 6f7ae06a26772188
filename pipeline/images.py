"""One encoded image, as it will be stored: proven whole, in a format and a mode that training decodes."""

from __future__ import annotations

import io
import re
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.jpeg import read_jpeg_header

Check = Literal["structure", "pixels"]
"""How an image is proven whole: by what its file says of itself, or by decoding it."""

MAX_IMAGE_BYTES = 2**28
# Pillow's own limit against decompression bombs, a quarter GiB of RGB: the largest photographs pass.
MAX_IMAGE_PIXELS = 89_478_485

# Kept byte for byte. BMP and TIFF have too many variants to trust each to a decoder: they become PNG, without loss.
_KEPT_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_READ_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
_KEPT_MODES = ("RGB", "L")
_16_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_Result = TypeVar("_Result")
_ADDRESS = re.compile(r"<[^<>]* at 0x[0-9a-fA-F]+>")


class BadImageError(Exception):
    """The bytes are not a whole image that can be trained on; the message says why."""


@dataclass(frozen=True, slots=True)
class StoredImage:
    """Bytes for a shard; `extension` is that of the content, height and width are without EXIF rotation."""

    data: bytes
    extension: str
    height: int
    width: int
    converted: bool


def prepare_image(data: bytes, max_side: int | None = None, check: Check = "structure") -> StoredImage:
    """Prove an image whole, and choose what is stored of it.

    By its structure: a JPEG has a sane header, its tables, and an end of image after its last scan; all chunks of a PNG
    are there and match their checksums; a WebP is as long as it says. Cut off files fail that, whatever is left of
    them. Damage inside of a JPEG's or a WebP's pixels passes; most of it passes decoders as well. What is converted is
    decoded either way.

    RGB and 8-bit grey JPEG, PNG and WebP are stored as they are, 16-bit RGB PNG and animated PNG (of which decoders
    show the first picture) among them. The rest is stored as an 8-bit RGB PNG: CMYK, palette, 1-bit and 16-bit grey
    pixels, alpha, animated WebP and GIF (their first frame), BMP, TIFF (its first page) and GIF. 16-bit grey is scaled
    to 8 bits; alpha is dropped, not blended, as the usual `convert("RGB")` of image-folder loaders does.

    Args:
        data: the file.
        max_side: in pixels. An image with a longer side is made smaller until that has this length, and stored as a
            JPEG of quality 95 if it was a JPEG, otherwise as PNG. The same image gives the same bytes.
        check: `pixels` decodes what is stored as it is, too. It costs five times the time.

    Raises:
        BadImageError: the bytes are no image, or a damaged, too large or unsupported one.
    """
    return _explained(data, lambda data: _prepare(data, max_side, check))


def measure_image(data: bytes) -> tuple[int, int]:
    """Height and width of an image that stays where it is, from its header; without EXIF rotation.

    Its pixels are not decoded, but it is refused where its end is missing, or where decoders disagree about it.

    Raises:
        BadImageError: the bytes are no image, or a cut off, too large or unsupported one.
    """
    return _explained(data, _measure)


def _explained(data: bytes, work: Callable[[bytes], _Result]) -> _Result:
    """Call `work`; whatever it trips over becomes a BadImageError."""
    if not data:
        raise BadImageError("the file is empty")
    if len(data) > MAX_IMAGE_BYTES:
        raise BadImageError(f"{len(data)} bytes are more than an image may have ({MAX_IMAGE_BYTES})")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata is not our concern; sizes are checked here
            return work(data)
    except UnidentifiedImageError as error:
        raise BadImageError("the content is no JPEG, PNG, WebP, BMP, TIFF or GIF image") from error
    except BadImageError:
        raise
    except Exception as error:  # decoders raise whatever a damaged file makes them trip over
        # Without addresses, so that the manifest is the same each time.
        reason = _ADDRESS.sub("the file", str(error)).strip() or type(error).__name__
        raise BadImageError(f"cannot be decoded: {reason}") from error


def _prepare(data: bytes, max_side: int | None, check: Check) -> StoredImage:
    if check == "structure" and (size := _jpeg_size(data)) is not None and max(size) <= (max_side or max(size)):
        return StoredImage(data, "jpg", *size, converted=False)
    with Image.open(io.BytesIO(data), formats=_READ_FORMATS) as image:
        width, height = _checked_size(image.width, image.height)
        image_format = image.format or ""
        animated_webp = image_format == "WEBP" and getattr(image, "n_frames", 1) > 1
        extension = _KEPT_FORMATS.get(image_format)
        too_large = max_side is not None and max(width, height) > max_side
        kept = extension is not None and image.mode in _KEPT_MODES and not animated_webp and not too_large
        if not kept or check == "pixels" or extension == "jpg":  # an odd JPEG
            image.load()
        _check_whole(data, image_format)
        if max_side is not None and too_large:
            return _resized(image, max_side, "JPEG" if image_format in ("JPEG", "MPO") else "PNG")
        if extension is not None and kept:
            return StoredImage(data, extension, height, width, converted=False)
        rgb = _to_rgb(image)
    rgb.info.clear()  # a colour profile or a transparent colour of the old mode would be wrong in the new one
    buffer = io.BytesIO()
    rgb.save(buffer, "PNG")
    return StoredImage(buffer.getvalue(), "png", rgb.height, rgb.width, converted=True)


def _measure(data: bytes) -> tuple[int, int]:
    if (size := _jpeg_size(data)) is not None:
        return size
    with Image.open(io.BytesIO(data), formats=_READ_FORMATS) as image:
        width, height = _checked_size(image.width, image.height)
        image_format, mode = image.format, image.mode
    if image_format == "GIF" or mode in (*_16_BIT_MODES, "I", "F"):
        raise BadImageError(
            f"{image_format} images with {mode} pixels cannot be trained on in place; `tarmac shard` converts most"
        )
    _check_whole(data, image_format or "")
    return height, width


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of a whole and ordinary JPEG."""
    header = read_jpeg_header(data)
    if header is None:
        return None
    _checked_size(header.width, header.height)
    return header.height, header.width


def _check_whole(data: bytes, image_format: str) -> None:
    """Refuse a file whose end is missing, as far as its format tells."""
    if image_format == "PNG":
        _check_png(data)
    # Between a start of scan and an end of image no such pair of bytes can be: data bytes of FF are stuffed with 00.
    if image_format in ("JPEG", "MPO") and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
        raise BadImageError("the JPEG is cut off: it has no end of image")
    if image_format == "WEBP" and len(data) < 8 + int.from_bytes(data[4:8], "little"):
        raise BadImageError("the WebP is cut off")


def _checked_size(width: int, height: int) -> tuple[int, int]:
    if width * height > MAX_IMAGE_PIXELS:
        raise BadImageError(f"{width} x {height} pixels are more than an image may have ({MAX_IMAGE_PIXELS})")
    return width, height


def _resized(image: Image.Image, max_side: int, image_format: str) -> StoredImage:
    kept_mode = image.mode in _KEPT_MODES
    # Of what the file says beside its pixels, only how to read their colours: a rotation stays undone, as everywhere.
    options = {"icc_profile": image.info.get("icc_profile")} if kept_mode else {}
    scale = max_side / max(image.size)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    small = (image if kept_mode else _to_rgb(image)).resize(size, Image.Resampling.LANCZOS)
    small.info.clear()
    buffer = io.BytesIO()
    small.save(buffer, image_format, **options | ({"quality": 95} if image_format == "JPEG" else {}))
    return StoredImage(buffer.getvalue(), _KEPT_FORMATS[image_format], small.height, small.width, converted=True)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _16_BIT_MODES:
        wide = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadImageError(f"32-bit pixels (mode {image.mode}) have no defined range; convert it to 8 or 16 bits")
    return image.convert("RGB")


def _check_png(data: bytes) -> None:
    """Check that all chunks are whole: Pillow stops at the last pixel, other decoders refuse what follows.

    Source: W3C PNG specification, section 5.3, chunk layout.
    """
    position = len(_PNG_SIGNATURE)
    while True:
        length = int.from_bytes(data[position : position + 4], "big")
        end = position + 12 + length
        if end > len(data):
            raise BadImageError("cannot be decoded: the PNG is cut off")
        if zlib.crc32(data[position + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise BadImageError("cannot be decoded: a chunk of the PNG does not match its checksum")
        if data[position + 4 : position + 8] == b"IEND":
            return
        position = end
