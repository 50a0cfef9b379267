"""The tiny members of the families that see: a text part as in `families`, and eyes as small as they go."""

from __future__ import annotations

from tests.helpers import family_parts as parts
from tests.helpers.family_parts import Family, sees

_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
_IMAGE_TOKENS = {"image_token_id": 120, "video_token_id": 121}
_VISION_TOKENS = {"vision_start_token_id": 122, "vision_end_token_id": 123}
_ERNIE_VISION = {
    "depth": 2,
    "hidden_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "intermediate_size": 28,
}
_VISION = {**_ERNIE_VISION, "temporal_patch_size": 2, "out_hidden_size": 48}
_DEEPSTACK_VISION = {**_VISION, "deepstack_visual_indexes": [0]}
_ONE_LAYER_VISION = {
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 12,
}

VISION_FAMILIES: dict[str, Family] = {
    "ernie4_5_vl_moe": sees(
        "Ernie4_5_VLMoe",
        text_config={
            **parts.ERNIE,
            "moe_intermediate_size": [20, 12],
            **parts.DENSE_FIRST,
            "rope_parameters": _MROPE,
        },
        vision_config=_ERNIE_VISION,
        **_IMAGE_TOKENS,
    ),
    "gemma4": sees("Gemma4", text_config=parts.GEMMA4, vision_config={**_ONE_LAYER_VISION, "num_key_value_heads": 2}),
    "glm4v_moe": sees(
        "Glm4vMoe",
        text_config={**parts.GLM, "rope_parameters": {**_MROPE, "mrope_section": [1, 1, 1]}},
        vision_config={**_VISION, "out_hidden_size": 44},
        **_IMAGE_TOKENS,
    ),
    "mistral3": sees(
        "Mistral3",
        text_config={"model_type": "mistral4", **parts.MISTRAL4},
        vision_config={"model_type": "pixtral", **_ONE_LAYER_VISION, "patch_size": 4, "image_size": 16},
    ),
    "qwen3_5_moe": sees(
        "Qwen3_5Moe",
        text_config=parts.QWEN_LINEAR,
        vision_config=_VISION,
        **_IMAGE_TOKENS,
        **_VISION_TOKENS,
    ),
    "qwen3_omni_moe_thinker": sees(
        "Qwen3OmniMoeThinker",
        text_config={**parts.QWEN, "rope_parameters": _MROPE},
        vision_config=_DEEPSTACK_VISION,
        audio_config={
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 28,
            "d_model": 24,
            "output_dim": 48,
            "downsample_hidden_size": 8,
            "num_mel_bins": 16,
        },
        **_IMAGE_TOKENS,
        audio_token_id=124,
    ),
    "qwen3_vl_moe": sees(
        "Qwen3VLMoe",
        text_config={**parts.QWEN, "rope_parameters": _MROPE},
        vision_config=_DEEPSTACK_VISION,
        **_IMAGE_TOKENS,
        **_VISION_TOKENS,
    ),
}
