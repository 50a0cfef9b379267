"""Weights outside the experts of a quantised checkpoint: dequantised while transformers loads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from kt_sft.errors import UnsupportedModel
from kt_sft.formats.quantized_index import QuantizedIndex
from kt_sft.integrations.transformers.model_files import open_checkpoint
from kt_sft.models.expert_keys import KeyMap

if TYPE_CHECKING:
    from kt_sft.models.spec import ExpertsSpec

# What a checkpoint holds beside the weights themselves; transformers must not report it as unexpected.
UNREAD = (
    r"_scale_inv$",
    r"\.weight_(scale|shape|zero_point)$",
    r"\.(input|activation)_scale$",
    r"experts\.\w+_(blocks|scales)$",
)


class Dequantizer:
    """Serves transformers' loader with dequantised tensors.

    The loader hands over the quantised tensor alone; this reads it again together with its scales, from the page cache.

    Args:
        model: as transformers builds it, its experts modules still in place.
        files: weight files of the model directory.
    Raises:
        FormatError: a file is damaged, or scales are missing or of a wrong shape.
        UnsupportedModel: a quantised tensor that transformers converts in a way of its own.
    """

    def __init__(self, model: nn.Module, specs: Mapping[str, ExpertsSpec], files: Iterable[str | Path]):
        self._index: QuantizedIndex = open_checkpoint(files)
        self._keys: dict[str, str] = {}  # parameter -> checkpoint tensor
        key_map = KeyMap(model, specs)
        for key in self._index.quantized:
            target, pattern = key_map.target(key)
            if target.rpartition(".")[0] in specs or not key_map.is_parameter(target):
                continue
            if pattern is not None:
                raise UnsupportedModel(
                    f"checkpoint tensor {key}",
                    expected="a quantised tensor that is a parameter as it is",
                    found=f"one that transformers converts by {pattern}",
                    remedy="use the bf16 version of the checkpoint",
                )
            self._keys[target] = key

    def conversions(self) -> list[WeightConverter]:
        """For `HfQuantizer.get_weight_conversions`; empty for a checkpoint in floating point."""
        if not self._keys:
            return []
        return [WeightConverter(["weight$", "weight_packed$"], "weight", operations=[_Dequantize(self)])]

    def read(self, parameter: str, stored: Tensor) -> Tensor:
        """Value of a parameter; `stored` is what the loader read, with the dtype and device that it wants."""
        key = self._keys.get(parameter)
        return stored if key is None else self._index.read(key).to(device=stored.device, dtype=stored.dtype)

    def close(self, model: nn.Module) -> None:
        """Drop file mappings, and take the conversions off a loaded model: it is saved in floating point."""
        self._index.close()
        kept = [entry for entry in getattr(model, "_weight_conversions", None) or [] if not _is_ours(entry)]
        if hasattr(model, "_weight_conversions"):
            model._weight_conversions = kept


def _is_ours(conversion: Any) -> bool:
    return any(isinstance(operation, _Dequantize) for operation in getattr(conversion, "operations", ()))


class _Dequantize(ConversionOps):
    """transformers' form of `Dequantizer.read`."""

    def __init__(self, dequantizer: Dequantizer):
        self._dequantizer = dequantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> _Dequantize:
        """transformers copies conversions for every tensor."""
        return self

    def convert(
        self, input_dict: dict[str, Any], *args: Any, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Tensor]:
        """See transformers."""
        value = next(iter(input_dict.values()))
        stored = value[0] if isinstance(value, list) else value
        return {full_layer_name: self._dequantizer.read(full_layer_name, stored)}

    @property
    def reverse_op(self) -> ConversionOps:
        """Never saved."""
        raise NotImplementedError("quantised checkpoints are not written")
