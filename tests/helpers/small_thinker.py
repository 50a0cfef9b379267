"""A tiny model with SmallThinker's experts as remote code: what `build` copies beside its weights.

Mixtral's attention and norms; block and experts are named and called as SmallThinker's are.
"""

import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM


class SmallThinkerConfig(MixtralConfig):
    model_type = "tiny_small_thinker"


class SmallThinkerExpert(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down(self.up(x) * torch.relu(self.gate(x)))


class SmallThinkerMoeBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_active_primary_experts = config.num_experts_per_tok
        self.moe_primary_router_apply_softmax = config.apply_softmax
        self.primary_router = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts = nn.ModuleList(SmallThinkerExpert(config) for _ in range(config.num_local_experts))

    def forward(self, router_input, hidden_states):
        logits = self.primary_router(router_input)  # [batch, length, experts]
        chosen = logits.topk(self.num_active_primary_experts, dim=-1)
        weights = chosen.values.softmax(-1) if self.moe_primary_router_apply_softmax else chosen.values.sigmoid()
        weights = weights / weights.sum(-1, keepdim=True)
        dense = torch.zeros_like(logits).scatter(-1, chosen.indices, weights)
        out = sum(dense[..., e, None] * expert(hidden_states) for e, expert in enumerate(self.experts))
        return out, chosen.values


class Routed(nn.Module):
    """Gives the block, which Mixtral's layer calls with one argument, the layer's input as the router's."""

    def __init__(self, block):
        super().__init__()
        self.block = block
        self.router_input = None

    def forward(self, hidden_states):
        return self.block(self.router_input, hidden_states)[0]


class SmallThinkerForCausalLM(MixtralForCausalLM):
    config_class = SmallThinkerConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = Routed(SmallThinkerMoeBlock(config))
            layer.register_forward_pre_hook(lambda layer, args: setattr(layer.mlp, "router_input", args[0]))
        self.post_init()


def build(directory: Path, *, apply_softmax: bool) -> Path:
    """Random weights that are exact in bf16, and this file as `modeling_small_thinker.py`."""
    torch.manual_seed(0)
    config = SmallThinkerConfig(
        vocab_size=131, hidden_size=56, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=14, num_local_experts=5, num_experts_per_tok=2, max_position_embeddings=128,
        pad_token_id=0, apply_softmax=apply_softmax,
    )  # fmt: skip
    name = "modeling_small_thinker"
    config.auto_map = {
        "AutoConfig": f"{name}.SmallThinkerConfig",
        "AutoModelForCausalLM": f"{name}.SmallThinkerForCausalLM",
    }
    model = SmallThinkerForCausalLM(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 1.5 / parameter.shape[-1] ** 0.5 if "embed" not in key else 1.0)
            parameter.copy_(parameter.to(torch.bfloat16))
    model.to(torch.bfloat16).save_pretrained(directory)
    shutil.copy(__file__, directory / f"{name}.py")
    return directory
