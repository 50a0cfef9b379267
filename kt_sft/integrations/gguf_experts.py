"""Experts in GGUF files, by the tensor names of llama.cpp.

`blk.L.ffn_{gate,up,down}_exps.weight` hold all experts of layer L, `[experts, out, in]`; older files have one tensor
per expert, `blk.L.ffn_{gate,up,down}.E.weight`. Rows are those of the transformers checkpoint, in the same order.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from kt_sft.errors import UnsupportedModel
from kt_sft.formats.gguf import GgufIndex, dequantize
from kt_sft.formats.gguf_names import layer_of
from kt_sft.integrations.expert_files import UnchangedFiles
from kt_sft.models.expert_keys import PROJECTIONS, WeightSlice
from kt_sft.native import native

if TYPE_CHECKING:
    from kt_sft.models.spec import ExpertsSpec
    from kt_sft.nn.routed_experts import RoutedExperts

logger = logging.getLogger(__name__)


class GgufExperts:
    """An `ExpertSource` over a GGUF file or a set of split ones.

    Args:
        index: the files; taken over.
        specs: routed experts by module name.
    Raises:
        FormatError: a tensor is missing, or has another shape than the model or a type without numbers.
        UnsupportedModel: experts with a bias.
    """

    def __init__(self, index: GgufIndex, specs: Mapping[str, ExpertsSpec]):
        self._index = index
        self._files = UnchangedFiles()
        self._specs = dict(specs)
        self._layers = {name: layer_of(name) for name in specs}
        self.path = index.source
        self.files = index.files
        self.formats = {name: self._check(name, spec) for name, spec in specs.items()}
        self._is_said = False

    def load(self, experts: RoutedExperts, name: str, expert: int, *, slot: int | None = None) -> None:
        """See `ExpertSource`; types that the module has not as they are become bf16, then the module's own format."""
        if not self._is_said:
            self._say(experts)
        read = functools.partial(self.read, name, expert)
        kinds, blocks = self.formats[name], self.blocks(name, expert)
        packed = [
            part if wanted == kind.lower() and wanted != "bf16" else dequantize(kind, part)
            for wanted, kind, part in zip(experts.formats, kinds, blocks, strict=True)
        ]
        is_stored = experts.formats == self.native_formats(name) and "int8" not in experts.formats
        experts.load_expert(expert if slot is None else slot, *packed, origin=read, is_stored=is_stored)

    def native_formats(self, name: str) -> tuple[str, str, str]:
        """What holds gate, up and down of a module for method GGUF: their own types where kernels have them.

        Others become int8, and the floating point types bf16 (f16 stays).
        """
        gate, up, down = (native_format(kind) for kind in self.formats[name])
        return gate, up, down

    def _say(self, experts: RoutedExperts) -> None:
        """One line to the user: what is in the file, and what becomes of it."""
        self._is_said = True
        found = Counter(kind for kinds in self.formats.values() for kind in kinds)
        if experts.weight_format != "gguf":
            types = ", ".join(f"{count} x {kind}" for kind, count in found.most_common())
            text = "experts from %s: projections in %s, dequantised to bf16 and packed as %s"
            logger.info(text, self.path.name, types, experts.weight_format)
            return
        words = []
        for kind, count in found.most_common():
            held = native_format(kind)
            words.append(f"{count} x {kind} {'as stored' if held == kind.lower() else f'dequantised to {held}'}")
        logger.info("experts from %s: projections %s", self.path.name, ", ".join(words))

    def read(self, name: str, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `ExpertSource`."""
        gate, up, down = (
            dequantize(self._index.info(part.key).type.name, blocks)
            for part, blocks in zip(self._parts(name, expert), self.blocks(name, expert), strict=True)
        )
        return gate, up, down

    def blocks(self, name: str, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """Raw blocks of gate, up and down, uint8 `[rows, row_bytes]`, in the types that `formats` names.

        Views of the mapped file, read-only.

        Raises:
            FormatError: a file is gone or no longer the one that was opened.
        """
        parts = self._parts(name, expert)
        for part in parts:
            self._files.check(self._index.info(part.key).file)
        gate, up, down = (self._index.blocks(part.key, part.rows) for part in parts)
        return gate, up, down

    def close(self) -> None:
        """See `ExpertSource`."""
        self._index.close()

    def _parts(self, name: str, expert: int) -> list[WeightSlice]:
        layer = self._layers[name]
        fused = [WeightSlice(f"blk.{layer}.ffn_{projection}_exps.weight", (expert,)) for projection in PROJECTIONS]
        single = [WeightSlice(f"blk.{layer}.ffn_{projection}.{expert}.weight") for projection in PROJECTIONS]
        return [old if old.key in self._index else new for new, old in zip(fused, single, strict=True)]

    def _check(self, name: str, spec: ExpertsSpec) -> tuple[str, str, str]:
        for projection in PROJECTIONS:
            bias = f"blk.{self._layers[name]}.ffn_{projection}_exps.bias"
            if bias in self._index:
                raise UnsupportedModel(
                    f"{self.path}, tensor {bias}",
                    expected="experts without bias in a GGUF file",
                    found="a bias",
                    remedy="load the experts from a safetensors checkpoint",
                )
        into, out = (spec.inter, spec.hidden), (spec.hidden, spec.inter)
        for expert in range(spec.num_experts):
            parts = self._parts(name, expert)
            for part, shape in zip(parts, (into, into, out), strict=True):
                self._index.expect(part.key, (spec.num_experts, *shape) if part.rows else shape)
                self._index.expect_numbers(part.key)
            if all(part.rows for part in parts):
                break  # the same tensors hold all experts
        gate, up, down = (self._index.info(part.key).type.name for part in self._parts(name, 0))
        return gate, up, down


@functools.cache
def native_format(kind: str) -> str:
    """Weight format of a GGUF type under method GGUF: the type itself, bf16 or int8."""
    if kind.lower() in {"f16", *(known["name"] for known in native().block_types())}:
        return kind.lower()
    return "bf16" if kind in ("BF16", "F32") else "int8"
