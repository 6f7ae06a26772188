from __future__ import annotations

import io

import numpy as np
import pytest
from corpus import BAD, CONVERTED, KEPT, PHOTO, encoded, rotated_exif
from hypothesis import given
from hypothesis import strategies as st
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

from pipeline.images import BadImageError, Check, StoredImage, measure_image, prepare_image
from pipeline.jpeg import JpegHeader, read_jpeg_header


def decode_with_dali(data: bytes) -> np.ndarray:
    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def decode() -> object:
        bytes_in = fn.external_source(lambda: [np.frombuffer(data, np.uint8)], batch=True)
        return fn.decoders.image(bytes_in, device="cpu", output_type=types.RGB, adjust_orientation=False)

    (images,) = decode().run()
    return np.array(images.at(0))


CHECKS: tuple[Check, ...] = ("structure", "pixels")


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", KEPT)
def test_what_training_decodes_is_kept_byte_for_byte(name: str, check: Check) -> None:
    data, extension = KEPT[name]
    image = prepare_image(data, check=check)
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


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_has_a_reason(name: str, check: Check) -> None:
    data, reason = BAD[name]
    with pytest.raises(BadImageError, match=reason) as error:
        prepare_image(data, check=check)
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


def cuts(data: bytes) -> list[bytes]:
    return [data[: len(data) * share // 8] for share in range(1, 8)] + [data[:-2], data[:-1]]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"exif": rotated_exif()}])
def test_a_jpeg_that_is_cut_off_anywhere_is_refused(options: dict[str, object], check: Check) -> None:
    whole = encoded(PHOTO, "JPEG", **options)
    assert prepare_image(whole, check=check).data == whole
    for data in cuts(whole):
        with pytest.raises(BadImageError):
            prepare_image(data, check=check)


@pytest.mark.parametrize("name", [name for name, (data, _) in {**KEPT, **CONVERTED}.items() if data[:2] == b"\xff\xd8"])
def test_the_header_of_a_jpeg_is_what_a_decoder_says(name: str) -> None:
    data = {**KEPT, **CONVERTED}[name][0]
    header = read_jpeg_header(data)
    decoded = Image.open(io.BytesIO(data))
    if decoded.mode == "CMYK":
        assert header is None
        return
    assert header == JpegHeader(decoded.height, decoded.width, {"L": 1, "RGB": 3}[decoded.mode])
    assert read_jpeg_header(data[:2] + b"\xff\xff" + data[3:]) == header  # fill bytes
    frame = data.index(b"\xff\xc2" if "progressive" in name else b"\xff\xc0")
    for marker in (0xC3, 0xC9):  # lossless; arithmetic codes
        assert read_jpeg_header(data[: frame + 1] + bytes([marker]) + data[frame + 2 :]) is None
    assert read_jpeg_header(data[: frame + 4] + b"\x0c" + data[frame + 5 :]) is None  # 12 bits
    assert read_jpeg_header(data.replace(b"\xff\xdb", b"\xff\xee")) is None  # no tables


@given(st.binary(max_size=300), st.integers(0, 400))
def test_a_damaged_header_never_raises(noise: bytes, at: int) -> None:
    data = KEPT["jpeg"][0]
    read_jpeg_header(data[:at] + noise + data[at + len(noise) :])
