"""Bytes of any length that do not compress."""

from __future__ import annotations

import random

PART_BYTES = 5 * 2**20  # the shortest part that S3 takes


def noise(num_bytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(num_bytes)
