"""The attention of gpt-oss: LLaMA-Factory forces a kernel for GPUs, by a function that transformers has no more.

Its attention has sinks, which of transformers' own implementations only the eager one computes.
"""

from __future__ import annotations

import logging
from types import ModuleType
from typing import Any

from kt_sft import env
from kt_sft.compat.transformers import use_attention
from kt_sft.integrations.llamafactory import autoload

logger = logging.getLogger(__name__)

_EAGER = ("auto", "disabled")  # values of flash_attn that ask for nothing else


def patch_patcher(patcher: ModuleType) -> None:
    """`configure_attn_implementation`, which `patch_config` calls."""
    autoload.require(patcher, "configure_attn_implementation", "patch_config")
    stock = patcher.configure_attn_implementation

    def configure_attn_implementation(config: Any, model_args: Any) -> None:
        is_ours = getattr(model_args, "kt_active", False)
        if not is_ours or getattr(config, "model_type", None) != "gpt_oss":
            stock(config, model_args)
            return
        asked = getattr(model_args.flash_attn, "value", model_args.flash_attn)
        if asked not in _EAGER and env.local_rank() == 0:
            logger.warning("kt_sft: flash_attn %s: gpt-oss has attention sinks; eager attention is used", asked)
        use_attention(config, "eager")

    patcher.configure_attn_implementation = configure_attn_implementation
