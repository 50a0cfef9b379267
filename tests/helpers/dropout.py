"""The dropout decisions of the native kernels, in numpy. The kernels never store a mask."""

from __future__ import annotations

import numpy as np

HIDDEN, INTER = 1, 2  # streams: the input of gate and up; the input of down
_GOLDEN = 0x9E3779B97F4A7C15


def _mix64(z: np.ndarray) -> np.ndarray:
    """Finaliser of SplitMix64 (Steele, Lea, Flood 2014), uint64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def dropout_mask(seed: int, stream: int, pairs: int, cols: int, p: float) -> np.ndarray:
    """True where an element is kept, bool `[pairs, cols]`.

    Args:
        seed: of the call.
        stream: `HIDDEN` or `INTER`.
        pairs: tokens * k; row i is the pair (token i // k, slot i % k).
        cols: hidden or inter.
        p: probability of being dropped, rounded down to a multiple of 2^-24 (of its f32 value).
    """
    with np.errstate(over="ignore"):
        base = _mix64(np.uint64((seed + stream * _GOLDEN) % (1 << 64)))
        key = _mix64(base + np.arange(pairs, dtype=np.uint64))
        key0 = (key & np.uint64(0xFFFFFFFF)).astype(np.uint32)[:, None]
        key1 = (key >> np.uint64(32)).astype(np.uint32)[:, None]
        h = np.arange(cols, dtype=np.uint32)[None, :] ^ key0
        h = (h ^ (h >> np.uint32(16))) * np.uint32(0x7FEB352D)
        h = (h ^ (h >> np.uint32(15))) * np.uint32(0x846CA68B)
        h = h ^ (h >> np.uint32(16))
        h = (h ^ key1) * np.uint32(0x9E3779B1)
    return (h >> np.uint32(8)) >= np.uint32(int(np.float64(np.float32(p)) * 16777216.0))
