"""What a JPEG says of itself before and after its pixels, without decoding them."""

from __future__ import annotations

from dataclasses import dataclass

_START_OF_IMAGE, _END_OF_IMAGE, _START_OF_SCAN = b"\xff\xd8", b"\xff\xd9", b"\xff\xda"
_HUFFMAN_TABLE, _QUANTISATION_TABLE = 0xC4, 0xDB
# Baseline, extended sequential and progressive, all with Huffman codes: what every decoder reads.
_COMMON_FRAMES = (0xC0, 0xC1, 0xC2)
_ALL_FRAMES = {*range(0xC0, 0xD0)} - {_HUFFMAN_TABLE, 0xC8, 0xCC}
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD8)}


@dataclass(frozen=True, slots=True)
class JpegHeader:
    """Of the frame: height and width in pixels as stored, and its components."""

    height: int
    width: int
    num_components: int


def read_jpeg_header(data: bytes) -> JpegHeader | None:
    """The header of a whole and ordinary JPEG, or None where only a decoder can tell.

    Ordinary is: Huffman-coded, 8 bits, 1 or 3 components, both kinds of tables before the first scan, and an end of
    image after the last one. Between a start of scan and an end of image no such pair of bytes can be, since data bytes
    of FF are stuffed with 00.

    Source: ITU-T T.81, annex B.
    """
    if data[:2] != _START_OF_IMAGE:
        return None
    header, seen, at = None, set[int](), 2
    while data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        marker = data[at + 1]
        if marker == _START_OF_SCAN[1]:
            end = data.rfind(_END_OF_IMAGE)
            whole = end > at and data.find(_START_OF_SCAN, end) < 0
            return header if whole and {_HUFFMAN_TABLE, _QUANTISATION_TABLE} <= seen else None
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker in _WITHOUT_LENGTH:
            at += 2
            continue
        if marker in _ALL_FRAMES:
            if marker not in _COMMON_FRAMES or header is not None:
                return None
            header = _frame(data[at + 4 : at + 10])
            if header is None:
                return None
        seen.add(marker)
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _frame(fields: bytes) -> JpegHeader | None:
    """Precision, height, width and number of components of a frame header, if it is an ordinary one."""
    if len(fields) < 6 or fields[0] != 8 or fields[5] not in (1, 3):
        return None
    height, width = int.from_bytes(fields[1:3], "big"), int.from_bytes(fields[3:5], "big")
    return JpegHeader(height, width, fields[5]) if height and width else None
