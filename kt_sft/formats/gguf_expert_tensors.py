"""The routed experts among the tensors of a GGUF file, by the names of llama.cpp, and what lies beside them.

`blk.L.ffn_{gate,up,down}_exps.weight` hold all experts of layer L, `[experts, out, in]`; gate and up may be one tensor,
`ffn_gate_up_exps` `[experts, 2 inter, hidden]`, gate first. Older files have a tensor per expert,
`blk.L.ffn_{gate,up,down}.E.weight`. Rows are those of the transformers checkpoint, in the same order.

Beside a weight, under the same name but for its end:

* `.scale`, f32 `[experts]` (`[1]` beside one expert's): the weight is its stored numbers times these (NVFP4's second
  scale). llama.cpp takes that of `ffn_up_exps` for both halves of a `ffn_gate_up_exps`.
* `.input_scale`: for kernels that round activations to fp4; it cancels, so the weights are what they are without it.
* Gemma 4's `ffn_down_exps.scale`: the router's `per_expert_scale`, or with NVFP4 weights the product of both.

Anything else is refused by its name: a model that lacks a part of its weights would still talk.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Protocol

from kt_sft.errors import FormatError, UnsupportedModel
from kt_sft.formats.gguf import GgufIndex
from kt_sft.formats.tensor_errors import INCOMPLETE, SAME_MODEL, missing_tensor

ROUTER_SCALE_ARCHITECTURES = ("gemma4",)  # whose `ffn_down_exps.scale` is the router's
SCALE, INPUT_SCALE = ".scale", ".input_scale"
_WEIGHT = ".weight"
_EXPERTS = re.compile(r"blk\.(?P<layer>\d+)\.ffn_\w+?(_exps|_chexps|\.(?P<expert>\d+))\..+")
_OTHER_FILE = "load the experts from a safetensors checkpoint"


class Sizes(Protocol):
    """What has to be known of a layer's experts; `has_router_scale`: the router multiplies by a number per expert."""

    @property
    def num_experts(self) -> int: ...

    @property
    def hidden(self) -> int: ...

    @property
    def inter(self) -> int: ...

    @property
    def has_router_scale(self) -> bool: ...


@dataclass(frozen=True)
class GgufMatrix:
    """One matrix of one expert: a tensor, the part of it on the leading axes, and what its numbers are times."""

    key: str
    rows: tuple[int | slice, ...] = ()
    scale: float = 1.0


Matrices = tuple[GgufMatrix, GgufMatrix, GgufMatrix]


@dataclass(frozen=True)
class GgufLayer:
    """Where gate, up and down of each expert of a layer are, and tensors that are known but not read."""

    experts: tuple[Matrices, ...]
    input_scales: tuple[str, ...] = ()
    router_scale: str | None = None


def is_expert_tensor(name: str) -> bool:
    """Whether a tensor belongs to routed experts: a weight, or something beside one."""
    return _EXPERTS.fullmatch(name) is not None


def count_experts(index: GgufIndex, layer: int, default: int) -> int:
    """Experts of a layer, by its down projections; the default where there are none."""
    fused = f"blk.{layer}.ffn_down_exps.weight"
    if fused in index:
        return index.info(fused).shape[0]
    return sum(1 for name in index if re.fullmatch(rf"blk\.{layer}\.ffn_down\.\d+\.weight", name)) or default


def find_experts(index: GgufIndex, layer: int, sizes: Sizes) -> GgufLayer:
    """All tensors of one layer's experts, their shapes and types checked; reads headers and scales.

    Raises:
        FormatError: a tensor is missing, there in two forms, or has another shape than the model or a type without
            numbers; an expert too many; a scale that is no number.
        UnsupportedModel: a tensor beside the weights that is not known, or whose meaning the file leaves open.
    """
    return _Layer(index, layer, sizes).read()


class _Layer:
    """The search in one layer; `used` are the tensors that have found their place."""

    def __init__(self, index: GgufIndex, layer: int, sizes: Sizes):
        self.index = index
        self.sizes = sizes
        self.prefix = f"blk.{layer}.ffn_"
        self.names = {name for name in index if (m := _EXPERTS.fullmatch(name)) and int(m["layer"]) == layer}
        self.used: set[str] = set()
        self.router_scale: str | None = None

    def read(self) -> GgufLayer:
        """See `find_experts`."""
        is_fused = self.prefix + "gate_up_exps" + _WEIGHT in self.names
        if is_fused:
            gate, up = self._fused_gate_up()
        else:
            gate, up = self._projection("gate"), self._projection("up")
        down = self._projection("down")
        left = self.names - self.used
        unread = {name for name in left if name.endswith(INPUT_SCALE) and self._weight_of(name) in self.used}
        if left - unread:
            raise self._stranger(min(left - unread))
        return GgufLayer(tuple(zip(gate, up, down, strict=True)), tuple(sorted(unread)), self.router_scale)

    def _projection(self, projection: str) -> list[GgufMatrix]:
        """One of gate, up and down for every expert."""
        sizes, base = self.sizes, f"{self.prefix}{projection}_exps"
        shape = (sizes.hidden, sizes.inter) if projection == "down" else (sizes.inter, sizes.hidden)
        single = [f"{self.prefix}{projection}.{expert}" for expert in range(sizes.num_experts)]
        held = [name for name in single if name + _WEIGHT in self.names]
        if base + _WEIGHT in self.names or not held:
            if held:
                raise self._both(base, held[0])
            self._expect(base, (sizes.num_experts, *shape))
            scales = self._scales(base, sizes.num_experts)
            return [GgufMatrix(base + _WEIGHT, (expert,), scale) for expert, scale in enumerate(scales)]
        matrices = []
        for base in single:
            self._expect(base, shape)
            matrices.append(GgufMatrix(base + _WEIGHT, (), self._scales(base, 1)[0]))
        return matrices

    def _fused_gate_up(self) -> tuple[list[GgufMatrix], list[GgufMatrix]]:
        sizes, base = self.sizes, f"{self.prefix}gate_up_exps"
        for name in sorted(self.names):
            if re.fullmatch(rf"{re.escape(self.prefix)}(gate|up)(_exps|\.\d+)\.weight", name):
                raise self._both(base, name.removesuffix(_WEIGHT))
        self._expect(base, (sizes.num_experts, 2 * sizes.inter, sizes.hidden))
        scales = self._scales(base, sizes.num_experts)
        up_base = f"{self.prefix}up_exps"
        if up_base + SCALE in self.names and base + SCALE not in self.names:
            scales = self._scales(up_base, sizes.num_experts)
        halves = (slice(0, sizes.inter), slice(sizes.inter, 2 * sizes.inter))
        gate, up = (
            [GgufMatrix(base + _WEIGHT, (expert, half), scale) for expert, scale in enumerate(scales)]
            for half in halves
        )
        return gate, up

    def _expect(self, base: str, shape: tuple[int, ...]) -> None:
        name = base + _WEIGHT
        if name not in self.names:
            raise missing_tensor(self.index.source, name)
        self.index.expect(name, shape)
        self.index.expect_numbers(name)
        self.used.add(name)

    def _scales(self, base: str, count: int) -> list[float]:
        """What each expert's stored numbers are to be multiplied by."""
        name = base + SCALE
        if name not in self.names:
            return [1.0] * count
        self.used.add(name)
        self.index.expect(name, (count,))
        values = self.index.read(name).tolist()
        wrong = [expert for expert, value in enumerate(values) if not math.isfinite(value)]
        if wrong:
            file, found = self.index.info(name).file, f"{values[wrong[0]]} for expert {wrong[0]}"
            raise FormatError(file, f"tensor {name}", expected="finite numbers", found=found)
        if self.sizes.has_router_scale and base == f"{self.prefix}down_exps":
            self._expect_routers(name)
            self.router_scale = name
            return [1.0] * count
        return values

    def _expect_routers(self, name: str) -> None:
        """Raise unless Gemma 4's scale is the router's alone, which is read from the model directory."""
        others = [base + SCALE for base in ("gate_up_exps", "gate_exps", "up_exps")]
        beside = [self.prefix + other for other in others if self.prefix + other in self.names]
        kind = self.index.info(self._weight_of(name)).type.name
        if beside or kind == "NVFP4":
            raise UnsupportedModel(
                f"{self.index.source}: tensor {name}",
                expected="the router's scale of each expert alone",
                found=f"{beside[0]} beside it: a product with the weights' own" if beside else f"weights in {kind}",
                remedy=_OTHER_FILE,
            )

    def _weight_of(self, name: str) -> str:
        return name.rpartition(".")[0] + _WEIGHT

    def _both(self, base: str, other: str) -> FormatError:
        what = f"tensor {base}{_WEIGHT}"
        return FormatError(self.index.source, what, expected="one form of it", found=f"{other}{_WEIGHT}, too")

    def _stranger(self, name: str) -> FormatError | UnsupportedModel:
        """Why a tensor that found no place is not read."""
        found = _EXPERTS.fullmatch(name)
        what = f"{self.index.source}: tensor {name}"
        if found and found["expert"] and int(found["expert"]) >= self.sizes.num_experts:
            count = f"{self.sizes.num_experts} experts"
            return FormatError(self.index.source, f"tensor {name}", expected=count, found="one more", remedy=SAME_MODEL)
        if name.endswith(".bias"):
            expected = "experts without bias in a GGUF file"
            return UnsupportedModel(what, expected=expected, found="a bias", remedy=_OTHER_FILE)
        if name.endswith(SCALE) and not name.endswith(_WEIGHT + SCALE) and self._weight_of(name) not in self.names:
            what, expected = f"tensor {name}", f"its weight {self._weight_of(name)}"
            return FormatError(self.index.source, what, expected=expected, found="no such tensor", remedy=INCOMPLETE)
        expected = "weights of experts, with .scale and .input_scale beside them"
        return UnsupportedModel(what, expected=expected, found="one that is not known", remedy=_OTHER_FILE)
