"""What LLaMA-Factory's adapter module and loader do otherwise when the model has our experts."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from torch import nn

from kt_sft.errors import ConfigError
from kt_sft.integrations import peft as kt_peft
from kt_sft.integrations.peft.names import LORA_LAYERS, suffix_matches
from kt_sft.integrations.peft.targets import (
    ALL_LINEAR,
    expert_names,
    frozen_linears,
)
from kt_sft.integrations.peft.unwrapped import plain_modules

logger = logging.getLogger(__name__)

_KEY_OF_OPTION = {
    "target_modules": "lora_target",
    "LoRA target": "lora_target",
    "modules_to_save": "additional_target",
    "r": "lora_rank",
}


def count_parameters(model: nn.Module, stock: Callable[[nn.Module], tuple[int, int]]) -> tuple[int, int]:
    """(trainable, all) parameters of any model; ours do not show all expert weights as parameters."""
    return kt_peft.count_parameters(model) if hasattr(model, "kt_config") else stock(model)


def is_export(model_args: Any, is_trainable: bool) -> bool:
    """Whether the model is loaded to be exported."""
    return not is_trainable and getattr(model_args, "export_dir", None) is not None


@contextlib.contextmanager
def merging(model_args: Any, finetuning_args: Any, is_trainable: bool) -> Iterator[None]:
    """Within it, `init_adapter` merges adapters only where that is meant: for export, and below a new adapter.

    Its `use_kt` branch is the one that keeps an adapter apart: merging would repack every expert, and chat needs no
    merged weights.
    """
    merge = is_export(model_args, is_trainable) or (is_trainable and finetuning_args.create_new_adapter)
    if not getattr(model_args, "kt_active", False) or merge:
        yield
        return
    model_args.use_kt = True
    try:
        yield
    finally:
        model_args.use_kt = False


def all_linear(model: nn.Module, module_names: list[str]) -> list[str]:
    """What `lora_target: all` means, of the names that LLaMA-Factory found: those that PEFT can wrap wherever they
    occur. Names that only routers bear, as `gate` of DeepSeek-V2, are dropped: LoRA there would train the routing; so
    are those of indexers, which have no gradient.
    """
    modules, frozen = plain_modules(model), frozen_linears(model)
    kept, shared = [], []
    for entry in sorted(module_names):
        hits = [name for name in suffix_matches(entry, modules) if name not in frozen]
        if hits and all(isinstance(modules[name], LORA_LAYERS) for name in hits):
            kept.append(entry)
        elif hits:
            shared.append(entry)
    if shared:
        logger.warning(
            "lora_target all: left out, as modules without LoRA bear these names, too: %s; name the layers in full to "
            "train them",
            ", ".join(shared),
        )
    return kept


def lora_target(
    adapter: ModuleType,
    model: nn.Module,
    finetuning_args: Any,
    target: list[str],
    stock: Callable[[nn.Module, Any, list[str]], list[str]],
) -> list[str]:
    """The target modules for PEFT: as LLaMA-Factory's `patch_target_modules`, but nothing vanishes.

    On vision models that one exchanges each name for all module names that contain it: experts' parameters are none,
    and modules that PEFT cannot wrap are among them.

    Args:
        adapter: LLaMA-Factory's module of that name.
        target: names; `all` may stand beside others.
        stock: LLaMA-Factory's own.
    """
    others = [entry for entry in target if entry.lower() not in ALL_LINEAR]
    if len(others) < len(target):
        target = [*adapter.find_all_linear_modules(model, finetuning_args.freeze_vision_tower), *others]
    found = stock(model, finetuning_args, target)
    if found is target:
        return target  # no vision model
    modules = plain_modules(model)
    layers = [name for name, module in modules.items() if isinstance(module, LORA_LAYERS)]
    kept, dropped = [], []
    for entry in dict.fromkeys(target):
        hits = suffix_matches(entry, layers)
        left = set(hits) & set(found)
        kept += sorted(left) if hits else [entry]
        dropped += [entry] if hits and not left and entry in others else []
    if dropped:
        logger.warning("lora_target: %s: in parts that freeze_* keys keep frozen; without effect", ", ".join(dropped))
    forbidden = adapter.get_forbidden_modules(model.config, finetuning_args)
    frozen = [name for name in expert_names(model) if any(part in name for part in forbidden)]
    if frozen and hasattr(model, "kt_config"):
        logger.warning("freeze_language_model: the routed experts stay frozen, too")
        model.kt_config = dataclasses.replace(model.kt_config, expert_lora=False)
    return kept


@contextlib.contextmanager
def under_keys() -> Iterator[None]:
    """Within it, faults of PEFT's options bear the names of the keys that a user of LLaMA-Factory writes.

    Raises:
        ConfigError: as what is raised within.
    """
    try:
        yield
    except ConfigError as error:
        raise ConfigError([_under_key(fault) for fault in error.faults]) from error


def _under_key(fault: str) -> str:
    """A fault of PEFT's option as one of the key; LLaMA-Factory has none for target_parameters and exclude_modules."""
    option, colon, rest = fault.partition(":")
    rest = rest.replace("name its parameter in target_parameters, or leave it out", "leave it out")
    rest = re.sub(r", or set exclude_modules: '[^']*'", "", rest)
    rest = rest.replace("pass it alone, as a string", "name the layers")
    rest = re.sub(r"\bexpert_lora=False\b", "kt_expert_lora: false", rest)
    return f"{_KEY_OF_OPTION.get(option, option)}{colon}{rest}"
