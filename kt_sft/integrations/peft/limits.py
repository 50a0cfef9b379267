"""What can be trained and yet not be merged, converted or even saved afterwards: said before training starts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from peft import LoraConfig
from peft.tuners.lora.layer import Embedding, LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn

from kt_sft.adapters import kinds
from kt_sft.adapters.forms import open_adapter
from kt_sft.adapters.peft_config import RESIDUAL
from kt_sft.integrations.peft.adapter_dir import read_adapter_config
from kt_sft.integrations.peft.outside import RouterLinear
from kt_sft.integrations.peft.unwrapped import plain_name
from kt_sft.integrations.transformers.base_model import describe
from kt_sft.models.spec import iter_routed_experts


def training_limits(peft_model: nn.Module, config: LoraConfig) -> list[str]:
    """One sentence for each kind in a model that is about to be trained, with what cannot be done with it.

    Args:
        peft_model: with PEFT's wrappers in place.
        config: of its adapter.
    """
    bare = [name for name, layer in _layers(peft_model) if layer.get_base_layer().bias is None]
    found = set(_kinds(peft_model, config))
    sentences = kinds.limits(found - {"lora_bias"} if bare else found)
    if config.lora_bias and bare:
        title = kinds.KINDS["lora_bias"].title
        sentences.append(f"{title}: cannot be merged, since layers such as {bare[0]} have no bias to add it to")
    begun = config.init_lora_weights
    if isinstance(begun, str) and begun.lower().startswith(RESIDUAL):
        sentences.append(
            f"init_lora_weights {begun!r}: the adapter belongs to what it leaves of the base weights and can neither "
            "be merged nor converted; save it with PEFT's path_initial_model_for_weight_conversion for that"
        )
    if config.bias == "all" and any(experts.spec.has_bias for _, experts in iter_routed_experts(peft_model)):
        sentences.append("bias 'all': the biases of the routed experts stay frozen")
    dropout = getattr(config, "adapter_dropout", None) or config.lora_dropout
    if dropout and (without := _without_dropout(peft_model)):
        more = f" and {len(without) - 1} more" if len(without) > 1 else ""
        sentences.append(f"lora_dropout {dropout:g}: without effect on LoRA of {without[0]}{more}, used as W + delta")
    return sentences


def check_merge(model: nn.Module, source: Path) -> None:
    """Whether a saved adapter can be merged into a model that is in memory.

    Args:
        model: meta device is enough.
        source: directory or GGUF file.
    Raises:
        FormatError: a bias that the model has not.
    """
    if source.is_dir() and read_adapter_config(source).lora_bias:
        kinds.check_merge(open_adapter(source, describe(model), reads_headers_only=True))


def _without_dropout(peft_model: nn.Module) -> list[str]:
    """Modules outside the experts whose LoRA is added to the weight rather than to the output."""
    experts = {id(experts) for _, experts in iter_routed_experts(peft_model)}
    added = ((n, m) for n, m in peft_model.named_modules() if isinstance(m, ParamWrapper | RouterLinear))
    return list(dict.fromkeys(plain_name(n) for n, m in added if id(m.get_base_layer()) not in experts))


def lost_biases(model: nn.Module, config: LoraConfig) -> list[str]:
    """Layers whose bias `bias: lora_only` would train and PEFT would not save: it looks for it outside its wrapper."""
    if config.bias != "lora_only":
        return []
    named = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and m.bias is not None)
    return [name for name, _ in named if config.target_modules and check_target_module_exists(config, name)]


def _layers(peft_model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """LoRA on Linear layers."""
    for name, module in peft_model.named_modules():
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), nn.Linear):
            yield plain_name(name), module


def _kinds(peft_model: nn.Module, config: LoraConfig) -> Iterator[str]:
    base = describe(peft_model)
    for name, module in peft_model.named_modules():
        name = plain_name(name)
        if isinstance(module, ModulesToSaveWrapper):
            yield "saved"
        elif isinstance(module, TrainableTokensWrapper):
            yield "tokens"
        elif isinstance(module, Embedding):
            yield "embedding"
        elif isinstance(module, LoraLayer):
            is_router = name in base.routers or (isinstance(module, ParamWrapper) and f"{name}.weight" in base.bare)
            yield "router" if is_router else "tied_head" if f"{name}.weight" in base.tied else "linear"
    for kind, is_there in (("dora", config.use_dora), ("lora_bias", config.lora_bias), ("bias", config.bias != "none")):
        if is_there:
            yield kind
