"""Loading through transformers with the routed experts kept out of it."""

from __future__ import annotations

import copy
import dataclasses
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kt_sft.config import KTConfig
from kt_sft.errors import ConfigError
from kt_sft.formats.safetensors_index import SafetensorsIndex
from kt_sft.integrations.gguf.model import is_gguf_model, model_directory
from kt_sft.integrations.transformers.auto_class import HUB_ARGS, auto_class, has_native_class
from kt_sft.integrations.transformers.memory_check import bytes_outside_experts, check_memory, uses_main_memory
from kt_sft.integrations.transformers.model_files import (
    check_config_file,
    find_config_file,
    load_config,
)
from kt_sft.integrations.transformers.placing import given_dtype, meta_model, plan_checkpoint, plan_here, read_config
from kt_sft.integrations.transformers.quantizer import KTExpertsConfig
from kt_sft.integrations.transformers.swapping import swap_experts
from kt_sft.models.spec import find_experts
from kt_sft.nn.routed_experts import WeightFormats
from kt_sft.placement.inject import device_map, expert_settings
from kt_sft.placement.plan import Plan
from kt_sft.runtime import prepare_native
from kt_sft.sources.opening import (
    open_experts,
    open_weight_path,
    weight_formats,
)

_REFUSED_ARGS = {
    "quantization_config": "kt_sft passes its own; describe the experts with KTConfig",
    "gguf_file": "pass the path of the GGUF file as the model",
    "state_dict": "experts are read from files; save the state dict as a safetensors checkpoint",
    "tp_plan": "tensor parallelism is not supported",
    "tp_size": "tensor parallelism is not supported",
    "device_mesh": "tensor parallelism is not supported",
    "distributed_config": "expert parallelism is not supported",
}


def load_model(
    path: str | os.PathLike[str], config: KTConfig | None = None, **from_pretrained_kwargs: Any
) -> PreTrainedModel:
    """Load a mixture-of-experts model whose routed experts run in our CPU kernels.

    Args:
        path: model directory, hub id as `from_pretrained` takes it, or GGUF file (see `gguf_model`).
        config: settings of the experts; defaults when left out.
        from_pretrained_kwargs: passed to the auto class's `from_pretrained`.
    Raises:
        ConfigError: arguments that cannot be combined with this loader.
        FormatError: directory, shard or tensor missing, damaged or of a wrong shape.
        UnsupportedModel: no routed experts, or experts that the kernels cannot compute.
        UnsupportedHardware: the CPU lacks AVX2.
        NotEnoughMemory: the experts do not fit.
    """
    config = KTConfig() if config is None else config
    faults = [f"{name}: {why}" for name, why in _REFUSED_ARGS.items() if from_pretrained_kwargs.get(name) is not None]
    if not isinstance(config, KTConfig):
        faults.append(f"config: expected a KTConfig, found {type(config).__name__}")
    elif config.optimize_rule is not None and from_pretrained_kwargs.get("device_map") is not None:
        faults.append("device_map: optimize_rule says where modules go; leave one of them out")
    if faults:
        raise ConfigError(faults)
    if is_gguf_model(path):
        path, config = from_gguf(path, config)
    plan = plan_checkpoint(path, config, **from_pretrained_kwargs)
    hub_kwargs = {k: v for k, v in from_pretrained_kwargs.items() if k in HUB_ARGS}
    hook = quantization_config(config, path, plan=plan, **hub_kwargs)
    if not Path(path).is_dir():
        check_model(path, config, **from_pretrained_kwargs)
    else:  # transformers says what it cannot build by whatever Python raises
        model_config = copy.deepcopy(read_config(path, from_pretrained_kwargs))
        meta_model(model_config, from_pretrained_kwargs.get("trust_remote_code"))
    leaves_code = from_pretrained_kwargs.get("trust_remote_code") and has_native_class(path, **hub_kwargs)
    if hook.replaces_quantization or leaves_code:
        from_pretrained_kwargs = load_config(path, from_pretrained_kwargs)
    kind = auto_class(read_config(path, from_pretrained_kwargs))
    if plan is not None and plan.devices != ("cpu",):
        from_pretrained_kwargs["device_map"] = device_map(plan)
    return kind.from_pretrained(path, quantization_config=hook, **from_pretrained_kwargs)


def from_gguf(path: str | os.PathLike[str], config: KTConfig) -> tuple[Path, KTConfig]:
    """The model directory that stands for a GGUF file, and settings that take the experts from the file.

    Raises:
        FormatError, UnsupportedModel: see `gguf_model.model_directory`.
    """
    prepare_native(config)
    directory = model_directory(path, config.weight_cache)
    return directory, config if config.weight_path else dataclasses.replace(config, weight_path=str(path))


def quantization_config(
    config: KTConfig, path: str | os.PathLike[str], *, plan: Plan | None = None, **hub_kwargs: Any
) -> KTExpertsConfig:
    """What to pass as `quantization_config=` to `from_pretrained(path, ...)`; checks everything that is cheap to check.

    Where `replaces_quantization` is set, the model's config must have gone through `drop_quantization` first.

    Args:
        plan: of the settings' rules, if they name any; its devices must be passed as `device_map`.
        hub_kwargs: cache_dir, revision, token, ... as `from_pretrained` will get them.
    Raises:
        FormatError, UnsupportedHardware: see `load_model`.
    """
    prepare_native(config)
    quantization = check_config_file(find_config_file(path, hub_kwargs))
    if Path(path).is_dir() and not hub_kwargs.get("subfolder"):
        SafetensorsIndex.from_directory(path, needs_metadata=True).close()
    if config.weight_path is not None:
        open_weight_path(config.weight_path).close()
    if plan is None:
        return KTExpertsConfig(config, quantization is not None)
    config, methods = expert_settings(config, plan)
    return KTExpertsConfig(config, quantization is not None, methods, plan.packed_linears)


def check_model(path: str | os.PathLike[str], config: KTConfig, **from_pretrained_kwargs: Any) -> PreTrainedModel:
    """Refuse, before any long work, what `load_model` would refuse; reads no weights and downloads none.

    Returns:
        The model without weights (meta device) and with our experts modules, for further checks.

    Raises:
        As `load_model`; of a model on the hub only tensors at `weight_path` are looked at.
    """
    hub_kwargs = {name: value for name, value in from_pretrained_kwargs.items() if name in HUB_ARGS}
    quantization_config(config, path, **hub_kwargs)
    model_config = read_config(path, from_pretrained_kwargs)
    model = meta_model(model_config, from_pretrained_kwargs.get("trust_remote_code"))
    specs = find_experts(model)
    placed, methods = from_pretrained_kwargs.get("device_map"), {}
    if (plan := plan_here(model, config, placed, given_dtype(from_pretrained_kwargs))) is not None:
        config, methods = expert_settings(config, plan)
        placed = plan.device_map()
    on_cpu = uses_main_memory(placed)
    own_files = None  # of a model on the hub
    if Path(path).is_dir() and not hub_kwargs.get("subfolder"):
        with SafetensorsIndex.from_directory(path) as own:
            own_files = sorted({str(own.info(name).file) for name in own})
    formats: dict[str, WeightFormats] = {name: methods.get(name, config.method).lower() for name in specs}
    if own_files is not None or config.weight_path is not None:
        source = open_experts(model, specs, own_files, config, methods)
        formats = weight_formats(source, config, methods)
        source.close()
    elif "gguf" in formats.values():
        raise ConfigError(
            f"method GGUF: expected weight_path, the GGUF file with the experts of {path}, found nothing; set it, or "
            "use BF16, INT8 or INT4"
        )
    check_memory(specs, bytes_outside_experts(model, specs) if on_cpu else 0, config, formats)
    swap_experts(model, specs, config, formats)
    return model
