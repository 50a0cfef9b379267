"""Loading through transformers with the routed experts kept out of it.

transformers calls an `HfQuantizer` before and after it reads weights. Ours quantises nothing: before, it checks
hardware, files and memory and puts `RoutedExperts` in place of the experts modules, so that transformers reads no
expert tensor; after, it streams the experts from the checkpoint into packed form and takes itself off the model.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import re
import types
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from kt_sft.config import KTConfig
from kt_sft.errors import ConfigError
from kt_sft.formats.safetensors_index import SafetensorsIndex
from kt_sft.integrations.auto_class import HUB_ARGS, auto_class, has_native_class
from kt_sft.integrations.expert_sources import (
    ExpertSource,
    check_biases,
    open_experts,
    open_weight_path,
    stream_experts,
    weight_formats,
)
from kt_sft.integrations.gguf_model import is_gguf_model, model_directory
from kt_sft.integrations.linears import pack_linears
from kt_sft.integrations.memory_check import bytes_outside_experts, check_memory, uses_main_memory
from kt_sft.integrations.model_files import (
    check_config_file,
    find_config_file,
    load_config,
)
from kt_sft.integrations.native_settings import prepare_native
from kt_sft.integrations.placing import given_dtype, meta_model, plan_checkpoint, plan_here, read_config
from kt_sft.integrations.quantized_weights import UNREAD, Dequantizer
from kt_sft.integrations.saving import save_full_model
from kt_sft.integrations.weight_cache import through_cache
from kt_sft.models.families import adapt_block
from kt_sft.models.spec import ExpertsSpec, find_experts
from kt_sft.nn.routed_experts import PLACEHOLDERS, RoutedExperts, WeightFormats
from kt_sft.placement.inject import device_map, expert_settings
from kt_sft.placement.plan import Plan
from kt_sft.schedule.deferred import Deferral, LayerChain

__all__ = ["KTExpertsConfig", "check_model", "load_model", "quantization_config", "save_full_model"]

logger = logging.getLogger(__name__)

METHOD_NAME = "kt_sft"
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


class KTExpertsConfig(QuantizationConfigMixin):
    """Carries a `KTConfig` through `from_pretrained`; gone from the model once it is loaded.

    Args:
        methods: of experts modules whose method is not the settings'.
        packed_linears: formats of linear layers that rules have packed.
    """

    def __init__(
        self,
        kt_config: KTConfig | dict[str, Any] | None = None,
        replaces_quantization: bool = False,
        methods: dict[str, str] | None = None,
        packed_linears: dict[str, str] | None = None,
        **_: Any,
    ):
        self.quant_method = METHOD_NAME
        self.methods = dict(methods or {})
        self.packed_linears = dict(packed_linears or {})
        self.replaces_quantization = replaces_quantization
        self.kt_config = kt_config if isinstance(kt_config, KTConfig) else KTConfig.from_dict(kt_config or {})

    def to_dict(self) -> dict[str, Any]:
        """Plain values: transformers logs and copies model configs as JSON while loading."""
        return {
            "quant_method": METHOD_NAME,
            "kt_config": self.kt_config.to_dict(),
            "replaces_quantization": self.replaces_quantization,
            "methods": self.methods,
            "packed_linears": self.packed_linears,
        }


class KTExpertsQuantizer(HfQuantizer):
    """The loading hook; one object serves one `from_pretrained` call."""

    def __init__(self, quantization_config: KTExpertsConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.kt_config = quantization_config.kt_config
        self._source: ExpertSource | None = None
        self._dequantizer: Dequantizer | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Before transformers looks at any file.

        Raises:
            ConfigError: DeepSpeed ZeRO-3, which would shard parameters that the experts do not have.
        """
        if is_deepspeed_zero3_enabled():
            raise ConfigError(
                "deepspeed: expected ZeRO stage 0, 1 or 2, found 3; routed experts in CPU kernels are not sharded"
            )
        prepare_native(self.kt_config)

    def preprocess_model(self, model: PreTrainedModel, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        """Model on meta, no weights yet: check all that can fail, then put our modules in place."""
        specs = find_experts(model)
        files = kwargs.get("checkpoint_files") or []
        methods = self.quantization_config.methods
        self._source = open_experts(model, specs, files, self.kt_config, methods)
        if self.quantization_config.replaces_quantization:
            self._dequantizer = Dequantizer(model, specs, files)
        rest_bytes = bytes_outside_experts(model, specs) if uses_main_memory(kwargs.get("device_map")) else 0
        formats = weight_formats(self._source, self.kt_config, methods)
        check_memory(specs, rest_bytes, self.kt_config, formats)
        swap_experts(model, specs, self.kt_config, formats)
        for name in specs:
            model.get_submodule(name).hide_placeholders()
        model._keys_to_ignore_on_load_unexpected = [
            *(model._keys_to_ignore_on_load_unexpected or []),
            *_unread_patterns(model, specs),
            *(UNREAD if self._dequantizer is not None else ()),
        ]

    def get_weight_conversions(self) -> list[WeightConverter]:
        """Asked for after `preprocess_model`: what dequantises the weights outside the experts."""
        return self._dequantizer.conversions() if self._dequantizer is not None else []

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """All other weights are in: pack the experts, then leave an ordinary-looking model."""
        assert self._source is not None
        for name in self._source.formats:
            model.get_submodule(name).show_placeholders()
        if self._dequantizer is not None:
            self._dequantizer.close(model)
        try:
            specs = {name: model.get_submodule(name).spec for name in self._source.formats}
            check_biases(model, self._source)
            self._source = through_cache(self._source, specs, self.kt_config, model.config.model_type)
            stream_experts(model, self._source)
        finally:
            self._source.close()
            self._source = None
        pack_linears(model, self.kt_config, self.quantization_config.packed_linears)
        self.remove_quantization_config(model)
        with suppress(AttributeError):
            del model._keys_to_ignore_on_load_unexpected
        model.kt_config = self.kt_config
        model.save_pretrained = types.MethodType(save_full_model, model)
        model.load_adapter = types.MethodType(_refuse_load_adapter, model)

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Placeholders of experts take no space when transformers plans devices."""
        owner = model.get_submodule(param_name.rpartition(".")[0])
        return 0 if isinstance(owner, RoutedExperts) else param.element_size()

    def is_serializable(self) -> bool:
        """The hook itself is never saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """LoRA on every layer can be trained."""
        return True


def _refuse_load_adapter(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    """In the place of transformers' own, which exchanges the widths of PEFT's wrappers for the rest of the process."""
    raise ConfigError("load_adapter: transformers' own does not know the experts; use kt_sft.load_adapter(model, path)")


def _register() -> None:
    # transformers refuses to register a name twice, which happens when this module is executed again.
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    AUTO_QUANTIZER_MAPPING.pop(METHOD_NAME, None)
    AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD_NAME, None)
    register_quantizer(METHOD_NAME)(KTExpertsQuantizer)
    register_quantization_config(METHOD_NAME)(KTExpertsConfig)


_register()


def swap_experts(
    model: PreTrainedModel, specs: dict[str, ExpertsSpec], config: KTConfig, formats: dict[str, WeightFormats]
) -> None:
    """Put our experts modules, empty, in the place of transformers'."""
    dtype = model.dtype
    chain = LayerChain()
    for name, spec in specs.items():
        parent, _, attribute = name.rpartition(".")
        # transformers builds the model under a meta-device context that must not reach our placeholders.
        with torch.device("cpu"):
            experts = RoutedExperts(
                spec,
                weight_format=formats[name],
                group_size=config.int4_group_size,
                expert_activations=config.expert_activations,
                chunk_size=config.chunk_size,
                cpu_activation=config.cpu_activation,
                dtype=dtype,
            )
        if config.max_deferred_experts_per_token:
            chain.append(experts)
            experts.deferral = Deferral(chain, config.max_deferred_experts_per_token)
        for placeholder in PLACEHOLDERS:
            getattr(experts, placeholder)._is_hf_initialized = True
        block = model.get_submodule(parent)
        adapt_block(block, getattr(block, attribute))
        setattr(block, attribute, experts)


def _unread_patterns(model: PreTrainedModel, specs: dict[str, ExpertsSpec]) -> Iterator[str]:
    """Checkpoint keys that transformers leaves unread on purpose: the experts, and extra prediction layers."""
    for pattern in sorted({re.sub(r"\d+", r"\\d+", re.escape(name)) for name in specs}):
        yield rf"^{pattern}\.(gate_up_proj|down_proj)(_\w+)?$"
    for name, spec in specs.items():
        if spec.expert_keys:
            yield rf"^{re.escape(name)}\.\d+\.({'|'.join(spec.expert_keys)})\."
    text_config = model.config.get_text_config()
    for extra in range(getattr(text_config, "num_nextn_predict_layers", None) or 0):
        yield rf"^model\.layers\.{text_config.num_hidden_layers + extra}\."
