"""Applying a plan: what the loader and the experts get from it, and whether this machine has its devices."""

from __future__ import annotations

import dataclasses
import logging

import torch

from kt_sft.config import KTConfig
from kt_sft.errors import ConfigError
from kt_sft.formats.packed import is_container
from kt_sft.placement.plan import Plan

logger = logging.getLogger(__name__)


def device_map(plan: Plan) -> dict[str, torch.device]:
    """For `from_pretrained`: accelerate's hooks then carry hidden states from device to device.

    Devices, not their names: accelerate takes the word `cpu` for weights that wait there and are computed elsewhere.
    """
    return {name: torch.device(device) for name, device in plan.device_map().items()}


def expert_settings(config: KTConfig, plan: Plan) -> tuple[KTConfig, dict[str, str]]:
    """Settings with the plan's method; where it has several, the method of each experts module, too.

    Raises:
        ConfigError: settings that one of the methods cannot follow.
    """
    methods = plan.methods
    kinds = sorted(set(methods.values()))
    checked = [dataclasses.replace(config, method=kind) for kind in kinds]
    if len(kinds) == 1:
        return checked[0], {}
    if config.weight_path is not None and is_container(config.weight_path):
        raise ConfigError(
            f"optimize_rule: experts of several methods ({', '.join(kinds)}) cannot be read from the container "
            f"{config.weight_path}, which holds one; remove weight_path, or give all layers one method"
        )
    if config.weight_cache is not None:
        logger.warning("weight_cache: no effect with experts of several methods (%s)", ", ".join(kinds))
        config = dataclasses.replace(config, weight_cache=None)
    return config, methods


def check_devices(plan: Plan, *, local_rank: int = 0, num_processes: int = 1) -> None:
    """Raise unless this machine has the plan's devices, and this process may use them.

    Raises:
        ConfigError: lists every device that is missing, or that another process drives.
    """
    faults = []
    for device in plan.devices:
        kind, _, number = device.partition(":")
        if kind == "cpu":
            continue
        example = next(p for p in plan.placements if p.device == device)
        who = f"{device} (for {example.name})"
        count = device_count(kind)
        if int(number) >= count:
            faults.append(f"{who}: this machine has {count} {kind} devices; set the variables of the rule file")
        elif num_processes > 1 and int(number) != local_rank:
            remedy = f"write {kind} without a number, or start one process"
            faults.append(f"{who}: each of {num_processes} processes has one {kind} device of its own; {remedy}")
    if faults:
        raise ConfigError([f"optimize_rule: {fault}" for fault in faults])


def device_count(kind: str) -> int:
    """Devices of a kind that torch can use here."""
    backend = getattr(torch, kind, None)
    return backend.device_count() if backend is not None and backend.is_available() else 0
