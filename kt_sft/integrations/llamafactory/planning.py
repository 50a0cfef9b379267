"""What `kt-sft plan` shows: a run's placements and memory, from its YAML file and the model's config alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PretrainedConfig

from kt_sft.config import KTConfig
from kt_sft.errors import ConfigError, FormatError, UnsupportedModel
from kt_sft.formats.gguf import GgufIndex
from kt_sft.integrations.expert_sources import open_experts, weight_formats
from kt_sft.integrations.gguf_model import is_gguf_model
from kt_sft.integrations.gguf_model import read_config as read_gguf_config
from kt_sft.integrations.llamafactory import args
from kt_sft.integrations.model_files import find_config_file
from kt_sft.integrations.peft.targets import expert_targets, prepare_lora_config
from kt_sft.integrations.placing import check_dtype, meta_model, plan_model, read_config
from kt_sft.integrations.transformers import swap_experts
from kt_sft.models.spec import ExpertsSpec, find_experts
from kt_sft.native import native
from kt_sft.nn.routed_experts import WeightFormats
from kt_sft.placement.budget import DeviceMemory, Run, memory_by_device
from kt_sft.placement.plan import Plan, groups

_HALF = ("bf16", "fp16", "pure_bf16")
# LLaMA-Factory's and the trainer's own defaults.
_BATCH, _LENGTH, _RANK, _TARGET = 8, 2048, 8, "all"


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
        FormatError: no such file, no YAML, or no model.
        ConfigError: wrong keys, or rules that cannot be followed.
        UnsupportedModel: no routed experts, or experts that the kernels cannot compute.
    """
    values = read_run(file, overrides)
    config, path = args.kt_config(SimpleNamespace(**values)), values["model_name_or_path"]
    if is_gguf_model(path) and config.weight_path is None:
        config = KTConfig.from_dict({**config.to_dict(), "weight_path": path})
    model_config = _model_config(path, values)
    model = meta_model(model_config, values.get("trust_remote_code"))
    default = device or ("cpu" if values.get("use_cpu") else "cuda:0")
    plan, specs = plan_model(model, config, _device(default)), find_experts(model)
    check_dtype(plan, model)  # LLaMA-Factory loads a model as it is stored
    formats = _formats(model, specs, plan, config)
    packed_bytes = {
        name: native().MoeLayer.packed_bytes_for(
            *(spec.num_experts, spec.hidden, spec.inter), formats[name], config.int4_group_size
        )
        for name, spec in specs.items()
    }
    swapped = meta_model(model_config, values.get("trust_remote_code"))
    swap_experts(swapped, specs, config, formats)
    run = _run(values, config, plan, swapped, specs)
    return RunPlan(path, config.optimize_rule, plan, run, memory_by_device(model, plan, specs, packed_bytes, run))


def read_run(file: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Keys and values of a run's configuration.

    Raises:
        FormatError, ConfigError: see `plan_run`.
    """
    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(file, "run configuration", expected="a file", found=error.strerror) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FormatError(file, "run configuration", expected="YAML", found=" ".join(str(error).split())) from None
    if not isinstance(values, dict):
        found = type(values).__name__
        raise FormatError(file, "run configuration", expected="a mapping of keys to values", found=found)
    faults = []
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign:
            faults.append(f"{override}: expected key=value")
        elif key.startswith("kt_rule_vars."):
            given = values.get("kt_rule_vars")
            values["kt_rule_vars"] = {**(given if isinstance(given, dict) else {}), key.partition(".")[2]: value}
        else:
            values[key] = yaml.safe_load(value) if not key.startswith("kt_rule") else value
    if not isinstance(values.get("model_name_or_path"), str):
        faults.append(f"{file}: model_name_or_path: expected a model, found {values.get('model_name_or_path')!r}")
    for key in ("per_device_train_batch_size", "cutoff_len", "lora_rank"):
        if not isinstance(values.get(key, 1), int) or values.get(key, 1) < 1:
            faults.append(f"{key}: expected a whole number >= 1, found {values[key]!r}")
    if faults:
        raise ConfigError(faults)
    return values


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError:
        raise ConfigError(f"device: expected cpu, cuda or cuda:1, found {text!r}") from None


def _model_config(path: str, values: dict[str, Any]) -> PretrainedConfig:
    if is_gguf_model(path):
        with GgufIndex.from_path(path) as index:
            return read_gguf_config(index)
    hub_kwargs = {"cache_dir": values.get("cache_dir"), "revision": values.get("model_revision", "main")}
    file = find_config_file(path, hub_kwargs)
    try:
        return read_config(path, {**hub_kwargs, "trust_remote_code": values.get("trust_remote_code")})
    except (ValueError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise UnsupportedModel(f"{file}", expected="the config of a known model", found=first) from None


def _formats(model: nn.Module, specs: dict[str, ExpertsSpec], plan: Plan, config: KTConfig) -> dict[str, WeightFormats]:
    """Formats by module; of GGUF files they are in the header."""
    methods = plan.methods
    if "GGUF" not in methods.values():
        return {name: method.lower() for name, method in methods.items()}
    if config.weight_path is None:
        raise ConfigError("method GGUF: expected kt_weight_path, the GGUF file with the experts, found nothing; set it")
    source = open_experts(model, specs, None, config, methods)
    source.close()
    return weight_formats(source, config, methods)


def _run(values: dict[str, Any], config: KTConfig, plan: Plan, model: nn.Module, specs: dict[str, ExpertsSpec]) -> Run:
    """What the keys say about memory.

    Args:
        model: with our experts modules.
    """
    trains = bool(values.get("do_train"))
    has_lora = trains or bool(values.get("adapter_name_or_path"))
    lora, rank = _lora(values, config, model, specs) if has_lora else ({}, 0)
    text_config = model.config.get_text_config()
    per_token = getattr(text_config, "num_experts_per_tok", None) or getattr(text_config, "moe_topk", None) or 1
    length = values.get("cutoff_len", _LENGTH)
    return Run(
        tokens=length * (values.get("per_device_train_batch_size", _BATCH) if trains else 1),
        element_bytes=_element_bytes(values, plan, model.config),
        trains=trains,
        checkpoints=not values.get("disable_gradient_checkpointing"),
        retains=config.cpu_activation == "retain",
        experts_per_token=per_token if isinstance(per_token, int) else max(per_token),
        lora=lora,
        rank=rank,
        vocabulary=text_config.vocab_size,
    )


def _lora(
    values: dict[str, Any], config: KTConfig, model: nn.Module, specs: dict[str, ExpertsSpec]
) -> tuple[dict[str, int], int]:
    """Elements of the LoRA factors of each module, and the rank on experts (0: none)."""
    rank, target = values.get("lora_rank", _RANK), values.get("lora_target", _TARGET)
    names = [name.strip() for name in (target if isinstance(target, list) else str(target).split(","))]
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
        spec = specs[name]
        outputs = 2 * spec.inter if projection == "gate_up_proj" else spec.inter
        elements[name] = elements.get(name, 0) + rank * spec.num_experts * (outputs + spec.hidden)
    return elements, rank if on_experts else 0


def _element_bytes(values: dict[str, Any], plan: Plan, model_config: PretrainedConfig) -> int:
    """Of the dtype that LLaMA-Factory loads the model in."""
    if any(values.get(key) for key in _HALF) or values.get("infer_dtype") in ("float16", "bfloat16"):
        return 2
    stored = str(getattr(model_config, "dtype", None)).removeprefix("torch.")
    on_gpu = plan.devices != ("cpu",)
    is_half = on_gpu and stored in ("float16", "bfloat16") and values.get("infer_dtype") != "float32"
    return 2 if is_half else 4
