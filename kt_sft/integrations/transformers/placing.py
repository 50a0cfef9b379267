"""The plan of a model that is about to be loaded, from its config alone."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from kt_sft import env
from kt_sft.config import KTConfig
from kt_sft.errors import ConfigError
from kt_sft.formats.config_values import check_values
from kt_sft.integrations.transformers.auto_class import (
    HUB_ARGS,
    auto_class,
    config_file,
    errors_in_one_line,
    read_auto_config,
)
from kt_sft.integrations.transformers.model_files import check_config_file, drop_quantization, find_config_file
from kt_sft.placement.inject import check_devices
from kt_sft.placement.plan import Plan
from kt_sft.placement.resolve import NO_RULES, resolve
from kt_sft.placement.rules import load_rules, parse_variables


def read_config(path: str | os.PathLike[str], from_pretrained_kwargs: dict[str, Any]) -> PretrainedConfig:
    """The model's config: the one that the caller passes, or that of the files.

    Raises:
        UnsupportedModel: a model that transformers does not know, or whose own code does not run.
    """
    given = from_pretrained_kwargs.get("config")
    if isinstance(given, PretrainedConfig):
        return given
    hub_kwargs = {name: value for name, value in from_pretrained_kwargs.items() if name in HUB_ARGS}
    trust = from_pretrained_kwargs.get("trust_remote_code")
    return read_auto_config(path if given is None else given, **hub_kwargs, trust_remote_code=trust)


def meta_model(model_config: PretrainedConfig, trust_remote_code: bool | None = None) -> PreTrainedModel:
    """The model of a config without weights; takes the config's own quantization off.

    Raises:
        FormatError: a value that no model has.
        UnsupportedModel: a config that no model can be built of, or whose own code does not run.
    """
    drop_quantization(model_config)
    path = model_config.name_or_path or "model"
    check_values(config_file(path), model_config.to_dict(), has_defaults=True)
    with torch.device("meta"), errors_in_one_line(path, trust_remote_code=trust_remote_code):
        return auto_class(model_config).from_config(model_config, trust_remote_code=trust_remote_code)


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


def plan_checkpoint(
    path: str | os.PathLike[str], config: KTConfig, *, device_map: Any = None, **from_pretrained_kwargs: Any
) -> Plan | None:
    """`plan_here` for a model in files or on the hub; None without rules."""
    if config.optimize_rule is None:
        return None
    hub_kwargs = {name: value for name, value in from_pretrained_kwargs.items() if name in HUB_ARGS}
    check_config_file(find_config_file(path, hub_kwargs))
    model = meta_model(read_config(path, from_pretrained_kwargs), from_pretrained_kwargs.get("trust_remote_code"))
    return plan_here(model, config, device_map, given_dtype(from_pretrained_kwargs))


def given_dtype(from_pretrained_kwargs: dict[str, Any]) -> Any:
    """The dtype among `from_pretrained`'s arguments, under its new name or the old one."""
    return from_pretrained_kwargs.get("dtype", from_pretrained_kwargs.get("torch_dtype"))
