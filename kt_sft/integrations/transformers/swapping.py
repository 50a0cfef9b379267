"""Our experts modules in the place of transformers'."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from kt_sft.config import KTConfig
from kt_sft.models.families import adapt_block
from kt_sft.models.spec import ExpertsSpec
from kt_sft.nn.routed_experts import PLACEHOLDERS, RoutedExperts, WeightFormats
from kt_sft.schedule.deferred import Deferral, LayerChain


def swap_experts(
    model: PreTrainedModel, specs: dict[str, ExpertsSpec], config: KTConfig, formats: dict[str, WeightFormats]
) -> None:
    """Put our experts modules, empty, in the place of transformers'."""
    dtype = model.dtype
    chain = LayerChain()
    for name, spec in specs.items():
        parent, _, attribute = name.rpartition(".")
        # transformers builds the model under a meta-device context that must not reach our placeholders.
        with torch.device("cpu"):
            experts = RoutedExperts(
                spec,
                weight_format=formats[name],
                group_size=config.int4_group_size,
                expert_activations=config.expert_activations,
                chunk_size=config.chunk_size,
                cpu_activation=config.cpu_activation,
                dtype=dtype,
            )
        if config.max_deferred_experts_per_token:
            chain.append(experts)
            experts.deferral = Deferral(chain, config.max_deferred_experts_per_token)
        for placeholder in PLACEHOLDERS:
            getattr(experts, placeholder)._is_hf_initialized = True
        block = model.get_submodule(parent)
        adapt_block(block, getattr(block, attribute))
        setattr(block, attribute, experts)


def unread_patterns(model: PreTrainedModel, specs: dict[str, ExpertsSpec]) -> Iterator[str]:
    """Checkpoint keys that transformers leaves unread on purpose: the experts, and extra prediction layers."""
    for pattern in sorted({re.sub(r"\d+", r"\\d+", re.escape(name)) for name in specs}):
        yield rf"^{pattern}\.(gate_up_proj|down_proj)(_\w+)?$"
    for name, spec in specs.items():
        if spec.expert_keys:
            yield rf"^{re.escape(name)}\.\d+\.({'|'.join(spec.expert_keys)})\."
    text_config = model.config.get_text_config()
    for extra in range(getattr(text_config, "num_nextn_predict_layers", None) or 0):
        yield rf"^model\.layers\.{text_config.num_hidden_layers + extra}\."
