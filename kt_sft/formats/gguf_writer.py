"""Writing a GGUF file (version 3, little endian) piece by piece, so that one larger than memory can be written.

Format: docs/gguf.md of the ggml project. Values of metadata have the type that llama.cpp's own writers give them: whole
numbers u32, others f32; an array of numbers i32 or f32 by its first element.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kt_sft.formats.ggml_types import GGML_TYPES
from kt_sft.formats.staging import open_new

if TYPE_CHECKING:
    from torch import Tensor

ALIGNMENT = 32
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_LAYOUTS = {_U32: "<I", _I32: "<i", _F32: "<f", _BOOL: "<?"}


@dataclass(frozen=True)
class PlannedGguf:
    """Name, type and shape (outer axis first) of a tensor whose data follows later."""

    name: str
    type: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the data."""
        rows = 1
        for extent in self.shape[:-1]:
            rows *= extent
        return rows * GGML_TYPES[self.type].row_bytes(self.shape[-1])


def write(
    path: Path, metadata: Mapping[str, Any], plan: Sequence[PlannedGguf], pieces: Iterable[Iterable[Tensor]]
) -> None:
    """Write a new file from its plan and, for each tensor of it, the consecutive parts of its blocks, uint8.

    Raises:
        ValueError: the pieces do not add up to the plan, or a metadata value of another type.
        FileExistsError: something is there.
    """
    header = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(plan), len(metadata)))
    for key, value in metadata.items():
        header += _text(key) + _value(key, value)
    offset = 0
    for tensor in plan:
        axes = tuple(reversed(tensor.shape))
        header += _text(tensor.name) + struct.pack(f"<I{len(axes)}Q", len(axes), *axes)
        header += struct.pack("<IQ", GGML_TYPES[tensor.type].number, offset)
        offset += _padded(tensor.num_bytes)
    header += b"\0" * (_padded(len(header)) - len(header))
    with open_new(path) as stream:
        stream.write(header)
        for tensor, parts in zip(plan, pieces, strict=True):
            written = sum(stream.write(part.contiguous().view(-1).numpy().data) for part in parts)
            if written != tensor.num_bytes:
                raise ValueError(f"{path}, tensor {tensor.name}: expected {tensor.num_bytes} bytes, got {written}")
            stream.write(b"\0" * (_padded(written) - written))


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(key: str, value: Any) -> bytes:
    if isinstance(value, list):
        kind = _kind(key, value[0]) if value else _STRING
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + b"".join(_plain(kind, item) for item in value)
    kind = _U32 if type(value) is int and value >= 0 else _kind(key, value)
    return struct.pack("<I", kind) + _plain(kind, value)


def _kind(key: str, value: Any) -> int:
    kinds = {bool: _BOOL, int: _I32, float: _F32, str: _STRING}
    if type(value) not in kinds:
        raise ValueError(f"metadata {key}: expected a text, number or truth value, got {type(value).__name__}")
    return kinds[type(value)]


def _plain(kind: int, value: Any) -> bytes:
    return _text(value) if kind == _STRING else struct.pack(_LAYOUTS[kind], value)
