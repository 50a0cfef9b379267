"""LoRA on ordinary Linear layers, which all forms in adapter directories have alike, and modules trained as a whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from kt_sft.adapters import peft_config
from kt_sft.adapters.model import Adapter, BaseModel, Lora
from kt_sft.adapters.tensor_file import PREFIX, TensorFile
from kt_sft.errors import FormatError

if TYPE_CHECKING:
    from torch import Tensor

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<role>[AB])\.weight")


class LinearReader:
    """Finds the pairs of Linear layers among the tensors that nobody else knows; called with a name it reads one.

    Args:
        known: names that belong to the experts.
    Raises:
        FormatError: half a pair, another shape, a name that is no Linear of the model.
    """

    def __init__(self, tensors: TensorFile, config: Mapping[str, Any], base: BaseModel, known: set[str]):
        self._tensors = tensors
        self._stems: dict[str, str] = {}
        self.ranks: dict[str, int] = {}
        self.scales: dict[str, float] = {}
        self.rest: list[str] = []
        by_hub_name = {hub: name for name, hub in base.hub_names.items()}
        for key in tensors:
            found = _FACTOR.fullmatch(key)
            if key in known:
                continue
            if found is None:
                self.rest.append(key)
                continue
            stem = found["module"]
            name = stem if stem in base.linears else by_hub_name.get(stem, stem)
            if name not in base.linears:
                what = f"tensor {key}"
                remedy = "name the model of the adapter with --base-model"
                raise FormatError(
                    tensors.path, what, expected="a LoRA target of the model", found="none", remedy=remedy
                )
            self._stems[name] = stem
        for name, stem in self._stems.items():
            self._check(name, stem, config, base)

    def _check(self, name: str, stem: str, config: Mapping[str, Any], base: BaseModel) -> None:
        rank = peft_config.rank_of(config, name)
        out, into = base.linears[name]
        for role, shape in (("A", (rank, into)), ("B", (out, rank))):
            key = f"{stem}.lora_{role}.weight"
            found = self._tensors.shape(key) if key in self._tensors else None
            if found != shape:
                shown = "missing" if found is None else list(found)
                raise FormatError(self._tensors.path, f"tensor {key}", expected=list(shape), found=shown)
        self.ranks[name], self.scales[name] = rank, peft_config.scale_of(config, name, rank)

    def __call__(self, name: str) -> Lora:
        stem = self._stems[name]
        a, b = (self._tensors.read(f"{stem}.lora_{role}.weight") for role in "AB")
        return Lora(a, b, self.scales[name])


def check_whole(tensors: TensorFile, rest: list[str], base: BaseModel) -> dict[str, Callable[[], Tensor]]:
    """Modules trained as a whole: what is left over, which must be parameters of the model.

    Raises:
        FormatError: something else, as the vectors of DoRA; no parameter of the model, or one of another shape.
    """
    found: dict[str, Callable[[], Tensor]] = {}
    for key in rest:
        if ".lora_" in key or not key.endswith((".weight", ".bias")):
            what = f"tensor {key}"
            raise FormatError(tensors.path, what, expected="lora_A and lora_B of plain LoRA", found="something else")
        name = key.replace(".modules_to_save.default", "").replace(".base_layer.", ".")
        expected, shape = base.parameters.get(name), tensors.shape(key)
        if expected is None:
            what, remedy = f"tensor {key}", "name the model of the adapter with --base-model"
            raise FormatError(tensors.path, what, expected="a parameter of the model", found="none", remedy=remedy)
        if shape != expected:
            what, remedy = f"tensor {key}", "name the model that it was trained on, with the vocabulary of that time"
            raise FormatError(tensors.path, what, expected=list(expected), found=list(shape), remedy=remedy)
        found[name] = partial(tensors.read, key)
    return found


def linear_tensors(
    adapter: Adapter, ranks: Mapping[str, int], scales: Mapping[str, float], names: Mapping[str, str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The pairs of all Linear layers at the given ranks and scales, under other names where `names` has some."""
    for name in adapter.linears:
        lora = adapter.read_linear(name).fitted(ranks[name], scales[name])
        stem = f"{PREFIX}{(names or {}).get(name, name)}.lora_"
        yield f"{stem}A.weight", lora.a
        yield f"{stem}B.weight", lora.b


def whole_tensors(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """Modules trained as a whole; PEFT keeps the weight of one that has LoRA, too, in its base layer."""
    for name, read in adapter.whole.items():
        module, _, kind = name.rpartition(".")
        yield f"{PREFIX}{module}{'.base_layer' if module in adapter.ranks else ''}.{kind}", read()
