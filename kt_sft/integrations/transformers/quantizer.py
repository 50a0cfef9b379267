"""The hook in transformers' loader: an `HfQuantizer`, which it calls before and after it reads weights.

Ours quantises nothing: before, it checks hardware, files and memory and puts `RoutedExperts` in place of the experts
modules, so that transformers reads no expert tensor; after, it streams the experts from the checkpoint into packed form
and takes itself off the model.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from kt_sft.compat.transformers import WeightConverter, forget_quantizer, leave_unread, read_all_again
from kt_sft.errors import ConfigError
from kt_sft.integrations.transformers.linears import pack_linears
from kt_sft.integrations.transformers.opened import OpenedModel
from kt_sft.integrations.transformers.placing import bytes_in_main_memory
from kt_sft.integrations.transformers.quantized_weights import UNREAD, Dequantizer
from kt_sft.integrations.transformers.saving import save_full_model
from kt_sft.integrations.transformers.swapping import swap_experts, unread_patterns
from kt_sft.nn.routed_experts import RoutedExperts
from kt_sft.sources.cache import through_cache
from kt_sft.sources.opening import check_biases, stream_experts
from kt_sft.sources.protocol import ExpertSource

METHOD_NAME = "kt_sft"


class KTExpertsConfig(QuantizationConfigMixin):
    """Carries an `OpenedModel` through `from_pretrained`; gone from the model once it is loaded."""

    def __init__(self, opened: OpenedModel):
        self.quant_method = METHOD_NAME
        self.opened = opened

    def to_dict(self) -> dict[str, Any]:
        """Plain values: transformers logs and copies model configs as JSON while loading."""
        return {"quant_method": METHOD_NAME, "kt_config": self.opened.settings.to_dict()}


class KTExpertsQuantizer(HfQuantizer):
    """The loading hook; one object serves one `from_pretrained` call."""

    def __init__(self, quantization_config: KTExpertsConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self._opened: OpenedModel = quantization_config.opened
        self.kt_config = self._opened.settings
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

    def preprocess_model(self, model: PreTrainedModel, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        """Model on meta, no weights yet: check all that can fail, then put our modules in place."""
        opened = self._opened = self._opened.for_loading(model, kwargs.get("checkpoint_files") or [])
        specs, self._source = opened.specs, opened.source
        if opened.quantization is not None:
            self._dequantizer = Dequantizer(opened.index, opened.key_map, specs)
        opened.check_memory(bytes_in_main_memory(model, specs, kwargs.get("device_map")))
        swap_experts(model, specs, self.kt_config, opened.formats)
        for name in specs:
            model.get_submodule(name).hide_placeholders()
        leave_unread(model, [*unread_patterns(model, specs), *(UNREAD if self._dequantizer is not None else ())])

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
        plan = self._opened.plan
        pack_linears(model, self.kt_config, {} if plan is None else plan.packed_linears)
        self.remove_quantization_config(model)
        read_all_again(model)
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
    forget_quantizer(METHOD_NAME)  # of an earlier execution of this module
    register_quantizer(METHOD_NAME)(KTExpertsQuantizer)
    register_quantization_config(METHOD_NAME)(KTExpertsConfig)


_register()
