"""The plan of a model that is about to be loaded, from its config alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kt_sft import env
from kt_sft.config import KTConfig
from kt_sft.errors import ConfigError
from kt_sft.models.layout import ExpertsSpec
from kt_sft.placement.inject import check_devices
from kt_sft.placement.plan import Plan
from kt_sft.placement.resolve import NO_RULES, resolve
from kt_sft.placement.rules import load_rules, parse_variables


def plan_model(model: PreTrainedModel, config: KTConfig, default_device: object = "cpu") -> Plan:
    """Where everything of a model goes by the settings' rules, on whatever machine.

    Args:
        model: as transformers builds it, meta device is enough.
        default_device: of modules about which no rule says anything.
    Raises:
        ConfigError, FormatError: see `load_rules` and `resolve`.
    """
    rules = NO_RULES
    if config.optimize_rule is not None:
        rules = load_rules(config.optimize_rule, parse_variables(config.rule_vars), local_rank=env.local_rank())
    device = torch.device(default_device)
    name = "cpu" if device.type == "cpu" else f"{device.type}:{device.index or 0}"
    return resolve(model, rules, default_device=name, method=config.method)


def check_dtype(plan: Plan, model: PreTrainedModel, dtype: Any = None) -> None:
    """Raise unless the layers that rules have packed are loaded in bf16, which they are packed from.

    Args:
        dtype: as `from_pretrained` gets it; None: that of the config, if it names one.
    Raises:
        ConfigError: names one of the layers.
    """
    dtype = getattr(model.config, "dtype", None) if dtype in (None, "auto") else dtype
    name = str(dtype).removeprefix("torch.")
    if plan.packed_linears and name not in ("None", "bfloat16"):
        raise ConfigError(
            f"optimize_rule: PackedLinear: expected a model in bfloat16, found {next(iter(plan.packed_linears))} in "
            f"{name}; load in bf16, or use class default"
        )


def plan_here(model: PreTrainedModel, config: KTConfig, device_map: Any = None, dtype: Any = None) -> Plan | None:
    """`plan_model` for this machine; None without rules.

    Args:
        device_map: of the loader without rules: one device for everything.
        dtype: as `from_pretrained` gets it.
    Raises:
        ConfigError: also devices that this machine or process lacks, and packed linear layers in another dtype.
    """
    if config.optimize_rule is None:
        return None
    plan = plan_model(model, config, device_map[""] if isinstance(device_map, dict) else device_map or "cpu")
    check_dtype(plan, model, dtype)
    check_devices(plan, local_rank=env.local_rank(), num_processes=env.local_world_size())
    return plan


def given_dtype(from_pretrained_kwargs: dict[str, Any]) -> Any:
    """The dtype among `from_pretrained`'s arguments, under its new name or the old one."""
    return from_pretrained_kwargs.get("dtype", from_pretrained_kwargs.get("torch_dtype"))


def bytes_in_main_memory(
    model: nn.Module, specs: Mapping[str, ExpertsSpec], device_map: dict[str, Any] | str | None
) -> int:
    """Bytes of parameters and buffers outside the experts; none where the device map puts all on other devices."""
    places = device_map.values() if isinstance(device_map, dict) else ["cpu" if device_map is None else device_map]
    if "cpu" not in map(str, places):
        return 0
    outside = (
        t for name, t in [*model.named_parameters(), *model.named_buffers()] if name.rpartition(".")[0] not in specs
    )
    return sum(tensor.numel() * tensor.element_size() for tensor in outside)
