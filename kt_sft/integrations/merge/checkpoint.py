"""A checkpoint with adapters merged in, tensor by tensor: what `kt-sft merge` and `llamafactory-cli export` write.

The model is never built. Each tensor is read from the source's files, gets its deltas in f32 and is rounded once to the
type that is written; memory is that of one tensor's part, one layer's adapter factors and what the system maps.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kt_sft.adapters.changes import Changes, same
from kt_sft.adapters.forms import open_adapter
from kt_sft.adapters.model import BaseModel, Lora
from kt_sft.errors import ConfigError, FormatError, UnsupportedModel
from kt_sft.formats.finite import is_finite
from kt_sft.formats.quantized_index import FLOAT_DTYPES, QuantizedIndex
from kt_sft.formats.safetensors_writer import TORCH_NAMES, PlannedTensor, in_shards
from kt_sft.integrations.transformers.base_model import describe
from kt_sft.integrations.transformers.opened import OpenedModel
from kt_sft.models.expert_keys import PROJECTIONS, ExpertPart, KeyMap
from kt_sft.sources.safetensors import find_layers

logger = logging.getLogger(__name__)


_DAMAGED = "the checkpoint is damaged; download it again"
_BROKEN = "the adapter is broken (kt-sft adapter inspect); merge an earlier one of its checkpoints"
_WIDER = "merge into bfloat16 or float32"


class MergedCheckpoint:
    """The tensors of a checkpoint, merged.

    Args:
        opened: of a safetensors checkpoint, quantised or not.
        adapters: of any form; several are added up.
    Raises:
        ConfigError: it is no folder with such a checkpoint.
        FormatError: files missing or damaged; an adapter that does not fit.
        UnsupportedModel: a model or a quantisation that is not known.
    """

    def __init__(self, opened: OpenedModel, adapters: Sequence[str | os.PathLike[str]]):
        self.folder = Path(opened.path)
        if not self.folder.is_dir():
            raise ConfigError(f"model: expected a directory with safetensors files to merge into, found {self.folder}")
        model = self.model = opened.model
        opened.check_config()
        self.index: QuantizedIndex = opened.index
        self.base: BaseModel = describe(model, str(self.folder))
        keys = opened.key_map
        self._layers = find_layers(self.index, keys)
        self.adapters = [open_adapter(path, self.base) for path in adapters]
        self._parts = {key: (name, parts) for name, layer in self._layers.items() for key, parts in layer.parts()}
        self._targets = {key: keys.target(key)[0] for key in self.index if key not in self._parts}
        self._experts: tuple[str, list[dict[str, Lora]]] | None = None
        self._keys_of = {target: key for key, target in self._targets.items()}
        self._copied: dict[str, str] = {}  # key that is written -> the one that holds its tensor in the checkpoint
        self._tied = self._find_tied()
        self._changes = Changes(self.adapters, self._tied, self._stored)
        self._check_targets(keys)
        self._own = [target for target in self._tied if self._changes.parts(target)]
        self._copied |= {
            self._key_of(target): self._keys_of[target] for target in self._own if target not in self._targets.values()
        }
        self.keys = list(self._with_copies(self.index))

    def _find_tied(self) -> dict[str, str]:
        """Tied parameters that are one matrix in the checkpoint: stored once, or twice alike.

        One of them that is not stored gets the key of the other; transformers does not tie two that differ.
        """
        found: dict[str, str] = {}
        for target, source in self.base.tied.items():
            one, other = self._keys_of.get(target), self._keys_of.get(source)
            if one and other and not same(self.index.read(one), self.index.read(other)):
                continue
            if one or other:
                found[target] = source
                self._keys_of |= {target: one or other, source: other or one}
            if one and not other:
                self._copied[self._key_of(source)] = one
        return found

    def _key_of(self, parameter: str) -> str:
        """What a checkpoint of the family calls the weight of a module."""
        module, _, kind = parameter.rpartition(".")
        return f"{self.base.hub_names.get(module, module)}.{kind}"

    def _with_copies(self, keys: Iterable[str]) -> Iterator[str]:
        """Keys, each followed by those that are written beside it with a tensor that starts from its own."""
        held = set(self.index)
        for key in keys:
            yield key
            yield from (new for new, source in self._copied.items() if source == key and new not in held)

    def _stored(self, parameter: str) -> Tensor | None:
        """A parameter as the checkpoint has it; None if it has not."""
        return self.index.read(self._keys_of[parameter]) if parameter in self._keys_of else None

    def _check_targets(self, keys: KeyMap) -> None:
        """Everything that the adapters change is in the checkpoint, in a form that is known."""
        self._turned: set[str] = set()
        for name in self._changes:
            adapter, key = self._changes.source(name), self._keys_of.get(name)
            if key is None:
                expected = f"{name} in {self.folder}"
                raise FormatError(adapter.source, "target", expected=expected, found="no such tensor")
            if keys.is_transposed(key):
                self._turned.add(key)
            elif not keys.is_as_stored(key):
                raise UnsupportedModel(
                    f"merge: {name}",
                    expected="a tensor that the checkpoint stores as the model has it",
                    found=f"{key}, which is cut or joined on its way",
                    remedy="save the model with stock transformers, save_original_format=False, and merge into that",
                )

    def dtype(self, key: str, wanted: torch.dtype | None = None) -> torch.dtype:
        """What a tensor is written as: as it is stored, bf16 if it was quantised; weights as wanted, but for routing
        biases, which decide by small differences.

        Raises:
            UnsupportedModel: stored in a type that torch has not.
        """
        key = self._source(key)
        info = self.index.info(key)
        if key in self.index.quantized:
            return wanted or torch.bfloat16
        if info.dtype not in TORCH_NAMES:
            expected = f"one of {', '.join(TORCH_NAMES)}"
            raise UnsupportedModel(f"{info.file}: tensor {key}", expected=expected, found=info.dtype)
        is_exact = info.dtype == "F32" and key.endswith("e_score_correction_bias")
        if wanted is None or is_exact or info.dtype not in FLOAT_DTYPES:
            return getattr(torch, TORCH_NAMES[info.dtype])
        return wanted

    def _source(self, key: str) -> str:
        """The key that holds a tensor in the checkpoint."""
        return key if key in self._targets or key in self._parts else self._copied[key]

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a tensor that is written."""
        return self.index.info(self._source(key)).shape

    def is_plain(self, key: str) -> bool:
        """Whether a tensor is none of the experts'."""
        return key not in self._parts

    @property
    def is_untied(self) -> bool:
        """Whether the head is a matrix of its own although the base's config ties it to the embedding."""
        return bool(self._own) or len(self._tied) < len(self.base.tied)

    def repeats(self, key: str) -> bool:
        """Whether a tensor is the head's and the same as the embedding's."""
        target = self._parameter(key)
        return target in self._tied and target not in self._own

    def _parameter(self, key: str) -> str:
        """The model's name of a tensor."""
        if key in self._targets:
            return self._targets[key]
        return next(name for name in (*self._tied, *self._tied.values()) if self._key_of(name) == key)

    def plain(self, key: str) -> Tensor:
        """A tensor outside the experts: in its own type, or wider if it was changed."""
        source = self._source(key)
        weight = self.index.read(source)
        if source in self._turned:
            return self._changes.apply(self._parameter(key), weight.mT).mT.contiguous()
        return self._changes.apply(self._parameter(key), weight)

    def matrix(self, name: str, index: int, projection: str) -> Tensor:
        """Gate, up `[inter, hidden]` or down `[hidden, inter]` of one expert."""
        place = dict(zip(PROJECTIONS, self._layers[name].expert(index), strict=True))[projection]
        weight = place.matrix(self.index.read(place.key, place.rows))
        if self._experts is None or self._experts[0] != name:
            self._experts = (name, [adapter.read_experts(name) for adapter in self.adapters])
        deltas = [loras[projection].delta(index) for loras in self._experts[1] if projection in loras]
        return sum(deltas, start=_wide(weight)) if deltas else weight

    def pieces(self, key: str, dtype: torch.dtype) -> Iterator[Tensor]:
        """The parts of a tensor in the order of the file, rounded once.

        Raises:
            FormatError: one that is not finite.
        """
        if self.is_plain(key):
            yield self._rounded(key, self.plain(key), dtype)
            return
        name, parts = self._parts[key]
        for part in parts:
            yield self._rounded(key, self._piece(name, part), dtype)

    def _rounded(self, key: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
        rounded = weight.to(dtype)
        if not is_finite(rounded):
            raise self.not_finite(key, weight, str(dtype).removeprefix("torch."))
        return rounded

    def not_finite(self, key: str, weight: Tensor, kind: str, module: str | None = None) -> FormatError:
        """Why a tensor is not finite: the checkpoint, an adapter, or the type that is written.

        Args:
            weight: the part that is not, before it was rounded.
            module: of the experts that it belongs to, if `key` is not the checkpoint's.
        """
        found, expected = "NaN or infinity", "finite numbers"
        module = module or (None if self.is_plain(key) else self._parts[key][0])
        if is_finite(weight):
            found = f"numbers up to {float(weight.abs().max()):.3g}, too large for {kind}"
            return FormatError(self.folder, f"merged tensor {key}", expected=expected, found=found, remedy=_WIDER)
        keys = self._layers[module].expected_shapes() if module else [self._source(key)]
        damaged = next((stored for stored in keys if not is_finite(self.index.read(stored))), None)
        if damaged is not None:
            file = self.index.info(damaged).file
            return FormatError(file, f"tensor {damaged}", expected=expected, found=found, remedy=_DAMAGED)
        blamed = self._changes.source(self._parameter(key)) if not module else None
        source = (blamed or next(a for a in self.adapters if module is None or module in a.experts)).source
        return FormatError(source, f"merged tensor {key}", expected=expected, found=found, remedy=_BROKEN)

    def _piece(self, name: str, part: ExpertPart) -> Tensor:
        if part.projection == "gate_up":
            gate, up = (self.matrix(name, part.expert, projection) for projection in ("gate", "up"))
            matrix = self._layers[name].spec.join_gate_up(gate, up)
        else:
            matrix = self.matrix(name, part.expert, part.projection)
        return matrix.mT.contiguous() if part.is_transposed else matrix

    def shards(self) -> dict[str, list[str]]:
        """Keys by the name of the file that holds them, in order."""
        found: dict[str, list[str]] = {}
        for key in self.index:
            found.setdefault(min(file.name for file in self.index.files(key)), []).append(key)
        return {name: list(self._with_copies(keys)) for name, keys in sorted(found.items())}

    def shards_of(self, limit_bytes: int, dtype: torch.dtype | None) -> dict[str, list[str]]:
        """Keys by the name of a file of limited size."""
        keys = (key for keys in self.shards().values() for key in keys)
        groups = in_shards(keys, limit_bytes, lambda key: self.planned(key, dtype).num_bytes)
        return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": keys for n, keys in enumerate(groups, 1)}

    def planned(self, key: str, dtype: torch.dtype | None) -> PlannedTensor:
        """Name, type and shape of a tensor as it is written."""
        return PlannedTensor(key, str(self.dtype(key, dtype)), self.shape(key))

    def num_bytes(self, dtype: torch.dtype | None = None) -> int:
        """Bytes of all tensors as they are written."""
        return sum(self.planned(key, dtype).num_bytes for key in self.keys)


def _wide(weight: Tensor) -> Tensor:
    """What deltas are added to: f32, or f64 of a weight in f64."""
    return weight if weight.dtype == torch.float64 else weight.float()
