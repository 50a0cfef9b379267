"""What the configs of the tiny families share: sizes by kind of attention, experts and eyes.

No two sides of a matrix are equal, and 2 * inter differs from hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

VOCAB = 131


@dataclass(frozen=True)
class Family:
    """transformers' class names and the config of the tiny member."""

    config_class: str
    model_class: str
    values: dict[str, Any]
    config_json: dict[str, Any] = field(default_factory=dict)  # written over what transformers saves


def writes(stem: str, **values: Any) -> Family:
    """A family that reads and writes text, by the name that its classes begin with."""
    return Family(f"{stem}Config", f"{stem.removesuffix('Text')}ForCausalLM", values)


def sees(stem: str, **values: Any) -> Family:
    """A family that reads pictures as well; the parity test gives it text."""
    return Family(f"{stem}Config", f"{stem}ForConditionalGeneration", values)


def composite(values: dict[str, Any]) -> dict[str, Any]:
    """Config values of a model that sees: the common ones go into the text part."""
    return {"tie_word_embeddings": False, **values, "text_config": {**COMMON, **values["text_config"]}}


COMMON = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KV_HEADS = {"num_key_value_heads": 2}
GQA = {**KV_HEADS, "head_dim": 12}
MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
}
SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR_ATTENTION = {
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
    "shared_expert_intermediate_size": 28,
}
DENSE_FIRST = {"mlp_layer_types": ["dense", "sparse"]}

# Sizes where every layer has experts, and where dense layers or shared experts have a size of their own.
PLAIN_SIZES = {"hidden_size": 48, "intermediate_size": 28}
SIZES = {"hidden_size": 48, "intermediate_size": 44, "moe_intermediate_size": 20}
SEVEN_EXPERTS = {"num_experts": 7, "num_experts_per_tok": 3}
QWEN = {**SIZES, **SEVEN_EXPERTS, **GQA}
OLMO = {**PLAIN_SIZES, **SEVEN_EXPERTS, **KV_HEADS}
ERNIE = {**SIZES, "moe_num_experts": 7, "moe_k": 3, "moe_num_shared_experts": 1, **KV_HEADS}
MIXTRAL = {
    "hidden_size": 56,
    "intermediate_size": 36,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    **KV_HEADS,
    "head_dim": 14,
}
GROUPED_ROUTING = {
    "hidden_size": 44,
    "intermediate_size": 60,
    "moe_intermediate_size": 20,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
GLM = {**GROUPED_ROUTING, "routed_scaling_factor": 1.5, **GQA}
DEEPSEEK_V3 = {**GROUPED_ROUTING, "routed_scaling_factor": 2.5, **MLA, "num_hidden_layers": 3}
MISTRAL4 = {**GLM, **MLA, "num_hidden_layers": 3, "head_dim": 16}
QWEN_LINEAR = {**QWEN, **LINEAR_ATTENTION, "head_dim": 16}
GEMMA4 = {
    **SIZES,
    "num_experts": 7,
    "top_k_experts": 3,
    "enable_moe_block": True,
    **GQA,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": VOCAB,
    **SLIDING,
}
