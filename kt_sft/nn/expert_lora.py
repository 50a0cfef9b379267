"""The LoRA of one layer's routed experts: parameters that PEFT owns, seen in the kernels' layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kt_sft.autograd.settings import NO_FACTORS, LoraOperands, LoraTensors, empty, native_projections
from kt_sft.native import native
from kt_sft.storage import check_storage
from kt_sft.transfer.routes import fetch

EXPERT_MAJOR = "expert_major"  # stored [num_experts * rank, dim]
EXPERT_MINOR = "expert_minor"  # stored [dim, rank * num_experts], expert index fastest
_SAMPLES = 64  # values that tell a copy from its parameter
_SAMPLED_NATIVELY = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LoraFactor:
    """One stored parameter and how it is laid out."""

    parameter: nn.Parameter
    layout: str
    num_experts: int
    is_interleaved: bool = False  # gate and up alternate along dim

    def canonical(self) -> Tensor:
        """Differentiable `[num_experts, rank, dim]`, gate before up; a view unless `is_interleaved`."""
        stored = self._stored()
        return stored.unflatten(-1, (-1, 2)).mT.flatten(-2) if self.is_interleaved else stored

    def _stored(self) -> Tensor:
        if self.layout == EXPERT_MAJOR:
            return self._expert_major(self.parameter)
        return self.parameter.view(self.parameter.shape[0], -1, self.num_experts).permute(2, 1, 0)

    @property
    def is_operand(self) -> bool:
        """Whether the parameter lies in memory as the kernels take it."""
        p = self.parameter
        return (
            not self.is_interleaved
            and self.layout == EXPERT_MAJOR
            and p.dtype is torch.float32
            and p.is_cpu
            and p.is_contiguous()
        )

    def operand(self) -> Tensor:
        """f32 on the CPU `[num_experts, rank, dim]`, contiguous: its own memory if `is_operand`, else a copy."""
        if self.is_operand:
            return self._expert_major(self.parameter.detach())
        if self.is_interleaved:
            return _copied(self.canonical())
        if self.layout == EXPERT_MAJOR:
            return self._expert_major(_copied(self.parameter))
        stored = fetch(self.parameter, torch.float32, "lora").contiguous()
        shape = (self.num_experts, stored.shape[1] // self.num_experts, stored.shape[0])
        operand = empty(shape, torch.float32)
        native().operand_from_expert_minor(stored, operand)
        return operand

    def _expert_major(self, stored: Tensor) -> Tensor:
        return stored.view(self.num_experts, -1, stored.shape[-1])


def _copied(factor: Tensor) -> Tensor:
    """f32 on the CPU, contiguous, and never the factor's own memory."""
    host = fetch(factor, torch.float32, "lora").contiguous()
    return host.clone() if host.data_ptr() == factor.data_ptr() else host


@dataclass(frozen=True)
class LoraPair:
    """W_e + scaling() * b_e^T a_e, canonical a_e `[rank, in]` and b_e `[rank, out]`."""

    a: LoraFactor
    b: LoraFactor
    scaling: Callable[[], float]


def _looks(factors: tuple[LoraFactor | None, ...]) -> tuple[tuple | None, ...]:
    """What factors look like: equal for two looks if the operand of the first one still holds; None: cannot be told."""
    for factor in factors:
        if factor is not None:
            check_storage(factor.parameter, "lora")
    copied = tuple(None if f is None or f.is_operand else f.parameter for f in factors)
    looks = []
    for factor, p, sample in zip(factors, copied, _samples(copied), strict=True):
        if p is not None:
            looks.append(None if p.is_inference() else (p.data_ptr(), p._version, sample))
        else:
            looks.append(() if factor is None else (factor.parameter.data_ptr(),))
    return tuple(looks)


def _samples(parameters: LoraTensors) -> tuple[float, ...]:
    """Sum over a few values of each parameter; 0 for None."""
    if all(p is None or (p.is_cpu and p.dtype in _SAMPLED_NATIVELY and p.is_contiguous()) for p in parameters):
        return native().sample_factors(parameters)
    return tuple(0.0 if p is None else _sample(p.detach().reshape(-1)) for p in parameters)


def _sample(values: Tensor) -> float:
    return values[:: values.numel() // _SAMPLES + 1].sum(dtype=torch.float64).item()


@dataclass(frozen=True)
class _Operands:
    """Operands of all factors, and what these looked like when they were made."""

    looks: tuple[tuple | None, ...]
    aliases: LoraTensors  # hold the storages, so that no other one can turn up at their address
    tensors: LoraTensors
    shared: tuple[Tensor, ...]  # those that are the parameters' own memory


_NO_OPERANDS = _Operands((None,) * 6, NO_FACTORS, NO_FACTORS, ())


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
    # Both are replaced as a whole: another thread may be reading.
    _last: _Operands = field(default=_NO_OPERANDS, repr=False)
    _bound: tuple[LoraTensors, tuple[float, ...], LoraOperands] | None = field(default=None, repr=False)

    def _factors(self) -> tuple[LoraFactor | None, ...]:
        pairs = (self.gate_up, None, self.down)
        return tuple(f for pair in pairs for f in ((None, None) if pair is None else (pair.a, pair.b)))

    def tensors(self) -> LoraTensors:
        """Differentiable views in the order of `kt_sft.autograd.moe`."""
        return tuple(None if f is None else f.canonical() for f in self._factors())

    def operands(self) -> LoraTensors:
        """The same in f32 on the CPU, contiguous; copies are made again when their parameter changed.

        Writes through `.data` (DeepSpeed, PEFT's hot swap, hand-written steps) leave the version alone. Those of a
        training step come after a backward, which ends all copies; others show in a sample of the values.
        """
        return self._operands().tensors

    def _operands(self) -> _Operands:
        factors, last = self._factors(), self._last
        looks = _looks(factors)
        if looks == last.looks and None not in looks:
            return last
        tensors = tuple(
            None if f is None else before if look is not None and look == old else f.operand()
            for f, look, old, before in zip(factors, looks, last.looks, last.tensors, strict=True)
        )
        made = self._last = _Operands(
            looks,
            tuple(None if f is None else f.parameter.detach() for f in factors),
            tensors,
            tuple(t for f, t in zip(factors, tensors, strict=True) if f is not None and f.is_operand),
        )
        return made

    def bind(self, inter: int) -> LoraOperands:
        """The operands with their scales, as calls take them; the same ones until a factor or a scale changes."""
        operands, scales, last = self._operands(), self.scales(), self._bound
        if last is None or last[0] is not operands.tensors or last[1] != scales:
            projections = native_projections(operands.tensors, scales, inter)
            last = (operands.tensors, scales, LoraOperands(projections, operands.shared, self.drop_copies))
            self._bound = last
        return last[2]

    def drop_copies(self) -> None:
        """The parameters are about to change: a backward has been here."""
        self._last, self._bound = _NO_OPERANDS, None

    def scales(self) -> tuple[float, float, float]:
        """Scale of gate, up and down."""
        gate_up = self.gate_up.scaling() if self.gate_up is not None else 0.0
        return gate_up, gate_up, self.down.scaling() if self.down is not None else 0.0
