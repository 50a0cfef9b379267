"""A model's modules by the names that they have without an adapter, whatever PEFT has put around them."""

from __future__ import annotations

import re

from torch import nn

# What PEFT's wrappers hold beside the module.
_OF_PEFT = re.compile(r"\.(lora_\w+|modules_to_save|token_adapter|trainable_tokens_\w+)(\.|$)")


def plain_name(name: str) -> str:
    """The name of a module or parameter in the model without PEFT's wrappers."""
    return re.sub(r"\.(base_layer|original_module)(?=\.|$)", "", name.removeprefix("base_model.model."))


def is_of_adapter(name: str) -> bool:
    """Whether a module or parameter of this name is an adapter's own."""
    return _OF_PEFT.search(name) is not None


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by name; where PEFT has wrapped one, what is inside of the wrapper."""
    return {plain_name(name): m for name, m in model.named_modules() if not is_of_adapter(name)}


def without_adapter(module: nn.Module) -> nn.Module:
    """What PEFT has wrapped; another module is itself."""
    inner = module._modules.get("base_layer", module._modules.get("original_module"))
    return module if inner is None else without_adapter(inner)
