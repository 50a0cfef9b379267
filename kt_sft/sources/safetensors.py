"""Experts in safetensors checkpoints: read while loading, and again where a packed form has lost digits."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kt_sft.errors import FormatError
from kt_sft.formats.quantized_index import FLOAT_DTYPES, FP8, INT4, MXFP4, QuantizedIndex
from kt_sft.models.expert_keys import LayerSource, WeightSlice

if TYPE_CHECKING:
    from kt_sft.nn.routed_experts import RoutedExperts

logger = logging.getLogger(__name__)

READABLE = (*FLOAT_DTYPES, FP8, INT4, MXFP4)


class UnchangedFiles:
    """Tells a file that was replaced or rewritten since its first use from the one that was opened."""

    def __init__(self) -> None:
        self._marks: dict[Path, tuple[int, ...]] = {}

    def check(self, file: Path) -> None:
        """Call before every use of a file.

        Raises:
            FormatError: it is gone or no longer the one of the first call.
        """
        try:
            now = os.stat(file)
            found = (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns)
        except OSError:
            found = ()
        if not found or self._marks.setdefault(file, found) != found:
            raise FormatError(
                file,
                "checkpoint of the experts",
                expected="as it was when the model was loaded",
                found="changed" if found else "missing",
                remedy="put the file back, or load the model again",
            )


class SafetensorsExperts:
    """An `ExpertSource` over a safetensors checkpoint, sharded or not, quantised or not, fused or one per expert.

    Args:
        index: of the files; taken over, and closed between two reads from different files.
        layers: where each experts module's tensors are.
    Raises:
        FormatError: a tensor has another shape or type.
    """

    def __init__(self, index: QuantizedIndex, layers: Mapping[str, LayerSource]):
        self._index = index
        self._layers = dict(layers)
        self._files = UnchangedFiles()
        self._mapped: set[Path] = set()
        self.path = index.source
        self.files = sorted({file for key in index for file in index.files(key)})
        for layer in self._layers.values():
            for key, shape in layer.expected_shapes().items():
                index.expect(key, shape, READABLE if key in index.quantized else FLOAT_DTYPES)
        self.formats = {name: self._formats(layer) for name, layer in self._layers.items()}
        self._is_said = False

    def load(self, experts: RoutedExperts, name: str, expert: int, *, slot: int | None = None) -> None:
        """See `ExpertSource`; an expert whose packed form rounds remembers where it came from."""
        self._say()
        slot = expert if slot is None else slot
        if experts.weight_format == "rawint4":
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
        """Weights that share a scale, where all experts are INT4 matrices of their own; None for all others."""
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
