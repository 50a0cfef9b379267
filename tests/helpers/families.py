"""The tiny members of every mixture-of-experts family: transformers' class names and the values of their configs.

Layers of each kind that a family has (dense, linear attention, shared experts) are there; `family_parts` has what
several share.
"""

from __future__ import annotations

from tests.helpers import family_parts as parts
from tests.helpers.family_parts import Family, writes
from tests.helpers.vision_families import VISION_FAMILIES

_DEEPSEEK_V3 = writes("DeepseekV3", **parts.DEEPSEEK_V3)
_MLA_SPARSE = {**parts.GLM, **parts.MLA, "head_dim": 6, **parts.DENSE_FIRST}

FAMILIES: dict[str, Family] = {
    "afmoe": writes(
        "Afmoe",
        **parts.QWEN,
        num_dense_layers=1,
        num_shared_experts=1,
        route_scale=1.5,
        global_attn_every_n_layers=2,
        sliding_window=5,
    ),
    "deepseek_v2": writes(
        "DeepseekV2",
        **parts.MLA,
        first_k_dense_replace=1,
        n_shared_experts=1,
        num_hidden_layers=3,
        hidden_size=52,
        intermediate_size=60,
        moe_intermediate_size=28,
        n_routed_experts=6,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
        routed_scaling_factor=1.0,
    ),
    "deepseek_v3": _DEEPSEEK_V3,
    "dots1": writes("Dots1", **parts.GLM, sliding_window=None),
    "ernie4_5_moe": writes("Ernie4_5_Moe", **parts.ERNIE, moe_layer_start_index=1),
    "exaone_moe": writes("ExaoneMoe", **parts.GLM, num_experts=8, num_shared_experts=1, **parts.SLIDING),
    "flex_olmo": writes("FlexOlmo", **parts.OLMO),
    "gemma4_text": writes("Gemma4Text", **parts.GEMMA4),
    "glm4_moe": writes("Glm4Moe", **parts.GLM, use_qk_norm=True),
    "glm4_moe_lite": writes("Glm4MoeLite", **_MLA_SPARSE),
    "glm_moe_dsa": writes("GlmMoeDsa", **_MLA_SPARSE, index_topk=64, index_head_dim=16, index_n_heads=2),
    "gpt_oss": writes("GptOss", **parts.MIXTRAL, **parts.SLIDING),
    "hunyuan_v1_moe": writes("HunYuanMoEV1", **parts.PLAIN_SIZES, num_experts=7, moe_topk=3, **parts.GQA),
    "hy_v3": writes("HYV3", **parts.QWEN, num_shared_experts=1, router_scaling_factor=1.5, **parts.DENSE_FIRST),
    "jamba": writes(
        "Jamba",
        **parts.OLMO,
        expert_layer_period=2,
        expert_layer_offset=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=6,
        mamba_dt_rank=5,
        use_mamba_kernels=False,
    ),
    "kimi_k2": Family(  # saved by DeepSeek-V3's class; below, what its config.json says instead
        _DEEPSEEK_V3.config_class,
        _DEEPSEEK_V3.model_class,
        {**parts.DEEPSEEK_V3, "n_group": 1, "routed_scaling_factor": 2.827},
        {
            "model_type": "kimi_k2",
            "auto_map": {
                "AutoConfig": "configuration_deepseek.DeepseekV3Config",
                "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
            },
        },
    ),
    "lfm2_moe": writes(
        "Lfm2Moe",
        **parts.SIZES,
        **parts.SEVEN_EXPERTS,
        **parts.KV_HEADS,
        num_dense_layers=1,
        num_hidden_layers=3,
        conv_L_cache=3,
        layer_types=["conv", "conv", "full_attention"],
    ),
    "llama4_text": writes(
        "Llama4Text",
        **parts.MIXTRAL,
        intermediate_size_mlp=44,
        interleave_moe_layer_step=1,
        attention_chunk_size=16,
        use_qk_norm=True,
    ),
    "minimax": writes("MiniMax", **parts.MIXTRAL, layer_types=["linear_attention", "full_attention"], block_size=8),
    "minimax_m2": writes("MiniMaxM2", **parts.MIXTRAL),
    "mistral4": writes("Mistral4", **parts.MISTRAL4),
    "mixtral": writes("Mixtral", **parts.MIXTRAL),
    "olmoe": writes("Olmoe", **parts.OLMO),
    "phimoe": writes("Phimoe", **parts.MIXTRAL, attention_bias=True, lm_head_bias=True),
    "qwen2_moe": writes(
        "Qwen2Moe", **parts.SIZES, **parts.SEVEN_EXPERTS, **parts.KV_HEADS, shared_expert_intermediate_size=28
    ),
    "qwen3_5_moe_text": writes("Qwen3_5MoeText", **parts.QWEN_LINEAR),
    "qwen3_moe": writes("Qwen3Moe", **parts.QWEN, norm_topk_prob=True),
    "qwen3_next": writes("Qwen3Next", **parts.QWEN_LINEAR),
    "solar_open": writes("SolarOpen", **parts.GLM),
    **VISION_FAMILIES,
}
