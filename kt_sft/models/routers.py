"""Linear layers that choose: routers, which pick experts, and indexers, which pick what attention sees.

No LoRA target means them, and they are never packed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import nn

from kt_sft.models.spec import iter_routed_experts
from kt_sft.models.unwrapped import plain_modules, plain_name


def find_routers(modules: Mapping[str, nn.Module], num_experts: Mapping[str, int]) -> Iterator[str]:
    """Routers that are linear layers (DeepSeek-V2's `mlp.gate`), by name.

    A router is a Linear beside the experts, or inside a sibling whose class says router or gate, with one output per
    expert.

    Args:
        modules: of the model, see `plain_modules`.
        num_experts: of each experts module, by name.
    """
    for experts, outputs in num_experts.items():
        block = experts.rpartition(".")[0]
        beside = f"{block}." if block else ""
        for name, module in modules.items():
            if not (isinstance(module, nn.Linear) and name.startswith(beside) and module.out_features == outputs):
                continue
            sibling = beside + name.removeprefix(beside).partition(".")[0]
            is_named = name == sibling or re.search("Router|Gate", type(modules[sibling]).__name__)
            if sibling != experts and is_named:
                yield name


def router_linears(model: nn.Module) -> list[str]:
    """Routers that are `nn.Linear` (DeepSeek-V2's `mlp.gate`), so that a LoRA target could hit them.

    Routers that hold a bare Parameter cannot be hit.
    """
    experts = {plain_name(name): module.gate_up_proj.shape[0] for name, module in iter_routed_experts(model)}
    return list(find_routers(plain_modules(model), experts))


def indexer_linears(model: nn.Module) -> list[str]:
    """Linear layers of indexers (GLM-5, DeepSeek-V3.2), which choose what attention sees: no gradient reaches them."""
    modules = plain_modules(model)
    indexers = tuple(f"{name}." for name, module in modules.items() if type(module).__name__.endswith("Indexer"))
    return [name for name, m in modules.items() if name.startswith(indexers) and isinstance(m, nn.Linear)]


def frozen_linears(model: nn.Module) -> set[str]:
    """Linear layers that no target trains by `target_modules`."""
    return {*router_linears(model), *indexer_linears(model)}
