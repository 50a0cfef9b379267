"""The LoRA of one layer's routed experts: parameters that PEFT owns, seen in the kernels' layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kt_sft.ops.moe import LoraTensors

EXPERT_MAJOR = "expert_major"  # stored [num_experts * rank, dim]
EXPERT_MINOR = "expert_minor"  # stored [dim, rank * num_experts], expert index fastest

_optimizer_steps = 0


def _count_step(*_: object) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


_step_hook: object | None = None


def _watch_optimizers() -> None:
    """Optimizers that write through `.data` leave a parameter's version alone (DeepSpeed does): any step ends all copies."""
    global _step_hook
    if _step_hook is None:
        _step_hook = torch.optim.optimizer.register_optimizer_step_post_hook(_count_step)


@dataclass(frozen=True)
class LoraFactor:
    """One stored parameter and how it is laid out."""

    parameter: nn.Parameter
    layout: str
    num_experts: int

    def canonical(self) -> Tensor:
        """Differentiable view `[num_experts, rank, dim]`."""
        return self._view(self.parameter)

    def operand(self) -> Tensor:
        """bf16 CPU copy `[num_experts, rank, dim]`, contiguous."""
        return self._view(self.parameter.detach().to("cpu", torch.bfloat16)).contiguous()

    def _view(self, stored: Tensor) -> Tensor:
        if self.layout == EXPERT_MAJOR:
            return stored.view(self.num_experts, -1, stored.shape[-1])
        return stored.view(stored.shape[0], -1, self.num_experts).permute(2, 1, 0)


@dataclass(frozen=True)
class LoraPair:
    """W_e + scaling() * b_e^T a_e, canonical a_e `[rank, in]` and b_e `[rank, out]`."""

    a: LoraFactor
    b: LoraFactor
    scaling: Callable[[], float]


@dataclass
class ExpertLora:
    """LoRA of the fused gate_up projection (out = 2 * inter, gate first) and of down; either may be missing.

    Args:
        dropout: probability of dropping an element of a LoRA branch's input while training.
        active: whether the adapter is in use now (False inside `disable_adapter()`).
    """

    gate_up: LoraPair | None
    down: LoraPair | None
    dropout: float = 0.0
    active: Callable[[], bool] = lambda: True
    _copies: dict[int, tuple[tuple, Tensor]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        _watch_optimizers()

    def _factors(self) -> tuple[LoraFactor | None, ...]:
        pairs = (self.gate_up, None, self.down)
        return tuple(f for pair in pairs for f in ((None, None) if pair is None else (pair.a, pair.b)))

    def tensors(self) -> LoraTensors:
        """Differentiable views in the order of `kt_sft.ops.moe`."""
        return tuple(None if f is None else f.canonical() for f in self._factors())

    def operands(self) -> LoraTensors:
        """bf16 copies of the same, made again only when a parameter changed."""
        return tuple(None if f is None else self._operand(i, f) for i, f in enumerate(self._factors()))

    def _operand(self, index: int, factor: LoraFactor) -> Tensor:
        p = factor.parameter
        key = (p.data_ptr(), p._version, _optimizer_steps)
        cached = self._copies.get(index)
        if cached is None or cached[0] != key:
            cached = (key, factor.operand())
            self._copies[index] = cached
        return cached[1]

    def scales(self) -> tuple[float, float, float]:
        """Scale of gate, up and down."""
        gate_up = self.gate_up.scaling() if self.gate_up is not None else 0.0
        return gate_up, gate_up, self.down.scaling() if self.down is not None else 0.0


