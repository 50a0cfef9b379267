"""The LoRA of one layer's routed experts: parameters that PEFT owns, seen in the kernels' layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kt_sft.native import native
from kt_sft.ops.moe import LoraTensors

EXPERT_MAJOR = "expert_major"  # stored [num_experts * rank, dim]
EXPERT_MINOR = "expert_minor"  # stored [dim, rank * num_experts], expert index fastest
_SAMPLES = 64  # values that tell a copy from its parameter; ten microseconds per look


class _ExpertMinorView(torch.autograd.Function):
    """`[dim, rank * num_experts]` seen as `[num_experts, rank, dim]`; the gradient goes back by blocks, in parallel.

    torch's own strided copy of the gradient takes several times as long, at one token as long as the kernels.
    """

    @staticmethod
    def forward(ctx, stored, num_experts):
        return _expert_minor_view(stored, num_experts)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if grad.device.type == "cpu" and grad.dtype == torch.float32 and grad.is_contiguous():
            stored = torch.empty(grad.shape[2], grad.shape[1] * grad.shape[0], dtype=torch.float32, device="cpu")
            native().gradient_to_expert_minor(grad, stored)
            return stored, None
        return grad.permute(2, 1, 0).reshape(grad.shape[2], -1), None


def _expert_minor_view(stored: Tensor, num_experts: int) -> Tensor:
    return stored.view(stored.shape[0], -1, num_experts).permute(2, 1, 0)


@dataclass(frozen=True)
class LoraFactor:
    """One stored parameter and how it is laid out."""

    parameter: nn.Parameter
    layout: str
    num_experts: int

    def canonical(self) -> Tensor:
        """Differentiable view `[num_experts, rank, dim]`."""
        if self.layout == EXPERT_MAJOR:
            return self._expert_major(self.parameter)
        return _ExpertMinorView.apply(self.parameter, self.num_experts)

    def operand(self) -> Tensor:
        """f32 CPU copy `[num_experts, rank, dim]`, contiguous; never the parameter's own memory."""
        if self.layout == EXPERT_MAJOR:
            return self._expert_major(self.parameter.detach().to("cpu", torch.float32, copy=True))
        stored = self.parameter.detach().to("cpu", torch.float32).contiguous()
        shape = (self.num_experts, stored.shape[1] // self.num_experts, stored.shape[0])
        operand = torch.empty(shape, dtype=torch.float32, device="cpu")
        native().operand_from_expert_minor(stored, operand)
        return operand

    def sample(self) -> float:
        """Sum over a few values of the parameter."""
        stored = self.parameter.detach().reshape(-1)
        return stored[:: stored.numel() // _SAMPLES + 1].sum(dtype=torch.float64).item()

    def _expert_major(self, stored: Tensor) -> Tensor:
        return stored.view(self.num_experts, -1, stored.shape[-1])


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
    _copies: dict[int, tuple[tuple, Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def _factors(self) -> tuple[LoraFactor | None, ...]:
        pairs = (self.gate_up, None, self.down)
        return tuple(f for pair in pairs for f in ((None, None) if pair is None else (pair.a, pair.b)))

    def tensors(self) -> LoraTensors:
        """Differentiable views in the order of `kt_sft.ops.moe`."""
        return tuple(None if f is None else f.canonical() for f in self._factors())

    def operands(self) -> LoraTensors:
        """f32 CPU copies of the same, made again when a parameter changed.

        Writes through `.data` (DeepSpeed, PEFT's hot swap, hand-written steps) leave the version alone. Those of a
        training step come after a backward, which ends all copies; others show in a sample of the values.
        """
        return tuple(None if f is None else self._operand(i, f) for i, f in enumerate(self._factors()))

    def _operand(self, index: int, factor: LoraFactor) -> Tensor:
        p = factor.parameter
        if p.is_inference():  # has no version
            return factor.operand()
        key = (p.data_ptr(), p._version, factor.sample())
        cached = self._copies.get(index)
        if cached is None or cached[0] != key:
            # The alias holds the storage, so that no other one can turn up at its address.
            cached = (key, p.detach(), factor.operand())
            self._copies[index] = cached
        return cached[2]

    def drop_copies(self) -> None:
        """The parameters are about to change: a backward has been here."""
        self._copies.clear()

    def scales(self) -> tuple[float, float, float]:
        """Scale of gate, up and down."""
        gate_up = self.gate_up.scaling() if self.gate_up is not None else 0.0
        return gate_up, gate_up, self.down.scaling() if self.down is not None else 0.0
