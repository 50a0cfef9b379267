"""Models without weights to resolve rules on: the tiny families, and the sizes of published members of each."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from kt_sft.integrations.transformers.auto_class import auto_class
from kt_sft.models import kimi_k2
from tests.helpers import tiny_models

# Model -> (config class, values of its public config.json that set sizes).
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2_lite": ("DeepseekV2Config", {
        "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
        "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "n_shared_experts": 2,
        "n_routed_experts": 64, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "kv_lora_rank": 512,
        "q_lora_rank": None, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
        "topk_method": "greedy", "n_group": 1, "topk_group": 1,
    }),
    "deepseek_v2": ("DeepseekV2Config", {
        "vocab_size": 102400, "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536,
        "num_hidden_layers": 60, "num_attention_heads": 128, "num_key_value_heads": 128, "n_shared_experts": 2,
        "n_routed_experts": 160, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "kv_lora_rank": 512,
        "q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
        "topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3,
    }),
    "deepseek_v3": ("DeepseekV3Config", {
        "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "n_shared_experts": 1,
        "n_routed_experts": 256, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "kv_lora_rank": 512,
        "q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
        "n_group": 8, "topk_group": 4, "quantization_config": {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
        },
    }),
    "kimi_k2": ("KimiK2Config", {
        "vocab_size": 163840, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "num_hidden_layers": 61, "num_attention_heads": 64, "num_key_value_heads": 64, "n_shared_experts": 1,
        "n_routed_experts": 384, "num_experts_per_tok": 8, "first_k_dense_replace": 1, "kv_lora_rank": 512,
        "q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
        "n_group": 1, "topk_group": 1,
    }),
    "qwen3_moe": ("Qwen3MoeConfig", {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "tie_word_embeddings": False,
    }),
    "qwen3_moe_235b": ("Qwen3MoeConfig", {
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536,
        "num_hidden_layers": 94, "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "tie_word_embeddings": False,
    }),
    "mixtral": ("MixtralConfig", {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    }),
}  # fmt: skip


def on_meta(config: Any) -> nn.Module:
    """The model of a config, without weights."""
    with torch.device("meta"):
        return auto_class(config).from_config(config)


def tiny(family: str, **overrides: Any) -> nn.Module:
    """The tiny member of a family, without weights."""
    return on_meta(tiny_models.config(family, **overrides))


def published_config(name: str) -> Any:
    """The config of a published model; all of them compute in bf16."""
    kind, values = PUBLISHED[name]
    owner = kimi_k2 if hasattr(kimi_k2, kind) else transformers
    return getattr(owner, kind)(**values, dtype="bfloat16")
