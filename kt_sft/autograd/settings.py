"""What calls of the experts are made with: a layer's frozen settings, and its LoRA as the kernels take it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kt_sft.native import native

_HUGE_BYTES = 4 << 20  # two huge pages, of which one is whole wherever it begins

# Order of the LoRA tensors: a [num_experts, rank, in] and b [num_experts, rank, out] of gate, up, down.
# up_a and up_b None with gate_b [num_experts, rank, 2 * inter]: gate and up share a (PEFT's fused gate_up_proj).
LoraTensors = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
NO_FACTORS: LoraTensors = (None,) * 6
# (a, b, scale) of gate, up and down as the extension takes them; None: no LoRA there.
Projection = tuple[Tensor, Tensor, float] | None
Projections = tuple[Projection, Projection, Projection]
Biases = tuple[Tensor, Tensor, Tensor]  # of gate and up [num_experts, inter] and of down [num_experts, hidden], f32


@dataclass(frozen=True)
class MoeSettings:
    """How a layer computes. A layer makes them once and every call gets the same ones.

    Args:
        rows: `bf16` or, with quantised weights, `int8` (activations rounded to integers row by row) or `bfp16` (up to
            four rows per expert in block floating point). Gradients pass straight through that rounding and are those
            of the stored weights.
        chunk_size: tokens per native pass.
        retain: keep gate and up products for backward; False computes them again.
        dropout: probability of the inverted dropout on the input of the LoRA branches; 0 turns it off.
        to_slots: makes ids int64 `[tokens, k]` of a caller those of the layer, and checks them; None: they are.
    """

    rows: str = "bf16"
    chunk_size: int = 1024
    retain: bool = True
    dropout: float = 0.0
    to_slots: Callable[[Tensor], Tensor] | None = None

    @functools.cached_property
    def options(self) -> dict[str, object]:
        """What forward and backward of one call must agree in, as the extension takes it."""
        return {"dropout_p": self.dropout, "chunk_size": self.chunk_size, "rows": self.rows}


@dataclass(frozen=True)
class LoraOperands:
    """LoRA of a layer in f32 on the CPU; made again when a factor changes.

    Args:
        projections: of gate, up and down.
        shared: those of the tensors that are a parameter's own memory: to write one before backward is an error, as in
            torch.
        after_backward: called once the gradients are there.
    """

    projections: Projections = (None, None, None)
    shared: tuple[Tensor, ...] = ()
    after_backward: Callable[[], None] | None = None


NO_LORA = LoraOperands()


def native_projections(operands: LoraTensors, scales: tuple[float, float, float], inter: int) -> Projections:
    """The operands and scales of gate, up and down."""
    pairs = split_projections(operands, inter)
    return tuple(None if a is None else (a, b, scale) for (a, b), scale in zip(pairs, scales, strict=True))


def split_projections(lora: LoraTensors, inter: int) -> tuple[tuple, tuple, tuple]:
    """(a, b) of gate, up and down; views of the fused tensors where gate and up share a."""
    gate_a, gate_b, up_a, up_b, down_a, down_b = lora
    if gate_b is not None and up_b is None and gate_b.shape[-1] == 2 * inter:
        return (gate_a, gate_b[..., :inter]), (gate_a, gate_b[..., inter:]), (down_a, down_b)
    return (gate_a, gate_b), (up_a, up_b), (down_a, down_b)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """On the CPU whatever the default device is; large ones in huge pages, which cost less to touch and to find."""
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    if tensor.nbytes >= _HUGE_BYTES:
        native().advise_huge_pages(tensor)
    return tensor
