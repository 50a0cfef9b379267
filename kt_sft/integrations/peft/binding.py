"""PEFT's wrappers around the routed experts, made to serve the kernels.

PEFT nests one ParamWrapper per targeted parameter around the experts module: ParamWrapper(down_proj) over
ParamWrapper(gate_up_proj) over RoutedExperts. Their own forward would build W + delta for every expert at each step.
Here they only pass through, and the experts compute with the wrappers' lora_A and lora_B.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from kt_sft.adapters.model import PARAMETERS, Lora
from kt_sft.compat.peft import (
    LoraLayer,
    ParamWrapper,
    check_adapters_to_merge,
    check_forward_arguments,
    has_exchanged_widths,
)
from kt_sft.errors import ConfigError
from kt_sft.integrations.peft.outside import bind_outside
from kt_sft.models.spec import iter_routed_experts
from kt_sft.nn.expert_lora import EXPERT_MAJOR, EXPERT_MINOR, ExpertLora, LoraFactor, LoraPair
from kt_sft.nn.packed_linear import PackedLinear


class ExpertParamWrapper(ParamWrapper):
    """A ParamWrapper whose LoRA is computed by the experts it wraps. Made from PEFT's by changing its class."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if "adapter_names" in kwargs:
            check_forward_arguments(self, x, *args, **kwargs)
            kwargs.pop("adapter_names")
        if self.disable_adapters and self.merged:
            self.unmerge()
        # Submodules from the dictionary: looked up as attributes they cost ten times as much as all else here.
        inner = experts = self._modules["base_layer"]
        while "base_layer" in experts._modules:
            experts = experts._modules["base_layer"]
        if _is_stale(self, experts.lora):
            experts.lora = _expert_lora(self, experts.lora.dropout)
        return inner(x, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the delta to the packed weights, one expert at a time; the sum is rounded to the experts' format once."""
        _merge([self], safe_merge=safe_merge, adapter_names=adapter_names)

    def unmerge(self) -> None:
        if self.merged:
            raise ValueError(
                f"unmerge: adapter {self.merged_adapters[0]!r} was rounded into the packed experts and cannot be "
                "taken out exactly; load the base model again"
            )

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The experts without wrappers; both projections are merged in one pass over the experts."""
        if merge:
            _merge(list(chain_of(self)), safe_merge=safe_merge, adapter_names=adapter_names)
        experts = self.get_base_layer()
        experts.lora = None
        experts.show_placeholders()
        return experts


@dataclass(frozen=True)
class _Scaling:
    """PEFT's own entry, read at each use: `set_scale` and rsLoRA need nothing of ours."""

    wrapper: ParamWrapper
    adapter: str

    def __call__(self) -> float:
        return float(self.wrapper.scaling[self.adapter])


@dataclass(frozen=True)
class _IsActive:
    wrappers: tuple[ParamWrapper, ...]
    adapter: str

    def __call__(self) -> bool:
        for wrapper in self.wrappers:
            if wrapper.disable_adapters or wrapper.merged or self.adapter not in wrapper.active_adapters:
                return False
        return True


def bind_experts(model: nn.Module, *, dropout: float = 0.0) -> None:
    """Bind the wrappers that PEFT built to the experts; idempotent.

    Until then the experts refuse to compute: they would ignore their LoRA.

    Args:
        dropout: on the LoRA branch's input of every expert, in train mode.
    """
    wrapped = {}
    for module in model.modules():
        if isinstance(module, ParamWrapper):
            wrapped.setdefault(id(module.get_base_layer()), module)  # the outermost comes first
    for _, experts in iter_routed_experts(model):
        outermost = wrapped.get(id(experts))
        if outermost is not None:
            for wrapper in chain_of(outermost):
                wrapper.__class__ = ExpertParamWrapper
            experts.lora = _expert_lora(outermost, dropout)
    bind_outside(model)
    hide_placeholders(model)


def bind_expert_lora(peft_model: PeftModel, load_adapter: Callable[..., Any]) -> PeftModel:
    """Replace, on this object, PEFT's methods that do not know about the experts; idempotent.

    Args:
        load_adapter: what the method of this name does, given the model and the method's arguments.
    """
    peft_model.get_nb_trainable_parameters = types.MethodType(_get_nb_trainable_parameters, peft_model)
    peft_model.load_adapter = types.MethodType(load_adapter, peft_model)
    return peft_model


def restore_linear_dropout(peft_model: PeftModel, adapter: str, dropout: float) -> None:
    """Give the ordinary LoRA layers the user's dropout, which the config had to hide from ParamWrapper."""
    for module in peft_model.modules():
        if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper) and adapter in module.lora_dropout:
            module.lora_dropout[adapter] = nn.Dropout(dropout).train(module.training)


def hide_placeholders(model: nn.Module) -> None:
    """Take the experts' placeholders out of `parameters()`: they have no storage to broadcast, move or save."""
    for _, experts in iter_routed_experts(model):
        experts.hide_placeholders()


def expose_placeholders(model: nn.Module) -> None:
    """The reverse of `hide_placeholders`; PEFT finds the parameters to wrap through `named_parameters()`."""
    for _, experts in iter_routed_experts(model):
        experts.show_placeholders()


def hidden_numel(model: nn.Module) -> int:
    """Number of frozen weights that `parameters()` does not show: of the experts, and of packed linear layers."""
    experts_numel = sum(
        experts.__dict__[name].numel()
        for _, experts in iter_routed_experts(model)
        for name in PARAMETERS
        if name in experts.__dict__
    )
    return experts_numel + sum(m.weight.numel() for m in model.modules() if isinstance(m, PackedLinear))


def chain_of(outermost: nn.Module) -> Iterator[ParamWrapper]:
    """The wrappers around one experts module, outermost first."""
    while isinstance(outermost, ParamWrapper):
        yield outermost
        outermost = outermost.base_layer


def _expert_lora(outermost: ParamWrapper, dropout: float) -> ExpertLora:
    wrappers = tuple(chain_of(outermost))
    adapters = list(dict.fromkeys(name for wrapper in wrappers for name in wrapper.lora_A))
    if len(adapters) != 1:
        raise ConfigError(f"expert LoRA: expected one adapter, found {adapters}; unload one before loading the next")
    pairs = {wrapper.parameter_name: _pair(wrapper, adapters[0]) for wrapper in wrappers}
    return ExpertLora(
        gate_up=pairs.get("gate_up_proj"),
        down=pairs.get("down_proj"),
        dropout=dropout,
        active=_IsActive(wrappers, adapters[0]),
    )


def _pair(wrapper: ParamWrapper, adapter: str) -> LoraPair:
    """PEFT's factors in our roles: a meets the input, b makes the output.

    lora_A is `[experts * rank, x]`, lora_B `[y, rank * experts]`; which of x and y is `in` and which `out` depends on
    PEFT's version: of a parameter `[experts, p, q]` x is p, unless the wrapper says that it swapped the two.
    """
    num_experts, out_width, in_width = wrapper.get_param().shape
    spec = wrapper.get_base_layer().spec
    if spec.is_transposed:
        out_width, in_width = in_width, out_width
    lora_a, lora_b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    widths = (lora_a.shape[1], lora_b.shape[0])
    if widths not in ((out_width, in_width), (in_width, out_width)):
        raise ConfigError(
            f"expert LoRA: {wrapper.parameter_name} needs widths {in_width} and {out_width}, got {widths}"
        )
    is_p_first = not has_exchanged_widths(wrapper)
    swapped = is_p_first != spec.is_transposed if in_width == out_width else widths == (out_width, in_width)
    mixed = spec.is_interleaved and wrapper.parameter_name == "gate_up_proj"  # along the output
    of_lora_a = LoraFactor(lora_a, EXPERT_MAJOR, num_experts, is_interleaved=mixed and swapped)
    of_lora_b = LoraFactor(lora_b, EXPERT_MINOR, num_experts, is_interleaved=mixed and not swapped)
    a, b = (of_lora_b, of_lora_a) if swapped else (of_lora_a, of_lora_b)
    return LoraPair(a=a, b=b, scaling=_Scaling(wrapper, adapter))


def _is_stale(wrapper: ParamWrapper, lora: ExpertLora) -> bool:
    """Whether PEFT has put other Parameter objects in place since binding (`load_state_dict(assign=True)`)."""
    pair = lora.gate_up if wrapper.parameter_name == "gate_up_proj" else lora.down
    bound = (pair.a.parameter, pair.b.parameter)
    for factors in ("lora_A", "lora_B"):
        for layer in wrapper._modules[factors]._modules.values():
            weight = layer._parameters["weight"]
            if weight is not bound[0] and weight is not bound[1]:
                return True
    return False


@torch.no_grad()
def _merge(wrappers: list[ParamWrapper], *, safe_merge: bool, adapter_names: list[str] | None) -> None:
    for adapter in dict.fromkeys(name for w in wrappers for name in check_adapters_to_merge(w, adapter_names)):
        todo = [w for w in wrappers if adapter in w.lora_A and adapter not in w.merged_adapters]
        if not todo:
            continue
        experts = todo[0].get_base_layer()
        deltas = {w.parameter_name: _lora(w, adapter) for w in todo}
        num_experts = todo[0].get_param().shape[0]
        merged = [_Merged(_origin(experts, index), index, deltas) for index in range(num_experts)]
        if safe_merge:
            for index in range(num_experts):
                if not all(part.isfinite().all() for part in merged[index]()):
                    raise ValueError(
                        f"safe_merge: adapter {adapter!r} makes expert {index} not finite; nothing was merged"
                    )
        for index in range(num_experts):
            experts.load_expert(index, *merged[index](), origin=merged[index])
        for wrapper in todo:
            wrapper.merged_adapters.append(adapter)


def _lora(wrapper: ParamWrapper, adapter: str) -> Lora:
    """One projection of all experts, f32, on the CPU."""
    pair = _pair(wrapper, adapter)
    kind = {"device": "cpu", "dtype": torch.float32, "copy": True}  # it outlives the adapter
    a = pair.a.canonical().detach().to(**kind)  # [experts, rank, in]
    b = pair.b.canonical().detach().to(**kind)  # [experts, rank, out]
    return Lora(a, b.mT, pair.scaling())


def _origin(experts: nn.Module, index: int) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    origin = experts.origin(index)
    if origin is None:
        raise ConfigError(
            f"merge: expert {index} was set by load_expert and is known in its rounded form only, whose steps would "
            "swallow the adapter; load the model with method BF16 to merge"
        )
    return origin


@dataclass(frozen=True)
class _Merged:
    """One expert's gate, up `[inter, hidden]` and down `[hidden, inter]` with the deltas added.

    `base` gives the weights before rounding to the packed format: added to the rounded ones, a delta below half their
    step would be rounded away.
    """

    base: Callable[[], tuple[Tensor, Tensor, Tensor]]
    index: int
    deltas: dict[str, Lora]

    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        gate, up, down = self.base()
        if "gate_up_proj" in self.deltas:
            gate_delta, up_delta = self.deltas["gate_up_proj"].delta(self.index).chunk(2)
            gate, up = (gate.float() + gate_delta).to(gate.dtype), (up.float() + up_delta).to(up.dtype)
        if "down_proj" in self.deltas:
            down = (down.float() + self.deltas["down_proj"].delta(self.index)).to(down.dtype)
        return gate, up, down


def _get_nb_trainable_parameters(self: PeftModel) -> tuple[int, int]:
    """PEFT's count plus the experts, which `parameters()` does not show."""
    trainable, total = type(self).get_nb_trainable_parameters(self)
    return trainable, total + hidden_numel(self)
