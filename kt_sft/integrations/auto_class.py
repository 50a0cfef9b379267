"""Which of transformers' auto classes makes a model from its config."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM, PretrainedConfig

from kt_sft.models import kimi_k2

kimi_k2.register()


def auto_class(config: PretrainedConfig) -> Any:
    """The auto class for text generation with this config, of a model that also sees or hears the one with all parts.

    Remote code says by its `auto_map` what it serves; AutoModelForCausalLM is also the answer where nothing fits, since
    its message lists the known models.
    """
    kinds = [AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM]
    if config.get_text_config() is not config:
        kinds = kinds[1:] + kinds[:1]
    remote = getattr(config, "auto_map", None) or {}
    for kind in kinds:
        if kind.__name__ in remote or type(config) in kind._model_mapping:
            return kind
    return AutoModelForCausalLM
