"""Loading through transformers with the routed experts kept out of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kt_sft.config import KTConfig
from kt_sft.errors import ConfigError
from kt_sft.formats.gguf import GgufIndex
from kt_sft.integrations.transformers.model_files import load_config
from kt_sft.integrations.transformers.opened import OpenedModel, open_model
from kt_sft.integrations.transformers.quantizer import KTExpertsConfig
from kt_sft.integrations.transformers.swapping import swap_experts
from kt_sft.models.auto_class import auto_class, has_native_class
from kt_sft.placement.inject import device_map

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
        path: model directory, hub id as `from_pretrained` takes it, or GGUF file (see `gguf.model`).
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
    opened = open_model(path, config, **from_pretrained_kwargs)
    path = opened.path
    if not Path(path).is_dir():
        opened.check_memory()  # before its weights are downloaded
    trusts = from_pretrained_kwargs.get("trust_remote_code")
    leaves_code = trusts and has_native_class(path, **opened.hub_kwargs)
    if opened.quantization is not None or leaves_code:
        from_pretrained_kwargs = load_config(path, from_pretrained_kwargs)
    if opened.plan is not None and opened.plan.devices != ("cpu",):
        from_pretrained_kwargs["device_map"] = device_map(opened.plan)
    hook = KTExpertsConfig(opened)
    return auto_class(opened.config).from_pretrained(path, quantization_config=hook, **from_pretrained_kwargs)


def check_model(
    path: str | os.PathLike[str], config: KTConfig, *, gguf: GgufIndex | None = None, **from_pretrained_kwargs: Any
) -> OpenedModel:
    """Refuse, before any long work, what `load_model` would refuse; reads no weights and downloads none.

    Args:
        gguf: see `open_model`.
    Returns:
        What was opened, which `KTExpertsConfig` takes for loading; its `model` has our experts modules, for further
        checks.

    Raises:
        As `load_model`; of a model on the hub only tensors at `weight_path` are looked at.
    """
    opened = open_model(path, config, gguf=gguf, **from_pretrained_kwargs)
    opened.check_memory()
    swap_experts(opened.model, opened.specs, opened.settings, opened.formats)
    return opened
