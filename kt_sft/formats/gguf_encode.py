"""Numbers to blocks of GGUF types: the types that merged models and adapters are written in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kt_sft.formats.ggml_types import GGML_TYPES

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = GGML_TYPES["Q8_0"].block_elements


def type_for(kind: str, columns: int) -> str:
    """`kind`, or BF16 where the rows are no whole blocks of it."""
    return kind if columns % GGML_TYPES[kind].block_elements == 0 else "BF16"


def encode(values: Tensor, kind: str) -> Tensor:
    """Blocks uint8 of floating point values `[..., columns]`, row by row.

    Q8_0 is ggml's: d = max|x| / 127 in f16, codes round(x / d) with the d before its rounding to f16.
    """
    import torch

    if kind == "F32":
        return values.float().contiguous().view(-1).view(torch.uint8)
    if kind == "BF16":
        return values.to(torch.bfloat16).contiguous().view(-1).view(torch.uint8)
    assert kind == "Q8_0", kind
    blocks = values.float().reshape(-1, BLOCK)
    d = torch.linalg.vector_norm(blocks, float("inf"), dim=1, keepdim=True) / 127
    scaled = blocks * torch.where(d > 0, 1 / d, torch.zeros_like(d))
    codes = scaled.add_(torch.copysign(torch.tensor(0.5), scaled)).to(torch.int8)  # halves away from zero
    return torch.cat([d.to(torch.float16).view(torch.uint8), codes.view(torch.uint8)], dim=1).view(-1)
