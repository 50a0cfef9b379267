"""Writing one safetensors file piece by piece, so that a file larger than memory can be written."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from kt_sft.formats.safetensors_index import DTYPE_BITS, INDEX_NAME
from kt_sft.formats.staging import open_new, put_json

if TYPE_CHECKING:
    from torch import Tensor

# The format's names -> torch's, of all types that both have.
TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64", "C64": "complex64"}
TORCH_NAMES |= {"BOOL": "bool", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64"}
TORCH_NAMES |= {"I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"}
TORCH_NAMES |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}
TORCH_NAMES |= {"F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz"}
DTYPE_NAMES = {f"torch.{torch_name}": name for name, torch_name in TORCH_NAMES.items()}
T = TypeVar("T")


@dataclass(frozen=True)
class PlannedTensor:
    """Name, torch dtype as text and shape of a tensor whose data follows later."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the data."""
        size = DTYPE_BITS[DTYPE_NAMES[self.dtype]] // 8
        for extent in self.shape:
            size *= extent
        return size


def put_index(folder: Path, weight_map: Mapping[str, str], total_bytes: int) -> None:
    """Which file of a folder of staging holds which tensor."""
    content = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    put_json(folder / INDEX_NAME, content)


def in_shards(tensors: Iterable[T], limit_bytes: int, num_bytes: Callable[[T], int]) -> list[list[T]]:
    """Tensors in their order, cut into files of limited size; a larger one has a file of its own."""
    shards: list[list[T]] = []
    used_bytes = 0
    for tensor in tensors:
        size = num_bytes(tensor)
        if not shards or used_bytes + size > limit_bytes:
            shards.append([])
            used_bytes = 0
        shards[-1].append(tensor)
        used_bytes += size
    return shards


def write(path: Path, plan: Sequence[PlannedTensor], pieces: Iterable[Tensor]) -> None:
    """Write a new file from its plan and the data of all tensors, in the plan's order.

    Args:
        pieces: contiguous CPU tensors; a tensor of the plan may come as several consecutive pieces.
    Raises:
        ValueError: the pieces do not add up to the plan.
        FileExistsError: something is there.
    """
    import torch

    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in plan:
        begin, end = end, end + tensor.num_bytes
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    if len(header) != len(plan) + 1:
        raise ValueError(
            f"{path}: expected a plan in which every tensor is once, got {len(plan) + 1 - len(header)} more"
        )
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open_new(path) as stream:
        stream.write(struct.pack("<Q", len(text)))
        stream.write(text)
        rest = iter(pieces)
        for tensor in plan:
            written = 0
            while written < tensor.num_bytes and (piece := next(rest, None)) is not None:
                written += stream.write(piece.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
            if written != tensor.num_bytes:
                raise ValueError(f"{path}, tensor {tensor.name}: expected {tensor.num_bytes} bytes, got {written}")
        if extra := sum(piece.nbytes for piece in rest):
            raise ValueError(f"{path}: expected the tensors of the plan, got {extra} bytes more")
