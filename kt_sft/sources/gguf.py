"""Experts in GGUF files; `kt_sft.formats.gguf_expert_tensors` has their names."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from kt_sft.errors import NonFinite
from kt_sft.formats.finite import check_finite
from kt_sft.formats.gguf import GgufIndex, dequantize
from kt_sft.formats.gguf_expert_tensors import GgufLayer, Matrices, find_experts
from kt_sft.formats.gguf_names import layer_of
from kt_sft.native import native
from kt_sft.sources.protocol import check_stored_int4

if TYPE_CHECKING:
    from kt_sft.models.layout import ExpertsSpec, Formats
    from kt_sft.sources.protocol import ExpertLayer

logger = logging.getLogger(__name__)


class GgufExperts:
    """An `ExpertSource` over a GGUF file or a set of split ones.

    Args:
        index: the files; taken over.
        specs: routed experts by module name.
    Raises:
        FormatError, UnsupportedModel: see `gguf_expert_tensors.find_experts`.
    """

    kind = GgufIndex.kind
    is_packed = False
    is_mapped = False
    int4_group = None

    def __init__(self, index: GgufIndex, specs: Mapping[str, ExpertsSpec]):
        self._index = index
        self._files = index.unchanged
        self._layers: dict[str, GgufLayer] = {
            name: find_experts(index, layer_of(name), spec) for name, spec in specs.items()
        }
        index.close()
        self.path = index.source
        self.files = index.files
        self.formats = {name: self._kinds(layer.experts[0]) for name, layer in self._layers.items()}
        self._held = {name: self._native(layer) for name, layer in self._layers.items()}
        self._is_said = False

    def load(self, experts: ExpertLayer, name: str, expert: int, *, slot: int) -> None:
        """See `ExpertSource`; types that the module has not as they are become bf16, then the module's own format."""
        if not self._is_said:
            self._say(experts)
        matrices, blocks = self._layers[name].experts[expert], self.blocks(name, expert)
        packed = [
            part
            if wanted == kind.lower() and wanted != "bf16" and matrix.scale == 1.0
            else dequantize(kind, part, scale=matrix.scale)
            for wanted, kind, part, matrix in zip(experts.formats, self._kinds(matrices), blocks, matrices, strict=True)
        ]
        is_stored = experts.formats == self._held[name] and "int8" not in experts.formats
        read = functools.partial(self.read, name, expert)
        try:
            experts.load_expert(slot, *packed, origin=read, is_stored=is_stored)
        except NonFinite:
            raise
        except ValueError:  # of blocks, which the kernels do not name
            check_finite(*read())
            raise

    def native_formats(self, name: str, method: str, group: int) -> Formats:
        """See `ExpertSource`; method GGUF keeps a projection's own type where kernels have it.

        Others become int8, and the floating point types bf16 (f16 stays). A type that kernels have becomes bf16
        where its blocks are not all that there is: with scales beside them, or several types in one layer.
        """
        if method == "GGUF":
            return self._held[name]
        if method == "RAWINT4":
            check_stored_int4(self, group)
        return method.lower()

    def _say(self, experts: ExpertLayer) -> None:
        """To the user: what is in the file, and what becomes of it."""
        self._is_said = True
        self._say_what_is_not_read()
        if experts.method != "GGUF":
            found = Counter(kind for kinds in self.formats.values() for kind in kinds)
            types = ", ".join(f"{count} x {kind}" for kind, count in found.most_common())
            text = "experts from %s: projections in %s, dequantised to bf16 and packed as %s"
            logger.info(text, self.path.name, types, experts.formats[0])
            return
        held = Counter(
            pair for name, kinds in self.formats.items() for pair in zip(kinds, self._held[name], strict=True)
        )
        words = [
            f"{count} x {kind} {'as stored' if wanted == kind.lower() else f'dequantised to {wanted}'}"
            for (kind, wanted), count in held.most_common()
        ]
        logger.info("experts from %s: projections %s", self.path.name, ", ".join(words))

    def _say_what_is_not_read(self) -> None:
        layers = self._layers.values()
        if inputs := [name for layer in layers for name in layer.input_scales]:
            text = "%s: %d tensors such as %s are for activations in fp4 and not used: these stay bf16 here"
            logger.warning(text, self.path.name, len(inputs), inputs[0])
        if routers := [layer.router_scale for layer in layers if layer.router_scale]:
            text = "%s: %d tensors such as %s are the router's, which is the model directory's own"
            logger.info(text, self.path.name, len(routers), routers[0])

    def read(self, name: str, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `ExpertSource`."""
        matrices, blocks = self._layers[name].experts[expert], self.blocks(name, expert)
        gate, up, down = (
            dequantize(kind, part, scale=matrix.scale)
            for kind, part, matrix in zip(self._kinds(matrices), blocks, matrices, strict=True)
        )
        return gate, up, down

    def tensor_names(self, name: str, expert: int) -> tuple[str, str, str]:
        """See `ExpertSource`."""
        gate, up, down = (matrix.key for matrix in self._layers[name].experts[expert])
        return gate, up, down

    def blocks(self, name: str, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """Raw blocks of gate, up and down, uint8 `[rows, row_bytes]`, before any scale.

        Views of the mapped file, read-only.

        Raises:
            FormatError: a file is gone or no longer the one that was opened.
        """
        matrices = self._layers[name].experts[expert]
        for matrix in matrices:
            self._files.check(self._index.info(matrix.key).file)
        gate, up, down = (self._index.blocks(matrix.key, matrix.rows) for matrix in matrices)
        return gate, up, down

    def close(self) -> None:
        """See `ExpertSource`."""
        self._index.close()

    def _native(self, layer: GgufLayer) -> tuple[str, str, str]:
        held = []
        for matrices in zip(*layer.experts, strict=True):  # of one projection
            kinds = {self._index.info(matrix.key).type.name for matrix in matrices}
            formats = {native_format(kind) for kind in kinds}
            is_plain = len(kinds) == 1 and all(matrix.scale == 1.0 for matrix in matrices)
            held.append(formats.pop() if is_plain or formats == {"int8"} else "bf16")
        gate, up, down = held
        return gate, up, down

    def _kinds(self, matrices: Matrices) -> tuple[str, str, str]:
        """Types of one expert's gate, up and down."""
        gate, up, down = (self._index.info(matrix.key).type.name for matrix in matrices)
        return gate, up, down


@functools.cache
def native_format(kind: str) -> str:
    """Weight format of a GGUF type under method GGUF: the type itself, bf16 or int8."""
    if kind.lower() in {"f16", *(known["name"] for known in native().block_types())}:
        return kind.lower()
    return "bf16" if kind in ("BF16", "F32") else "int8"
