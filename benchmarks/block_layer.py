"""The expert layer as files of llama.cpp's mix Q4_K_M store it: gate and up in q4_k, down in q4_k or q6_k by layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.moe_layer import Layer
from kt_sft.nn.routed_experts import Matrices
from kt_sft.sources.gguf import dequantize
from tests.helpers.blocks import block_of, random_rows

GATE_UP = "q4_k"
DOWN = {"kt_sft Q4_K_M, q4_k down": "q4_k", "kt_sft Q4_K_M, q6_k down": "q6_k"}
# What llama.cpp stores where a row is no multiple of 256 (llama-quant.cpp).
INSTEAD = {"q4_k": "q5_0", "q6_k": "q8_0"}


def fitting(name: str, columns: int) -> str:
    """The type of blocks that llama.cpp takes for rows of this many columns."""
    return name if columns % block_of(name) == 0 else INSTEAD[name]


class Blocks:
    """Random blocks of one projection; each expert has the rows of one template in another order.

    `values`: the numbers that they stand for, f32 `[experts, rows, columns]`, by the reader of GGUF files and not by
    the kernels' own decoder.
    """

    def __init__(self, kind: str, rows: int, columns: int, *, num_experts: int, rng: torch.Generator) -> None:
        self.kind = fitting(kind, columns)
        self._template = random_rows(self.kind, rows, columns, rng, size=columns**-0.5)
        values = dequantize(self.kind.upper(), self._template, torch.float32)
        self.values = torch.stack([_turned(values, index) for index in range(num_experts)])

    def expert(self, index: int) -> Tensor:
        """uint8 `[rows, bytes of a row]`."""
        return _turned(self._template, index)


@dataclass(frozen=True)
class BlockLayer:
    """`layer` is the truth: the LoRA of another layer, and the numbers of the blocks as weights."""

    layer: Layer
    gate_up: Blocks
    down: Blocks

    @property
    def formats(self) -> tuple[str, str, str]:
        return self.gate_up.kind, self.gate_up.kind, self.down.kind

    def experts(self) -> Iterator[Matrices]:
        """Gate, up and down of one expert after the other as uint8 `[rows, bytes of a row]`."""
        for index in range(self.layer.shape.num_experts):
            gate, up = self.gate_up.expert(index).chunk(2)
            yield gate, up, self.down.expert(index)


def block_layers(layer: Layer, names: Iterable[str], seed: int = 3) -> Iterator[tuple[str, BlockLayer]]:
    """Layers by names of `DOWN`, of the sizes and with the LoRA of the one that is passed; they share gate and up."""
    shape, rng = layer.shape, torch.Generator().manual_seed(seed)
    gate_up = None
    for name in names:
        if gate_up is None:
            gate_up = Blocks(GATE_UP, 2 * shape.inter, shape.hidden, num_experts=shape.num_experts, rng=rng)
        down = Blocks(DOWN[name], shape.hidden, shape.inter, num_experts=shape.num_experts, rng=rng)
        yield name, BlockLayer(replace(layer, gate_up=gate_up.values, down=down.values), gate_up, down)


def _turned(template: Tensor, index: int) -> Tensor:
    return torch.roll(template, 37 * index, 0)
