"""Experts in safetensors checkpoints: read while loading, and again where a packed form has lost digits."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kt_sft.errors import ConfigError
from kt_sft.formats.quantized_index import FLOAT_DTYPES, FP8, INT4, MXFP4, QuantizedIndex
from kt_sft.models.expert_keys import KeyMap, LayerSource, WeightSlice
from kt_sft.sources.protocol import check_stored_int4

if TYPE_CHECKING:
    from kt_sft.models.layout import Formats
    from kt_sft.sources.protocol import ExpertLayer

logger = logging.getLogger(__name__)

READABLE = (*FLOAT_DTYPES, FP8, INT4, MXFP4)


class SafetensorsExperts:
    """An `ExpertSource` over a safetensors checkpoint, sharded or not, quantised or not, fused or one per expert.

    Args:
        index: of the files; taken over, and closed between two reads from different files.
        layers: where each experts module's tensors are; see `find_layers`.
    """

    kind = QuantizedIndex.kind
    is_packed = False
    is_mapped = False

    def __init__(self, index: QuantizedIndex, layers: Mapping[str, LayerSource]):
        self._index = index
        self._layers = dict(layers)
        self._files = index.unchanged
        self._mapped: set[Path] = set()
        self.path = index.source
        self.files = sorted({file for key in index for file in index.files(key)})
        self.formats = {name: self._formats(layer) for name, layer in self._layers.items()}
        self._is_said = False

    def native_formats(self, name: str, method: str, group: int) -> Formats:
        """See `ExpertSource`; RAWINT4 takes integers and scales as they are stored."""
        if method == "GGUF":
            raise ConfigError(
                f"method GGUF: expected the experts in a GGUF file, found safetensors in {self.path}; set weight_path "
                "to a GGUF file, or use BF16, INT8 or INT4"
            )
        if method == "RAWINT4":
            check_stored_int4(self, group)
        return method.lower()

    def load(self, experts: ExpertLayer, name: str, expert: int, *, slot: int) -> None:
        """See `ExpertSource`; an expert whose packed form rounds remembers where it came from."""
        self._say()
        if experts.method == "RAWINT4":
            experts.load_expert_int4(slot, *(self._index.int4(part.key) for part in self._open(name, expert)))
            return
        read = functools.partial(self.read, name, expert)
        experts.load_expert(slot, *read(), origin=read)

    def read(self, name: str, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `ExpertSource`."""
        parts = self._open(name, expert)
        gate, up, down = (part.matrix(self._index.read(part.key, part.rows)).to(torch.bfloat16) for part in parts)
        return gate, up, down

    def tensor_names(self, name: str, expert: int) -> tuple[str, str, str]:
        """See `ExpertSource`."""
        gate, up, down = (part.key for part in self._layers[name].expert(expert))
        return gate, up, down

    def _say(self) -> None:
        """Once, where reading the experts rounds them, and what is not read."""
        wider = sorted({kind for kinds in self.formats.values() for kind in kinds} & {"F16", "F32", "F64"})
        if wider and not self._is_said:
            text = "experts of %s are stored as %s and rounded to bf16 as they are loaded: so will be what is saved; "
            logger.warning(text + "kt-sft merge starts from the stored numbers", self.path, " and ".join(wider))
        if not self._is_said and (unread := [key for layer in self._layers.values() for key in layer.unread]):
            text = "%s: %d tensors such as %s are for quantised activations and not used: these stay bf16 here"
            logger.warning(text, self.path, len(unread), unread[0])
        self._is_said = True

    @property
    def int4_group(self) -> int | None:
        """See `ExpertSource`."""
        kinds = {kind for formats in self.formats.values() for kind in formats}
        is_fused = any(layer.fused for layer in self._layers.values())
        return self._index.int4_group if kinds == {INT4} and not is_fused else None

    def _open(self, name: str, expert: int) -> tuple[WeightSlice, WeightSlice, WeightSlice]:
        """Where an expert is, its files checked and no others mapped."""
        parts = self._layers[name].expert(expert)
        files = set().union(*(self._index.files(part.key) for part in parts))
        for file in files:
            self._files.check(file)
        if files != self._mapped:
            self.close()
            self._mapped = files
        return parts

    def close(self) -> None:
        """See `ExpertSource`."""
        self._index.close()
        self._mapped = set()

    def _formats(self, layer: LayerSource) -> tuple[str, str, str]:
        gate, up, down = (self._index.info(part.key).dtype for part in layer.expert(0))
        return gate, up, down


def find_layers(index: QuantizedIndex, key_map: KeyMap) -> dict[str, LayerSource]:
    """Where each experts module's tensors are, their shapes and types looked at.

    Raises:
        FormatError: experts missing, twice, or too many; a tensor of another shape or type.
        UnsupportedModel: the family stores experts in a way that needs more than slicing.
    """
    layers = key_map.layers(index, index.source, lambda key: index.info(key).shape)
    for layer in layers.values():
        for key, shape in layer.expected_shapes().items():
            index.expect(key, shape, READABLE if key in index.quantized else FLOAT_DTYPES)
    return layers
