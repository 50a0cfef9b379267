"""PEFT's layers around modules outside the experts that plain PEFT computes or merges wrongly, made right.

- A router that its block reads as `self.gate.weight` (DeepSeek-V2's) never sees LoRA: PEFT's wrapper gives the frozen
  weight. Here it gives W + delta.
- Blocks of DeepSeek-V3's kind ask their router for `e_score_correction_bias`, which PEFT's wrapper has not.
- Merging LoRA into one of two tied modules changes the other one as well: the weight is one Parameter. Here the module
  that is merged gets a Parameter of its own first.

Classes are changed in place, as binding.py does it with PEFT's wrappers around the experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from kt_sft.compat.peft import LoraEmbedding, LoraLayer, LoraLinear, ParamWrapper
from kt_sft.models.spec import iter_routed_experts


class _ReadWeight:
    """`weight` as an attribute is what `forward` multiplies by, with gradients for the adapter."""

    @property
    def weight(self) -> Tensor:
        weight = self.get_base_layer().weight
        if self.disable_adapters or self.merged:
            return weight
        for adapter in self.active_adapters:
            if adapter in self.lora_variant:
                weight = self.lora_variant[adapter].merge_safe(self, adapter, weight)
            elif adapter in self.lora_A:
                weight = weight + self.get_delta_weight(adapter)
        return weight


class _OwnWeight:
    """Merges into a weight that no other module shares."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        base = self.get_base_layer()
        base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=base.weight.requires_grad)
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)


class RouterLinear(_ReadWeight, LoraLinear):
    """LoRA on a router, by `target_modules`."""


class RouterParameter(_ReadWeight, ParamWrapper):
    """LoRA on a router, by `target_parameters`; other attributes are those of the router."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)


class TiedLinear(_OwnWeight, LoraLinear):
    """LoRA on a head that is also the embedding."""


class TiedEmbedding(_OwnWeight, LoraEmbedding):
    """LoRA on an embedding that is also the head."""


class TiedParameter(_OwnWeight, ParamWrapper):
    """LoRA on either, by `target_parameters`."""


_ROUTERS = {LoraLinear: RouterLinear, ParamWrapper: RouterParameter}
_TIED = {LoraLinear: TiedLinear, LoraEmbedding: TiedEmbedding, ParamWrapper: TiedParameter}


def bind_outside(peft_model: nn.Module) -> None:
    """Change the class of such layers; idempotent."""
    layers = {id(m.get_base_layer()): m for m in peft_model.modules() if isinstance(m, LoraLayer)}
    for router in _routers(peft_model):
        _become(layers.get(id(router)), _ROUTERS)
    shared: dict[int, list[nn.Module]] = {}
    for module in peft_model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            shared.setdefault(id(module.__dict__.get("weight", module._parameters.get("weight"))), []).append(module)
    for modules in shared.values():
        for module in modules if len(modules) > 1 else ():
            _become(layers.get(id(module)), _TIED)


def _routers(model: nn.Module) -> Iterator[nn.Module]:
    """Modules right beside the experts whose weight has a row per expert."""
    for name, experts in iter_routed_experts(model):
        block = model.get_submodule(name.replace(".base_layer", "").rpartition(".")[0])
        for child in block.children():
            router = child.get_base_layer() if isinstance(child, LoraLayer) else child
            weight = router._parameters.get("weight")
            if weight is not None and weight.dim() == 2 and weight.shape[0] == experts.spec.num_experts:
                yield router


def _become(layer: nn.Module | None, classes: dict[type, type]) -> None:
    if layer is not None and type(layer) in classes:
        layer.__class__ = classes[type(layer)]
