"""Kimi-K2: DeepSeek-V3 under another `model_type`.

Its config.json says `kimi_k2`, which transformers does not know, and its own remote code keeps every expert as a module
of its own. The architecture is DeepSeek-V3's, so transformers' class is registered for it. Classes that are registered
from outside take precedence over remote code, which `trust_remote_code` (its tokenizer needs that) would choose.
"""

from __future__ import annotations

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3Config

from kt_sft.compat.transformers import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

MODEL_TYPE = "kimi_k2"


class KimiK2Config(DeepseekV3Config):
    """DeepSeek-V3's config with Kimi-K2's name."""

    model_type = MODEL_TYPE


class DeepseekV3ForCausalLM(transformers.DeepseekV3ForCausalLM):
    """DeepSeek-V3's model for that config; checkpoints name the class in `architectures`."""

    config_class = KimiK2Config


def register() -> None:
    """Make transformers' auto classes know `kimi_k2`; again is allowed."""
    AutoConfig.register(MODEL_TYPE, KimiK2Config, exist_ok=True)
    AutoModelForCausalLM.register(KimiK2Config, DeepseekV3ForCausalLM, exist_ok=True)
    mapping = get_checkpoint_conversion_mapping("deepseek_v3")
    register_checkpoint_conversion_mapping(MODEL_TYPE, mapping, overwrite=True)
