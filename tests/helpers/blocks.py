"""Random rows of GGUF blocks: any bytes are codes, scales are set so that the weights have a wanted size."""

from __future__ import annotations

import torch
from torch import Tensor

# name -> k of a block, its bytes, where its f16 scales lie, and their size for weights of unit size
BLOCKS = {
    "q4_0": (32, 18, (0,), 1 / 5),
    "q4_1": (32, 20, (0, 2), 1 / 5),
    "q5_0": (32, 22, (0,), 1 / 10),
    "q5_1": (32, 24, (0, 2), 1 / 10),
    "q8_0": (32, 34, (0,), 1 / 74),
    "q4_k": (256, 144, (0, 2), 1 / 300),
    "q5_k": (256, 176, (0, 2), 1 / 600),
    "q6_k": (256, 210, (208,), 1 / 1400),
    "iq4_nl": (32, 18, (0,), 1 / 64),
    "iq4_xs": (256, 136, (0,), 1 / 1200),
    "mxfp4": (32, 17, (), 1 / 5),
}
TYPES = (*BLOCKS, "f16")


def block_of(name: str) -> int:
    """Columns that a row must be a multiple of."""
    return BLOCKS[name][0] if name in BLOCKS else 1


def random_rows(name: str, rows: int, columns: int, generator: torch.Generator, size: float = 1.0) -> Tensor:
    """uint8 `[rows, row bytes]` of the type, whose weights are about `size` in magnitude."""
    if name == "f16":
        return (torch.randn(rows, columns, generator=generator) * size).half().view(torch.uint8)
    block, block_bytes, scales, unit = BLOCKS[name]
    count = rows * columns // block
    data = torch.randint(0, 256, (count, block_bytes), generator=generator, dtype=torch.uint8)
    for at in scales:
        values = torch.randn(count, 1, generator=generator) * unit * size
        data[:, at : at + 2] = values.half().view(torch.uint8)
    if name == "mxfp4":  # 2^(byte - 128)
        exponent = round(torch.tensor(unit * size).log2().item()) + 128
        data[:, 0] = torch.randint(exponent - 1, exponent + 2, (count,), generator=generator, dtype=torch.uint8)
    return data.reshape(rows, columns // block * block_bytes)
