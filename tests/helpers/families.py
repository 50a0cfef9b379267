"""The tiny members of every mixture-of-experts family: transformers' class names and the values of their configs.

No two sides of a matrix are equal, 2 * inter differs from hidden, and layers of each kind that a family has (dense,
linear attention, shared experts) are there.
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


def composite(values: dict[str, Any]) -> dict[str, Any]:
    """Config values of a model that sees: the common ones go into the text part."""
    return {**values, "text_config": {**COMMON, **values["text_config"]}, "tie_word_embeddings": False}


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
_MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "num_hidden_layers": 3,
}
_GQA = {"num_key_value_heads": 2, "head_dim": 12}
_QWEN = {
    "hidden_size": 48,
    "intermediate_size": 44,
    "moe_intermediate_size": 20,
    "num_experts": 7,
    "num_experts_per_tok": 3,
    **_GQA,
}
_GLM = {
    "hidden_size": 44,
    "intermediate_size": 60,
    "moe_intermediate_size": 20,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    **_GQA,
}
_MIXTRAL = {
    "hidden_size": 56,
    "intermediate_size": 36,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 2,
    "head_dim": 14,
}
_LINEAR_ATTENTION = {
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
    "shared_expert_intermediate_size": 28,
}
_MLA_GLM = {name: _MLA[name] for name in _MLA if name not in ("first_k_dense_replace", "num_hidden_layers")}

_VISION = {
    "depth": 2,
    "hidden_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "intermediate_size": 28,
    "out_hidden_size": 48,
}
_IMAGE_TOKENS = {"image_token_id": 120, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}

FAMILIES: dict[str, Family] = {
    "afmoe": Family(
        "AfmoeConfig",
        "AfmoeForCausalLM",
        {
            **_QWEN,
            "num_dense_layers": 1,
            "num_shared_experts": 1,
            "route_scale": 1.5,
            "global_attn_every_n_layers": 2,
            "sliding_window": 5,
        },
    ),
    "deepseek_v2": Family(
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        {
            **_MLA,
            "hidden_size": 52,
            "intermediate_size": 60,
            "moe_intermediate_size": 28,
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "routed_scaling_factor": 1.0,
        },
    ),
    "deepseek_v3": Family(
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            **_MLA,
            "hidden_size": 44,
            "intermediate_size": 60,
            "moe_intermediate_size": 20,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 2,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
        },
    ),
    "dots1": Family("Dots1Config", "Dots1ForCausalLM", {**_GLM, "sliding_window": None}),
    "ernie4_5_moe": Family(
        "Ernie4_5_MoeConfig",
        "Ernie4_5_MoeForCausalLM",
        {
            "hidden_size": 48,
            "intermediate_size": 44,
            "moe_intermediate_size": 20,
            "moe_num_experts": 7,
            "moe_k": 3,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "num_key_value_heads": 2,
        },
    ),
    "exaone_moe": Family(
        "ExaoneMoeConfig",
        "ExaoneMoeForCausalLM",
        {
            **_GLM,
            "num_experts": 8,
            "num_shared_experts": 1,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "flex_olmo": Family(
        "FlexOlmoConfig",
        "FlexOlmoForCausalLM",
        {
            "hidden_size": 48,
            "intermediate_size": 28,
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "num_key_value_heads": 2,
        },
    ),
    "gemma4_text": Family(
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            "hidden_size": 48,
            "intermediate_size": 44,
            "moe_intermediate_size": 20,
            "num_experts": 7,
            "top_k_experts": 3,
            "enable_moe_block": True,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": VOCAB,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "glm4_moe": Family("Glm4MoeConfig", "Glm4MoeForCausalLM", {**_GLM, "use_qk_norm": True}),
    "glm4_moe_lite": Family(
        "Glm4MoeLiteConfig",
        "Glm4MoeLiteForCausalLM",
        {**_GLM, **_MLA_GLM, "head_dim": 6, "mlp_layer_types": ["dense", "sparse"]},
    ),
    "glm_moe_dsa": Family(
        "GlmMoeDsaConfig",
        "GlmMoeDsaForCausalLM",
        {
            **_GLM,
            **_MLA_GLM,
            "head_dim": 6,
            "mlp_layer_types": ["dense", "sparse"],
            "index_topk": 64,
            "index_head_dim": 16,
            "index_n_heads": 2,
        },
    ),
    "gpt_oss": Family(
        "GptOssConfig",
        "GptOssForCausalLM",
        {**_MIXTRAL, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "hunyuan_v1_moe": Family(
        "HunYuanMoEV1Config",
        "HunYuanMoEV1ForCausalLM",
        {"hidden_size": 48, "intermediate_size": 28, "num_experts": 7, "moe_topk": 3, **_GQA},
    ),
    "hy_v3": Family(
        "HYV3Config",
        "HYV3ForCausalLM",
        {**_QWEN, "num_shared_experts": 1, "router_scaling_factor": 1.5, "mlp_layer_types": ["dense", "sparse"]},
    ),
    "jamba": Family(
        "JambaConfig",
        "JambaForCausalLM",
        {
            "hidden_size": 48,
            "intermediate_size": 28,
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "num_key_value_heads": 2,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 6,
            "mamba_dt_rank": 5,
            "use_mamba_kernels": False,
        },
    ),
    "kimi_k2": Family(  # saved by DeepSeek-V3's class; below, what its config.json says instead
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            **_MLA,
            "hidden_size": 44,
            "intermediate_size": 60,
            "moe_intermediate_size": 20,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.827,
        },
        {
            "model_type": "kimi_k2",
            "auto_map": {
                "AutoConfig": "configuration_deepseek.DeepseekV3Config",
                "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
            },
        },
    ),
    "lfm2_moe": Family(
        "Lfm2MoeConfig",
        "Lfm2MoeForCausalLM",
        {
            "hidden_size": 48,
            "intermediate_size": 44,
            "moe_intermediate_size": 20,
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "num_key_value_heads": 2,
            "num_dense_layers": 1,
            "num_hidden_layers": 3,
            "conv_L_cache": 3,
            "layer_types": ["conv", "conv", "full_attention"],
        },
    ),
    "llama4_text": Family(
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {
            **_MIXTRAL,
            "intermediate_size_mlp": 44,
            "interleave_moe_layer_step": 1,
            "attention_chunk_size": 16,
            "use_qk_norm": True,
        },
    ),
    "minimax": Family(
        "MiniMaxConfig",
        "MiniMaxForCausalLM",
        {**_MIXTRAL, "layer_types": ["linear_attention", "full_attention"], "block_size": 8},
    ),
    "minimax_m2": Family("MiniMaxM2Config", "MiniMaxM2ForCausalLM", {**_MIXTRAL}),
    "mistral4": Family("Mistral4Config", "Mistral4ForCausalLM", {**_GLM, **_MLA, "head_dim": 16}),
    "mixtral": Family("MixtralConfig", "MixtralForCausalLM", _MIXTRAL),
    "olmoe": Family(
        "OlmoeConfig",
        "OlmoeForCausalLM",
        {
            "hidden_size": 48,
            "intermediate_size": 28,
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "num_key_value_heads": 2,
        },
    ),
    "phimoe": Family("PhimoeConfig", "PhimoeForCausalLM", {**_MIXTRAL, "attention_bias": True, "lm_head_bias": True}),
    "qwen2_moe": Family(
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {**{k: v for k, v in _QWEN.items() if k != "head_dim"}, "shared_expert_intermediate_size": 28},
    ),
    "qwen3_5_moe_text": Family(
        "Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", {**_QWEN, **_LINEAR_ATTENTION, "head_dim": 16}
    ),
    "qwen3_moe": Family("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**_QWEN, "norm_topk_prob": True}),
    "qwen3_next": Family("Qwen3NextConfig", "Qwen3NextForCausalLM", {**_QWEN, **_LINEAR_ATTENTION, "head_dim": 16}),
    "solar_open": Family("SolarOpenConfig", "SolarOpenForCausalLM", _GLM),
    # Those that see as well; the parity test gives them text.
    "ernie4_5_vl_moe": Family(
        "Ernie4_5_VLMoeConfig",
        "Ernie4_5_VLMoeForConditionalGeneration",
        {
            "text_config": {
                "hidden_size": 48,
                "intermediate_size": 44,
                "moe_intermediate_size": [20, 12],
                "moe_num_experts": 7,
                "moe_k": 3,
                "moe_num_shared_experts": 1,
                "mlp_layer_types": ["dense", "sparse"],
                "num_key_value_heads": 2,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]},
            },
            "vision_config": {**{k: v for k, v in _VISION.items() if "temporal" not in k and "out" not in k}},
            "image_token_id": 120,
            "video_token_id": 121,
        },
    ),
    "gemma4": Family(
        "Gemma4Config",
        "Gemma4ForConditionalGeneration",
        {
            "vision_config": {
                "hidden_size": 24,
                "intermediate_size": 28,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 12,
            }
        },
    ),
    "glm4v_moe": Family(
        "Glm4vMoeConfig",
        "Glm4vMoeForConditionalGeneration",
        {
            "text_config": {**_GLM, "rope_parameters": {**_MROPE, "mrope_section": [1, 1, 1]}},
            "vision_config": {**_VISION, "out_hidden_size": 44},
            **{k: v for k, v in _IMAGE_TOKENS.items() if "vision" not in k},
        },
    ),
    "mistral3": Family(
        "Mistral3Config",
        "Mistral3ForConditionalGeneration",
        {
            "text_config": {"model_type": "mistral4", **_GLM, **_MLA, "head_dim": 16},
            "vision_config": {
                "model_type": "pixtral",
                "hidden_size": 24,
                "intermediate_size": 28,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "patch_size": 4,
                "image_size": 16,
                "head_dim": 12,
            },
        },
    ),
    "qwen3_5_moe": Family(
        "Qwen3_5MoeConfig",
        "Qwen3_5MoeForConditionalGeneration",
        {
            "text_config": {**_QWEN, **_LINEAR_ATTENTION, "head_dim": 16},
            "vision_config": _VISION,
            **_IMAGE_TOKENS,
        },
    ),
    "qwen3_omni_moe_thinker": Family(
        "Qwen3OmniMoeThinkerConfig",
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        {
            "text_config": {**_QWEN, "rope_parameters": _MROPE},
            "vision_config": {**_VISION, "deepstack_visual_indexes": [0]},
            "audio_config": {
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 28,
                "d_model": 24,
                "output_dim": 48,
                "downsample_hidden_size": 8,
                "num_mel_bins": 16,
            },
            **{k: v for k, v in _IMAGE_TOKENS.items() if "vision" not in k},
            "audio_token_id": 124,
        },
    ),
    "qwen3_vl_moe": Family(
        "Qwen3VLMoeConfig",
        "Qwen3VLMoeForConditionalGeneration",
        {
            "text_config": {**_QWEN, "rope_parameters": _MROPE},
            "vision_config": {**_VISION, "deepstack_visual_indexes": [0]},
            **_IMAGE_TOKENS,
        },
    ),
}
FAMILIES["gemma4"].values["text_config"] = FAMILIES["gemma4_text"].values
