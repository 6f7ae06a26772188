"""Counter-based random numbers: each is a pure function of (seed, purpose, counters), with no running state."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

UInt64 = npt.NDArray[np.uint64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def stream_key(seed: int, purpose: str) -> np.uint64:
    """The key of one stream of random numbers; other purposes and seeds give independent streams."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def hash64(key: np.uint64, *counters: Any) -> UInt64:
    """64 random bits for each combination of counters.

    Args:
        key: from `stream_key`.
        counters: integers or integer arrays, broadcast against each other.

    Source: SplitMix64, the n-th output from a given state (Steele, Lea, Flood 2014, figure 17), once a counter.
    """
    state = np.asarray(key, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for counter in counters:
            state = _mix(state + (np.asarray(counter).astype(np.uint64) + np.uint64(1)) * _GAMMA)
    return state


def uniform(key: np.uint64, *counters: Any) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1) with 53 random bits, one for each combination of counters."""
    return (hash64(key, *counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(bits: UInt64) -> UInt64:
    bits = (bits ^ (bits >> np.uint64(30))) * _MIX_1
    bits = (bits ^ (bits >> np.uint64(27))) * _MIX_2
    return bits ^ (bits >> np.uint64(31))
