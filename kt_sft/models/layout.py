"""Sizes, gate function and tensor layout of one layer's routed experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Of one expert: gate, up [inter, hidden], down [hidden, inter].
Matrices = tuple["Tensor", "Tensor", "Tensor"]
# In what the kernels hold gate, up and down: `bf16`, `int8`, `int4`, `rawint4`, `f16` or a block type of GGUF files.
# One word stands for three alike that weights are rounded to, three words for the rows of a file as they are stored.
Formats = str | tuple[str, str, str]


@dataclass(frozen=True)
class ExpertsSpec:
    """Shape and gate function of one layer's routed experts, and how its module lays the parameters out.

    Args:
        activation: the kernels' name of the gate function; `clamped_swiglu` uses alpha and limit.
        is_transposed: the module keeps `[experts, in, out]` instead of `[experts, out, in]`.
        is_interleaved: gate and up alternate along the outputs of gate_up_proj, instead of gate first.
        expert_keys: names of gate, up and down inside each element of a ModuleList, where the module that is replaced
            is one: checkpoints hold `<name>.<expert>.<key>.weight`. None for modules with fused parameters.
        has_bias: `gate_up_proj_bias` `[experts, 2 * inter]` and `down_proj_bias` `[experts, hidden]` are added.
        has_router_scale: the router beside the experts multiplies its weights by a number per expert (Gemma 4).
    """

    num_experts: int
    hidden: int
    inter: int
    activation: str = "silu"
    is_transposed: bool = False
    is_interleaved: bool = False
    has_bias: bool = False
    alpha: float = 1.702
    limit: float = 7.0
    expert_keys: tuple[str, str, str] | None = None
    has_router_scale: bool = False

    @property
    def gate_up_shape(self) -> tuple[int, int, int]:
        """Of the module's `gate_up_proj`."""
        return self.stored_shape("gate_up_proj", self.is_transposed)

    @property
    def down_shape(self) -> tuple[int, int, int]:
        """Of the module's `down_proj`."""
        return self.stored_shape("down_proj", self.is_transposed)

    def stored_shape(self, parameter: str, is_transposed: bool) -> tuple[int, int, int]:
        """Of `gate_up_proj` or `down_proj` in either orientation."""
        out, into = (2 * self.inter, self.hidden) if parameter == "gate_up_proj" else (self.hidden, self.inter)
        return (self.num_experts, into, out) if is_transposed else (self.num_experts, out, into)

    @property
    def bias_shapes(self) -> dict[str, tuple[int, int]]:
        """Of the module's biases, by name; empty without them."""
        if not self.has_bias:
            return {}
        return {
            "gate_up_proj_bias": (self.num_experts, 2 * self.inter),
            "down_proj_bias": (self.num_experts, self.hidden),
        }

    @property
    def gate_rows(self) -> slice:
        """Where gate lies among the 2 * inter outputs."""
        return slice(0, None, 2) if self.is_interleaved else slice(0, self.inter)

    @property
    def up_rows(self) -> slice:
        """Where up lies among the 2 * inter outputs."""
        return slice(1, None, 2) if self.is_interleaved else slice(self.inter, 2 * self.inter)

    def join_gate_up(self, gate: Tensor, up: Tensor) -> Tensor:
        """The rows `[2 * inter, hidden]` in the module's order, from gate and up `[inter, hidden]`."""
        joined = gate.new_empty(2 * self.inter, self.hidden)
        joined[self.gate_rows], joined[self.up_rows] = gate, up
        return joined

    @property
    def expert_bytes(self) -> int:
        """One expert's weights in bf16."""
        return 2 * 3 * self.hidden * self.inter
