"""PEFT's LoRA options under the names of the keys that a user of LLaMA-Factory writes."""

from __future__ import annotations

import re
from typing import Any

from kt_sft.adapters import options
from kt_sft.errors import under_name

_KEY_OF_OPTION = {
    "target_modules": "lora_target",
    "LoRA target": "lora_target",
    "modules_to_save": "additional_target",
    "init_lora_weights": "pissa_init",  # the only other way to begin that LLaMA-Factory has
    "r": "lora_rank",
}


def faults(*, rank: Any, use_dora: Any, pissa_init: Any, on_experts: bool) -> list[str]:
    """What a run cannot have, by its keys.

    Args:
        on_experts: whether it trains LoRA on the routed experts, as far as that is known before the model is.
    """
    values = {"use_dora": use_dora, "init_lora_weights": "pissa" if pissa_init else True}
    if type(rank) is int and rank >= 1:
        values["r"] = rank
    there = {options.EXPERTS: "the routed experts"} if on_experts else {}
    return [under_key(fault) for fault in options.faults(options.RUN, values, there)]


def key_of(option: str) -> str:
    """The key that sets an option of PEFT's."""
    return _KEY_OF_OPTION.get(option, option)


def under_key(fault: str) -> str:
    """A fault of PEFT's option as one of the key; LLaMA-Factory has none for target_parameters and exclude_modules."""
    option, colon, rest = under_name(fault, _KEY_OF_OPTION).partition(":")
    rest = rest.replace("name its parameter in target_parameters, or leave it out", "leave it out")
    rest = re.sub(r", or set exclude_modules: '[^']*'", "", rest)
    rest = rest.replace("pass it alone, as a string", "name the layers")
    rest = re.sub(r"\bexpert_lora=False\b", "kt_expert_lora: false", rest)
    return f"{option}{colon}{rest}"
