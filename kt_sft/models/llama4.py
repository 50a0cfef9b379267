"""Llama 4: experts that get every token, scaled by the router's sigmoid before the experts instead of after them.

transformers gives its experts module `[experts * tokens, hidden]`, zeros where an expert was not chosen. Ours takes
the chosen experts only, so the forward of the block around it changes as well.
"""

from __future__ import annotations

import types

import torch
from torch import Tensor, nn

from kt_sft.models.activations import activation_name
from kt_sft.models.layout import ExpertsSpec

EXPERTS_CLASS = "Llama4TextExperts"


def experts_spec(module: nn.Module) -> ExpertsSpec | None:
    """The spec of a `Llama4TextExperts`; None if the kernels lack its activation."""
    activation = activation_name(module.act_fn)
    num_experts, inter, hidden = module.down_proj.shape
    return None if activation is None else ExpertsSpec(num_experts, hidden, inter, activation, is_transposed=True)


def adapt(block: nn.Module) -> None:
    """Make a `Llama4TextMoe` call experts of transformers' experts interface."""
    block.forward = types.MethodType(_forward, block)


def _forward(self: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """hidden_states `[..., hidden]` -> `[tokens, hidden]` and the router's logits `[tokens, experts]`."""
    x = hidden_states.reshape(-1, self.hidden_dim)  # [tokens, hidden]
    scores, logits = self.router(x)  # [tokens, experts], zero where not chosen
    ids = logits.topk(self.top_k, dim=1).indices  # [tokens, k], those that the router chose
    scaled = x.unsqueeze(1) * scores.gather(1, ids).unsqueeze(-1)  # [tokens, k, hidden]
    # Each slot has an input of its own, so it becomes a token with one expert of weight one.
    ids = ids.reshape(-1, 1)
    routed = self.experts(scaled.flatten(0, 1), ids, torch.ones_like(ids, dtype=x.dtype))
    return self.shared_expert(x) + routed.view_as(scaled).sum(dim=1), logits
