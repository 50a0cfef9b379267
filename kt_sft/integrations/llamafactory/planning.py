"""What `kt-sft plan` shows: a run's placements and memory, from its YAML file and the model's config alone."""

from __future__ import annotations

import dataclasses
import importlib
import logging
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import PretrainedConfig

from kt_sft import memory
from kt_sft.adapters import fused
from kt_sft.adapters.folder import local_adapter
from kt_sft.adapters.forms import open_adapter
from kt_sft.compat.peft import check_target_module_exists
from kt_sft.config import KTConfig
from kt_sft.errors import ConfigError
from kt_sft.integrations.llamafactory import args, peer_keys, value_types
from kt_sft.integrations.llamafactory.run_file import read_run_file
from kt_sft.integrations.peft.targets import expert_targets, prepare_lora_config
from kt_sft.integrations.transformers.base_model import describe
from kt_sft.integrations.transformers.linears import plain_linears
from kt_sft.integrations.transformers.opened import OpenedModel
from kt_sft.integrations.transformers.placing import check_dtype, plan_model
from kt_sft.integrations.transformers.swapping import swap_experts
from kt_sft.models.expert_keys import PROJECTIONS
from kt_sft.models.layout import ExpertsSpec, Formats
from kt_sft.placement.budget import DeviceMemory, Run, memory_by_device
from kt_sft.placement.plan import LINEAR, MODULE, Plan, groups
from kt_sft.placement.rules import DEVICE_TYPES

logger = logging.getLogger(__name__)

_HALF = ("bf16", "fp16", "pure_bf16")
# LLaMA-Factory's and the trainer's own defaults.
_BATCH, _LENGTH, _RANK, _TARGET = 8, 2048, 8, "all"
_DEFAULTS = {
    "use_kt": False,
    "finetuning_type": "lora",
    "stage": "sft",
    "infer_backend": "huggingface",
    "lora_rank": _RANK,
}


@dataclass
class _Numbers:
    """Keys of LLaMA-Factory that a plan computes with."""

    per_device_train_batch_size: int = _BATCH
    cutoff_len: int = _LENGTH
    lora_rank: int = _RANK


@dataclass(frozen=True)
class RunPlan:
    """A resolved run.

    Args:
        rules: path of the rule file, if there is one.
    """

    model: str
    rules: str | None
    plan: Plan
    run: Run
    memory: dict[str, DeviceMemory]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        return {
            "model": self.model,
            "rules": self.rules,
            "tokens": self.run.tokens,
            "trains": self.run.trains,
            "groups": [asdict(group) for group in groups(self.plan)],
            "device_map": self.plan.device_map(),
            "methods": self.plan.methods,
            "packed_linears": self.plan.packed_linears,
            "memory": {
                device: {**asdict(held), "total_bytes": held.total_bytes} for device, held in self.memory.items()
            },
        }


def plan_run(file: str | Path, overrides: Iterable[str] = (), *, device: str | None = None) -> RunPlan:
    """Resolve a run; reads no weights and needs no GPU.

    Args:
        file: configuration of LLaMA-Factory, YAML or JSON.
        overrides: `key=value`, as `llamafactory-cli` takes them.
        device: of modules about which no rule says anything; None: `cpu` with `use_cpu: true`, else `cuda:0`.
    Raises:
        FormatError: no such file, no YAML, no model, or no such adapter.
        ConfigError: unknown keys, wrong values, or rules that cannot be followed.
        UnsupportedModel: no routed experts, or experts that the kernels cannot compute.
    """
    values = read_run(file, overrides)
    config, path = args.kt_config(SimpleNamespace(**values)), values["model_name_or_path"]
    hub = {"cache_dir": values.get("cache_dir"), "revision": values.get("model_revision", "main")}
    opened = OpenedModel(path, config, trust_remote_code=values.get("trust_remote_code"), **hub)
    opened.check_config()
    model, specs = opened.model, opened.specs
    default = device or ("cpu" if values.get("use_cpu") else "cuda:0")
    plan = plan_model(model, config, _device(default))
    check_dtype(plan, model)  # LLaMA-Factory loads a model as it is stored
    formats = _formats(opened, plan)
    packed_bytes = memory.packed_bytes(specs, formats, config.int4_group_size)
    swap_experts(model, specs, config, formats)
    element_bytes = _element_bytes(values, opened.config)
    if element_bytes == 2 and plan.devices == ("cpu",):
        plan = _with_cpu_linears(plan, model, config)
    run = _run(values, config, model, specs, element_bytes)
    if run.trains and values.get("ref_model"):
        logger.warning("ref_model: its memory is not counted; plan it as a model of its own, without do_train")
    return RunPlan(path, config.optimize_rule, plan, run, memory_by_device(model, plan, specs, packed_bytes, run))


def read_run(file: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Keys and values of a run's configuration, checked as LLaMA-Factory's parser and our hook check them.

    Raises:
        FormatError, ConfigError: see `plan_run`.
    """
    values, notes = peer_keys.translate(read_run_file(file, overrides))
    for note in notes:
        logger.warning("%s", note)
    kinds = _kinds()
    values, faults = value_types.read(values, kinds or (_Numbers,))
    if "use_kt" not in values:
        logger.warning("no use_kt: true: stock LLaMA-Factory would run; planned as if it were there")
    elif not args.is_set(values, "use_kt"):
        faults.append("use_kt: expected true, found false: stock LLaMA-Factory runs, which is not planned here")
    if not isinstance(values.get("model_name_or_path"), str):
        faults.append(f"{file}: model_name_or_path: expected a model, found {values.get('model_name_or_path')!r}")
    faults += args.deepspeed_faults(values.get("deepspeed"))
    for check in (partial(_check_keys, kinds), _check_values):
        try:
            check(values)
        except ConfigError as error:
            faults += error.faults
    if faults:
        raise ConfigError(faults)
    return values


def _kinds() -> tuple[type, ...] | None:
    """LLaMA-Factory's dataclasses, with our keys; None where it is not installed."""
    try:
        parser = importlib.import_module("llamafactory.hparams.parser")
    except ImportError:
        return None
    return (args.model_arguments(parser.ModelArguments), *parser._TRAIN_ARGS, *parser._EVAL_ARGS)


def _check_keys(kinds: tuple[type, ...] | None, values: dict[str, Any]) -> None:
    """Unknown keys are faults; without LLaMA-Factory only ours are known."""
    if kinds is not None:
        args.check_known(values, kinds, ())
        return
    known = [key for key in (*args.KEYS, *args.REFUSED) if key.startswith("kt_")]
    if unknown := [key for key in values if key.startswith("kt_") and key not in known]:
        raise ConfigError([f"{key}: unknown key; {args.nearest_key(key, known)}" for key in unknown])


def _check_values(values: dict[str, Any]) -> None:
    """What `args.check` refuses, with LLaMA-Factory's defaults for keys that are not set."""
    lists = {"lora_target": _targets(values), "adapter_name_or_path": args.adapter_paths(values)}
    args.check(SimpleNamespace(**{**_DEFAULTS, **values, **lists}))


def _targets(values: dict[str, Any]) -> list[str]:
    target = values.get("lora_target") or _TARGET
    return [str(name).strip() for name in (target if isinstance(target, list) else str(target).split(","))]


def _device(text: str) -> torch.device:
    with suppress(RuntimeError):
        device = torch.device(text)
        if device.type in DEVICE_TYPES:
            return device
    raise ConfigError(f"device: expected cpu, cuda or cuda:1, found {text!r}")


def _formats(opened: OpenedModel, plan: Plan) -> dict[str, Formats]:
    """Formats by module; of GGUF files they are in the header."""
    methods = plan.methods
    if "GGUF" not in methods.values():
        return {name: method.lower() for name, method in methods.items()}
    if opened.gguf is None and opened.given.weight_path is None:
        raise ConfigError("method GGUF: expected kt_weight_path, the GGUF file with the experts, found nothing; set it")
    return opened.formats_of(methods)


def _with_cpu_linears(plan: Plan, model: nn.Module, config: KTConfig) -> Plan:
    """The plan with the layers of a model on the CPU that `kt_cpu_linear` packs; `auto` keeps bf16, or has no effect.

    Args:
        model: with our experts modules.
    """
    if config.cpu_linear not in ("bf16", "int8") or getattr(model.config, "dtype", None) == torch.float16:
        return plan
    names = {name for name, _ in plain_linears(model)}
    packed = [
        dataclasses.replace(placement, kind=LINEAR, method=config.cpu_linear)
        if placement.kind == MODULE and placement.name in names
        else placement
        for placement in plan.placements
    ]
    return dataclasses.replace(plan, placements=tuple(packed))


def _run(
    values: dict[str, Any], config: KTConfig, model: nn.Module, specs: dict[str, ExpertsSpec], element_bytes: int
) -> Run:
    """What the keys say about memory.

    Args:
        model: with our experts modules.
    """
    trains, adapters = bool(values.get("do_train")), args.adapter_paths(values)
    if adapters and not (trains and values.get("create_new_adapter")):
        lora, rank = _lora_of(adapters[-1], values, model)
    else:
        lora, rank = _new_lora(values, config, model, specs) if trains else ({}, 0)
    text_config = model.config.get_text_config()
    per_token = getattr(text_config, "num_experts_per_tok", None) or getattr(text_config, "moe_topk", None) or 1
    length = values.get("cutoff_len", _LENGTH)
    return Run(
        tokens=length * (values.get("per_device_train_batch_size", _BATCH) if trains else 1),
        element_bytes=element_bytes,
        trains=trains,
        checkpoints=not values.get("disable_gradient_checkpointing"),
        retains=config.cpu_activation == "retain",
        experts_per_token=per_token if isinstance(per_token, int) else max(per_token),
        lora=lora,
        rank=rank,
        vocabulary=text_config.vocab_size,
    )


def _new_lora(
    values: dict[str, Any], config: KTConfig, model: nn.Module, specs: dict[str, ExpertsSpec]
) -> tuple[dict[str, int], int]:
    """Elements of the LoRA factors of each module that the keys ask for, and the rank on experts (0: none).

    Raises:
        ConfigError: the keys ask for no module of the model.
    """
    rank, names = values.get("lora_rank", _RANK), _targets(values)
    wanted = LoraConfig(r=rank, target_modules="all-linear" if names == ["all"] else names, task_type="CAUSAL_LM")
    prepared = prepare_lora_config(model, wanted, args.expert_lora(config, names))
    elements = {
        name: rank * (module.in_features + module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and check_target_module_exists(prepared, name)
    }
    on_experts = expert_targets(prepared, specs)
    for parameter in on_experts:
        name, _, projection = parameter.rpartition(".")
        elements[name] = elements.get(name, 0) + _expert_factors(specs[name], projection, rank)
    if not elements:
        raise ConfigError(f"lora_target: expected modules of the model, found none of the name {', '.join(names)}")
    return elements, rank if on_experts else 0


def _lora_of(path: str, values: dict[str, Any], model: nn.Module) -> tuple[dict[str, int], int]:
    """The same of a saved adapter, which says its ranks and targets itself; reads headers only.

    Raises:
        FormatError, UnsupportedModel: no such adapter, a damaged one, or that of another model.
    """
    hub = {"cache_dir": values.get("cache_dir")}
    base = describe(model)
    folder = local_adapter(path, subfolder=values.get("adapter_folder"), **hub)
    adapter = open_adapter(folder, base, reads_headers_only=True)
    elements = {name: adapter.ranks[name] * sum(base.linears[name]) for name in adapter.linears}
    highest = 0
    for name in adapter.experts:
        gate, up, down = (adapter.ranks.get(f"{name}.{projection}", 0) for projection in PROJECTIONS)
        # PEFT's fused form has one factor a for both; with one for each, both go into one of the sum of their ranks.
        both = max(gate, up) if adapter.form in fused.RELEASES else gate + up
        spec, highest = base.specs[name], max(highest, both, down)
        elements[name] = _expert_factors(spec, "gate_up_proj", both) + _expert_factors(spec, "down_proj", down)
    return elements, highest


def _expert_factors(spec: ExpertsSpec, projection: str, rank: int) -> int:
    """Elements of both factors of all experts of a layer."""
    outputs = 2 * spec.inter if projection == "gate_up_proj" else spec.inter
    return rank * spec.num_experts * (outputs + spec.hidden)


def _element_bytes(values: dict[str, Any], model_config: PretrainedConfig) -> int:
    """Of the dtype that LLaMA-Factory loads the model in: as it is stored; if its config says nothing, as asked."""
    stored = str(getattr(model_config, "dtype", None)).removeprefix("torch.")
    is_half = any(values.get(key) for key in _HALF) or values.get("infer_dtype") in ("float16", "bfloat16")
    return 2 if stored in ("float16", "bfloat16") or (stored != "float32" and is_half) else 4
