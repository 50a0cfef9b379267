"""The hook in transformers' loader: an `HfQuantizer`, which it calls before and after it reads weights.

Ours quantises nothing: before, it checks hardware, files and memory and puts `RoutedExperts` in place of the experts
modules, so that transformers reads no expert tensor; after, it streams the experts from the checkpoint into packed form
and takes itself off the model.
"""

from __future__ import annotations

import types
from contextlib import suppress
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
from kt_sft.integrations.transformers.linears import pack_linears
from kt_sft.integrations.transformers.memory_check import bytes_outside_experts, check_memory, uses_main_memory
from kt_sft.integrations.transformers.quantized_weights import UNREAD, Dequantizer
from kt_sft.integrations.transformers.saving import save_full_model
from kt_sft.integrations.transformers.swapping import swap_experts, unread_patterns
from kt_sft.models.spec import find_experts
from kt_sft.nn.routed_experts import RoutedExperts
from kt_sft.runtime import prepare_native
from kt_sft.sources.cache import through_cache
from kt_sft.sources.opening import (
    ExpertSource,
    check_biases,
    open_experts,
    stream_experts,
    weight_formats,
)

METHOD_NAME = "kt_sft"


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
            *unread_patterns(model, specs),
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
