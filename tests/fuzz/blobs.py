"""Damage to bytes: flips, cuts, numbers of every width, spans moved; mostly near the beginning, where headers are."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence

_NUMBERS = (
    0, 1, 2, 3, 4, 7, 8, 9, 12, 13, 16, 31, 32, 33, 64, 127, 128, 255, 256, 4096, 2**15, 2**16, 2**20, 2**22, 2**24,
    2**30, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1,
)  # fmt: skip
_WIDTHS = (("<B", 8), ("<H", 16), ("<I", 32), ("<I", 32), ("<Q", 64), ("<Q", 64), (">I", 32), (">Q", 64))
_FLOATS = (0.0, -0.0, 1.0, float("nan"), float("inf"), 1e-45, 3.4e38)
_TEXT = (b"\x00", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"{", b"}", b"[", b'"', b"\n", b" ", b"GGUF")


def edit(data: bytes, rng: random.Random, near: Sequence[int] = ()) -> bytes:
    """The bytes after one edit.

    Args:
        near: places of numbers that lead far when they lie.
    """
    size = len(data)
    if not size:
        return rng.choice((b"", b"\0" * 8, b"{}", b"GGUF"))
    kind = rng.randrange(14)
    at = _place(size, rng, near)
    if kind < 5:
        return _written(data, at, _number(rng))
    if kind < 7:
        return _written(data, at, bytes([data[at] ^ (1 << rng.randrange(8))]))
    if kind == 7:
        return data[:at]
    if kind == 8:
        return data + rng.choice((b"\0", b"\0" * 64, b"\xff" * 7, data[-16:], rng.randbytes(rng.randrange(1, 100))))
    if kind == 9:
        return data[:at] + rng.choice((*_TEXT, _number(rng), rng.randbytes(rng.randrange(1, 20)))) + data[at:]
    end = min(size, at + rng.choice((1, 2, 4, 8, 16, 64, 4096)))
    if kind == 10:
        return data[:at] + data[end:]
    if kind == 11:
        return _written(data, at, rng.choice((b"\0", b"\xff", b" ")) * (end - at))
    other = _place(size, rng, near)
    if kind == 12:
        return _written(data, at, data[other : other + end - at])
    return _written(data, at, rng.choice((*_TEXT, rng.randbytes(end - at))))


def _place(size: int, rng: random.Random, near: Sequence[int]) -> int:
    kind = rng.random()
    if near and kind < 0.5:
        return min(size - 1, rng.choice(near))
    if kind < 0.85:
        return rng.randrange(min(size, 2000))
    return rng.randrange(size)


def _number(rng: random.Random) -> bytes:
    if rng.random() < 0.1:
        return struct.pack(rng.choice("fd"), rng.choice(_FLOATS))
    layout, bits = rng.choice(_WIDTHS)
    return struct.pack(layout, rng.choice(_NUMBERS) % (1 << bits))


def _written(data: bytes, at: int, piece: bytes) -> bytes:
    return (data[:at] + piece + data[at + len(piece) :])[: max(len(data), 1)]
