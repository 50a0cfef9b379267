"""Linear layers that choose: routers, which pick experts, and indexers, which pick what attention sees.

No LoRA target means them, and they are never packed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import nn

from kt_sft.models.spec import iter_routed_experts
from kt_sft.models.unwrapped import plain_modules, plain_name


def find_routers(model: nn.Module, num_experts: Mapping[str, int]) -> Iterator[str]:
    """Routers that are linear layers (DeepSeek-V2's `mlp.gate`), by name.

    A router is a Linear beside the experts, or inside a sibling whose class says router or gate, with one output per
    expert.

    Args:
        num_experts: of each experts module, by name.
    """
    for name, outputs in num_experts.items():
        block_name, _, experts_name = name.rpartition(".")
        for child_name, child in model.get_submodule(block_name).named_children():
            if child_name == experts_name or not (_is_linear(child) or re.search("Router|Gate", type(child).__name__)):
                continue
            for inner_name, inner in child.named_modules(prefix=f"{block_name}.{child_name}".lstrip(".")):
                if _is_linear(inner) and inner.out_features == outputs:
                    yield inner_name


def router_linears(model: nn.Module) -> list[str]:
    """Routers that are `nn.Linear` (DeepSeek-V2's `mlp.gate`), so that a LoRA target could hit them.

    Routers that hold a bare Parameter cannot be hit.
    """
    experts = {plain_name(name): module for name, module in iter_routed_experts(model)}
    return list(find_routers(model, {name: module.gate_up_proj.shape[0] for name, module in experts.items()}))


def indexer_linears(model: nn.Module) -> list[str]:
    """Linear layers of indexers (GLM-5, DeepSeek-V3.2), which choose what attention sees: no gradient reaches them."""
    modules = plain_modules(model)
    indexers = tuple(f"{name}." for name, module in modules.items() if type(module).__name__.endswith("Indexer"))
    return [name for name, m in modules.items() if name.startswith(indexers) and isinstance(m, nn.Linear)]


def frozen_linears(model: nn.Module) -> set[str]:
    """Linear layers that no target trains by `target_modules`."""
    return {*router_linears(model), *indexer_linears(model)}


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)
