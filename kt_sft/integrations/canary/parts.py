"""What a canary watches: everything that trains, by module, and whether a step has changed it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from kt_sft.integrations.peft import coverage
from kt_sft.integrations.peft.targets import indexer_linears
from kt_sft.models.spec import iter_routed_experts
from kt_sft.nn.expert_lora import EXPERT_MAJOR, LoraFactor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Part:
    """Parameters that train one thing, and what is known of them.

    Args:
        name: of the module or, of experts, of the parameter, without adapters.
        module: whose output's gradient counts.
        factors: of experts, in their layout; then what is known has one entry per expert.
        may_rest: a step without a gradient is no fault, even where its output has one.
    """

    name: str
    module: nn.Module
    parameters: list[nn.Parameter]
    factors: tuple[LoraFactor, ...] = ()
    may_rest: bool = False
    before: list[Tensor] = field(default_factory=list)
    has_gradient: Tensor | None = None  # bool [1] or [experts]; None: nobody could look

    def sums(self) -> list[Tensor]:
        """A sum over the bits of each parameter, int64 `[1]` or `[experts]`: other bits give another one."""
        if self.factors:
            return [_bits_per_expert(factor) for factor in self.factors]
        return [_sum(_bits(p, 1)) for p in self.parameters]

    def is_changed(self) -> Tensor:
        """Bool `[1]` or `[experts]`."""
        return torch.stack([old != new for old, new in zip(self.before, self.sums(), strict=True)]).any(0)

    def look_at_gradient(self) -> None:
        """Whether the parameters have one that is not zero."""
        found = torch.zeros_like(self.before[0], dtype=torch.bool)
        for factor in self.factors:
            if factor.parameter.grad is not None:
                found |= _any_per_expert(factor, factor.parameter.grad)
        for parameter in () if self.factors else self.parameters:
            if parameter.grad is not None:
                found |= parameter.grad.any().cpu()
        self.has_gradient = found


def find_parts(model: nn.Module, resting: set[int]) -> Iterator[Part]:
    """Everything that trains: each matrix of each layer's experts, and each other module with its parameters."""
    owned: set[int] = set()
    for name, experts in iter_routed_experts(model):
        lora, plain = experts.lora, name.replace(".base_layer", "")
        pairs = () if lora is None else (("gate_up_proj", lora.gate_up), ("down_proj", lora.down))
        for projection, pair in pairs:
            factors = () if pair is None else tuple(f for f in (pair.a, pair.b) if f.parameter.requires_grad)
            factors = tuple(f for f in factors if id(f.parameter) not in resting)
            owned |= set() if pair is None else {id(pair.a.parameter), id(pair.b.parameter)}
            if factors:
                full = f"{plain.removeprefix('base_model.model.')}.{projection}"
                yield Part(full, experts, [f.parameter for f in factors], factors)
    modules = dict(model.named_modules())
    kinds, indexers = coverage.kinds(model), set(indexer_linears(model))
    wrapped = {name: m.parameter_name for name, m in modules.items() if isinstance(m, ParamWrapper)}
    groups: dict[str, tuple[nn.Module, list[nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in owned | resting:
            owner = coverage.owner_of(name, wrapped)
            groups.setdefault(owner, (_module_of(name, modules), []))[1].append(parameter)
    for owner, (module, parameters) in groups.items():
        may_rest = isinstance(module, TrainableTokensWrapper) or kinds(owner) == "other" or owner in indexers
        yield Part(owner.removeprefix("base_model.model."), module, parameters, may_rest=may_rest)


def _module_of(name: str, modules: dict[str, nn.Module]) -> nn.Module:
    """The outermost module of PEFT around a parameter, or the module that has it."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        module = modules.get(".".join(parts[:end]))
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            return module
    return modules[name.rpartition(".")[0]]


def resting_parameters(optimizer: Any) -> set[int]:
    """Parameters with a learning rate of zero."""
    return {id(p) for group in optimizer.param_groups if group["lr"] == 0 for p in group["params"]}


def _bits(values: Tensor, rows: int) -> Tensor:
    """Values as integers `[rows, n]`, as wide as they come: int64 are summed several times as fast as smaller ones."""
    flat = values.detach().reshape(rows, -1).contiguous()
    size = flat.element_size()
    is_aligned = flat.shape[1] * size % 8 == 0 and flat.storage_offset() * size % 8 == 0
    return flat.view(torch.int64 if is_aligned else _INTEGERS[size])


def _sum(bits: Tensor, dim: int = 1) -> Tensor:
    return bits.sum(dim, dtype=torch.int64).cpu()


def _bits_per_expert(factor: LoraFactor) -> Tensor:
    """Int64 `[experts]`."""
    values, experts = factor.parameter.detach(), factor.num_experts
    if factor.layout == EXPERT_MAJOR:
        return _sum(_bits(values, experts))
    return _sum(values.reshape(-1, experts).contiguous().view(_INTEGERS[values.element_size()]), dim=0)


def _any_per_expert(factor: LoraFactor, values: Tensor) -> Tensor:
    """Which experts have a value that is not zero in a tensor shaped as a factor's parameter, bool `[experts]`."""
    if factor.layout == EXPERT_MAJOR:
        return values.reshape(factor.num_experts, -1).any(1).cpu()
    return values.reshape(-1, factor.num_experts).any(0).cpu()
