"""Writing small GGUF files: header, directory, aligned data, split sets, and simple quantisers. Own code, so that a
mistake of the reader is not repeated by the writer's library.

Layout: docs/gguf.md of the ggml project; blocks: ggml/src/ggml-common.h.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kt_sft.formats.ggml_types import GGML_TYPES

Encoded = tuple[str, tuple[int, ...], np.ndarray]  # type, shape (outer axis first), bytes
_NUMBERS = {"u8": (0, "B"), "u16": (2, "H"), "u32": (4, "I"), "i32": (5, "i"), "f32": (6, "f"), "u64": (10, "Q")}


def encode(values: np.ndarray, kind: str) -> Encoded:
    """Float values `[..., cols]` as blocks of `kind`: F32, F16, BF16, Q8_0, Q4_0, Q4_K or Q6_K.

    Widths that are no multiple of the block are refused, as ggml does.
    """
    values = np.asarray(values, dtype=np.float32)
    size = GGML_TYPES[kind].block_elements
    assert values.shape[-1] % size == 0, f"{kind}: {values.shape[-1]} columns are no multiple of {size}"
    blocks = _ENCODERS[kind](values.reshape(-1, size))
    assert blocks.shape[1] == GGML_TYPES[kind].block_bytes
    return kind, values.shape, blocks.reshape(-1)


def random_blocks(kind: str, shape: tuple[int, ...], seed: int = 0) -> Encoded:
    """Random bytes: fine for readers; scales may be anything."""
    size = GGML_TYPES[kind]
    count = int(np.prod(shape)) // size.block_elements * size.block_bytes
    return kind, shape, np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)


def write(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Encoded], *, alignment: int = 32) -> Path:
    """One file. Metadata values: bool, str, int (u32), float (f32), (kind, number) for other kinds, or a list."""
    if alignment != 32:
        metadata = {**metadata, "general.alignment": alignment}
    header = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        header += _text(key) + _typed(value)
    offset = 0
    for name, (kind, shape, data) in tensors.items():
        header += _text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        header += struct.pack("<IQ", GGML_TYPES[kind].number, offset)
        offset += -(-data.nbytes // alignment) * alignment
    header += b"\0" * (-len(header) % alignment)
    with path.open("wb") as stream:
        stream.write(header)
        for _, _, data in tensors.values():
            stream.write(data.tobytes() + b"\0" * (-data.nbytes % alignment))
    return path


def write_split(
    directory: Path, stem: str, metadata: Mapping[str, Any], tensors: Mapping[str, Encoded], count: int
) -> list[Path]:
    """The same as `count` files; all metadata in the first, as llama.cpp's splitter does it."""
    names = list(tensors)
    files = []
    for number in range(count):
        part = {name: tensors[name] for name in names[number::count]}
        own = dict(metadata) if number == 0 else {}
        own |= {"split.no": ("u16", number), "split.count": ("u16", count)}
        own |= {"split.tensors.count": ("i32", len(names))}
        files.append(write(directory / f"{stem}-{number + 1:05d}-of-{count:05d}.gguf", own, part))
    return files


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _typed(value: Any) -> bytes:
    kind, body = _value(value)
    return struct.pack("<I", kind) + body


def _value(value: Any) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return 7, struct.pack("<B", value)
    if isinstance(value, str):
        return 8, _text(value)
    if isinstance(value, int):
        return 4, struct.pack("<I", value)
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    if isinstance(value, tuple):
        number, code = _NUMBERS[value[0]]
        return number, struct.pack(f"<{code}", value[1])
    kinds, bodies = zip(*(_value(item) for item in value), strict=True)
    assert len(set(kinds)) == 1
    return 9, struct.pack("<IQ", kinds[0], len(bodies)) + b"".join(bodies)


def _f16(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).view(np.uint8)


def _scale(largest: np.ndarray, levels: float) -> tuple[np.ndarray, np.ndarray]:
    """f16-rounded scale and its inverse, `[blocks, 1]`."""
    scale = (largest / levels).astype(np.float16).astype(np.float32)
    return scale, np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)


def _bf16(blocks: np.ndarray) -> np.ndarray:
    bits = blocks.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).view(np.uint8)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    scale, inverse = _scale(np.abs(blocks).max(1, keepdims=True), 127)
    q = np.clip(np.rint(blocks * inverse), -127, 127).astype(np.int8)
    return np.concatenate([_f16(scale), q.view(np.uint8)], axis=1)


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    scale, inverse = _scale(np.abs(blocks).max(1, keepdims=True), 7)
    q = (np.clip(np.rint(blocks * inverse), -8, 7) + 8).astype(np.uint8)
    return np.concatenate([_f16(scale), q[:, :16] | q[:, 16:] << 4], axis=1)


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    """Groups of 32 with 6-bit scale and minimum, these in units of one f16 each."""
    groups = blocks.reshape(-1, 8, 32)
    low = np.minimum(groups.min(2), 0)  # minima are subtracted and cannot be negative
    step = (groups.max(2) - low) / 15
    d, d_inverse = _scale(step.max(1, keepdims=True), 63)
    dmin, dmin_inverse = _scale((-low).max(1, keepdims=True), 63)
    scale = np.clip(np.rint(step * d_inverse), 0, 63).astype(np.uint8)
    minimum = np.clip(np.rint(-low * dmin_inverse), 0, 63).astype(np.uint8)
    real = (d * scale)[..., None]
    q = np.divide(groups + (dmin * minimum)[..., None], real, out=np.zeros_like(groups), where=real != 0)
    q = np.clip(np.rint(q), 0, 15).astype(np.uint8)
    packed = np.concatenate(
        [
            scale[:, :4] | (scale[:, 4:] >> 4) << 6,
            minimum[:, :4] | (minimum[:, 4:] >> 4) << 6,
            (scale[:, 4:] & 15) | minimum[:, 4:] << 4,
        ],
        axis=1,
    )
    return np.concatenate([_f16(d), _f16(dmin), packed, (q[:, ::2] | q[:, 1::2] << 4).reshape(-1, 128)], axis=1)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    """Groups of 16 with int8 scales in units of one f16."""
    groups = blocks.reshape(-1, 16, 16)
    step = np.abs(groups).max(2) / 31
    d, inverse = _scale(step.max(1, keepdims=True), 127)
    scale = np.clip(np.rint(step * inverse), 0, 127).astype(np.int8)
    real = (d * scale)[..., None]
    q = np.divide(groups, real, out=np.zeros_like(groups), where=real != 0)
    q = (np.clip(np.rint(q), -32, 31) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low = (q[:, :, :2] & 15) | (q[:, :, 2:] & 15) << 4
    high = np.bitwise_or.reduce((q >> 4) << np.array([0, 2, 4, 6], dtype=np.uint8)[None, None, :, None], axis=2)
    return np.concatenate([low.reshape(-1, 128), high.reshape(-1, 64), scale.view(np.uint8), _f16(d)], axis=1)


_ENCODERS = {
    "F32": lambda blocks: blocks.view(np.uint8),
    "F16": _f16,
    "BF16": _bf16,
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_K": _q4_k,
    "Q6_K": _q6_k,
}
