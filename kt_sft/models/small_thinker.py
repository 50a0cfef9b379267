"""SmallThinker, remote code: ReLU-gated experts in a ModuleList, routed by the layer's input before attention.

Facts from its modeling file: a block `SmallThinkerMoeBlock` with `primary_router` and `experts`, each a
`SmallThinkerExpert` with linear layers `up`, `gate` and `down`; top-k of the router's logits, then softmax, or sigmoid
divided by its sum; returns the hidden states and the chosen logits.
"""

from __future__ import annotations

import types

import torch
from torch import Tensor, nn

from kt_sft.models.layout import ExpertsSpec

EXPERTS_CLASS = "SmallThinkerExpert"
IN_MODULE_LIST = True


def experts_spec(module: nn.ModuleList) -> ExpertsSpec:
    """The spec of a ModuleList of `SmallThinkerExpert`."""
    inter, hidden = module[0].gate.weight.shape
    return ExpertsSpec(len(module), hidden, inter, activation="relu", expert_keys=("gate", "up", "down"))


def adapt(block: nn.Module) -> None:
    """Make a `SmallThinkerMoeBlock` call experts of transformers' experts interface."""
    block.forward = types.MethodType(_forward, block)


def _forward(self: nn.Module, router_input: Tensor, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Both `[batch, length, hidden]` -> the same and the chosen router logits `[tokens, k]`."""
    logits = self.primary_router(router_input.flatten(0, -2))  # [tokens, experts]
    logits, ids = logits.topk(self.num_active_primary_experts, dim=-1)  # [tokens, k]
    if self.moe_primary_router_apply_softmax:
        weights = logits.softmax(dim=-1, dtype=torch.float)
    else:
        weights = logits.sigmoid()
        weights = weights / weights.sum(dim=-1, keepdim=True)
    out = self.experts(hidden_states.flatten(0, -2), ids, weights.to(hidden_states.dtype))
    return out.view_as(hidden_states), logits
