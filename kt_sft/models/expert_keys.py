"""Where a checkpoint keeps each expert's weights.

Checkpoints hold one tensor per expert and projection (`...experts.0.gate_proj.weight`, `...experts.0.w1.weight`) or
fused 3-D tensors. transformers already knows how every family's names map to its experts modules; this module asks
that mapping instead of listing families, and turns the answer into slices that can be read one expert at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kt_sft.errors import FormatError, UnsupportedModel
from kt_sft.formats.tensor_errors import INCOMPLETE, SAME_MODEL

if TYPE_CHECKING:
    from torch import Tensor, nn

    from kt_sft.models.layout import ExpertsSpec

PROJECTIONS = ("gate", "up", "down")
_OF_ACTIVATIONS = ("input_scale", "activation_scale", "input_global_scale")


@dataclass(frozen=True)
class WeightSlice:
    """One expert's matrix: a tensor of the checkpoint and the part of it on the leading axes (empty: all of it).

    Args:
        step: rows of the matrix that are taken, once it is turned; None for all.
        is_transposed: the part is `[in, out]`.
    """

    key: str
    rows: tuple[int | slice, ...] = ()
    step: slice | None = None
    is_transposed: bool = False

    def matrix(self, part: Tensor) -> Tensor:
        """`[out, in]`, contiguous, from the part that was read."""
        part = part.mT if self.is_transposed else part
        return (part if self.step is None else part[self.step]).contiguous()


@dataclass(frozen=True)
class ExpertPart:
    """One expert's matrix inside a tensor of a checkpoint: gate, up, down, or gate_up in the order of the module."""

    expert: int
    projection: str
    is_transposed: bool = False


@dataclass
class LayerSource:
    """Checkpoint keys of one experts module, of one form: fused (two keys) or one key per expert and projection.

    Args:
        transposed: fused parameters that the file keeps as `[experts, in, out]`.
        unread: scales of quantised activations, which stay bf16 here.
    """

    name: str
    spec: ExpertsSpec
    fused: dict[str, str] = field(default_factory=dict)
    single: dict[tuple[str, int], str] = field(default_factory=dict)
    transposed: set[str] = field(default_factory=set)
    unread: list[str] = field(default_factory=list)

    def expert(self, index: int) -> tuple[WeightSlice, WeightSlice, WeightSlice]:
        """gate [inter, hidden], up [inter, hidden], down [hidden, inter] of one expert."""
        if self.single:
            gate, up, down = (WeightSlice(self.single[projection, index]) for projection in PROJECTIONS)
            return gate, up, down
        return (
            self._gate_up(index, self.spec.gate_rows),
            self._gate_up(index, self.spec.up_rows),
            WeightSlice(self.fused["down_proj"], (index,), is_transposed="down_proj" in self.transposed),
        )

    def _gate_up(self, index: int, outputs: slice) -> WeightSlice:
        key, is_transposed = self.fused["gate_up_proj"], "gate_up_proj" in self.transposed
        if outputs.step is not None:  # safetensors has no steps
            return WeightSlice(key, (index,), outputs, is_transposed)
        if is_transposed:
            return WeightSlice(key, (index, slice(None), outputs), is_transposed=True)
        return WeightSlice(key, (index, outputs))

    def parts(self) -> Iterator[tuple[str, list[ExpertPart]]]:
        """Every tensor with the matrices that it is made of, one after the other."""
        experts = range(self.spec.num_experts)
        if self.single:
            for expert in experts:
                for projection in PROJECTIONS:
                    yield self.single[projection, expert], [ExpertPart(expert, projection)]
        elif self.transposed or self.spec.is_interleaved:
            for name, projection in (("gate_up_proj", "gate_up"), ("down_proj", "down")):
                is_transposed = name in self.transposed
                yield self.fused[name], [ExpertPart(expert, projection, is_transposed) for expert in experts]
        else:
            yield self.fused["gate_up_proj"], [ExpertPart(e, p) for e in experts for p in ("gate", "up")]
            yield self.fused["down_proj"], [ExpertPart(e, "down") for e in experts]

    def expected_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape that the file must have, by checkpoint key."""
        spec = self.spec
        if self.fused:
            return {key: spec.stored_shape(name, name in self.transposed) for name, key in self.fused.items()}
        into, out = (spec.inter, spec.hidden), (spec.hidden, spec.inter)
        return {key: out if projection == "down" else into for (projection, _), key in self.single.items()}

    def check_complete(self, source: object) -> None:
        """Every expert has its three matrices, once, and none is left over.

        Raises:
            FormatError: names the first expert that is missing or too many.
        """
        if self.fused and self.single:
            raise FormatError(
                source, f"experts of {self.name}", expected="fused or one tensor per expert", found="both"
            )
        if self.fused:
            missing = [name for name in ("gate_up_proj", "down_proj") if name not in self.fused]
        else:
            wanted = {(projection, index) for index in range(self.spec.num_experts) for projection in PROJECTIONS}
            extra = sorted(index for _, index in self.single.keys() - wanted)
            if extra:
                raise FormatError(
                    source,
                    f"experts of {self.name}",
                    expected=f"{self.spec.num_experts} experts",
                    found=f"expert {extra[0]}",
                    remedy=SAME_MODEL,
                )
            missing = [
                f"expert {index} {projection}"
                for projection, index in sorted(wanted - self.single.keys(), key=lambda w: w[1])
            ]
        if missing:
            raise FormatError(
                source,
                f"experts of {self.name}",
                expected=f"gate, up and down of {self.spec.num_experts} experts",
                found=f"{len(missing)} missing, first {missing[0]}",
                remedy=INCOMPLETE,
            )


class KeyMap:
    """transformers' renaming of checkpoint keys for one model.

    Args:
        model: the model as transformers builds it (meta device is enough), its experts modules still in place.
    """

    def __init__(self, model: nn.Module, specs: Mapping[str, ExpertsSpec]):
        from kt_sft.compat.transformers import WeightConverter, WeightRenaming, get_model_conversion_mapping

        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        self._prefix = model.base_model_prefix
        self._specs = dict(specs)
        self._parameters: dict[str, Any] = dict(model.state_dict())
        for name, spec in specs.items():
            self._parameters[f"{name}.gate_up_proj"] = spec.gate_up_shape
            self._parameters[f"{name}.down_proj"] = spec.down_shape
        # Of experts in a ModuleList: key -> module, projection and number.
        self._listed = {key: (name, *part) for name, spec in specs.items() for key, part in _listed(name, spec)}
        self._parameters.update(self._listed)
        self._targets: dict[str, tuple[str, str | None]] = {}  # of keys that were asked for: that is slow

    def target(self, key: str) -> tuple[str, str | None]:
        """The parameter that a checkpoint key feeds, and the converter pattern that matched (None: as it is)."""
        if key not in self._targets:
            self._targets[key] = self._target(key)
        return self._targets[key]

    def _target(self, key: str) -> tuple[str, str | None]:
        from kt_sft.compat.transformers import rename_source_key

        renamed, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, self._parameters)
        if renamed not in self._parameters and key in self._parameters:
            return key, None
        return renamed, pattern

    def is_as_stored(self, key: str) -> bool:
        """Whether a tensor of a checkpoint becomes a parameter as it is; otherwise it is turned, cut or joined."""
        return self.target(key)[1] is None

    def is_transposed(self, key: str) -> bool:
        """Whether a tensor of a checkpoint becomes a parameter by being transposed, and by nothing else."""
        pattern = self.target(key)[1]
        found = [type(operation).__name__ for operation in self._by_pattern[pattern].operations] if pattern else []
        return found == ["Transpose"]

    def is_parameter(self, target: str) -> bool:
        """Whether the model has such a parameter or buffer; a checkpoint may hold layers that it has not."""
        return target in self._parameters

    def plain_shape(self, key: str) -> tuple[int, ...] | None:
        """Shape the file must have for a key that feeds a non-expert parameter unchanged; None for all others."""
        target, pattern = self.target(key)
        if pattern is not None or target in self._listed or target not in self._parameters:
            return None
        if target.rpartition(".")[0] in self._specs:
            return None
        return tuple(self._parameters[target].shape)

    def layers(
        self, keys: Iterable[str], source: object, shape_of: Callable[[str], Sequence[int]] | None = None
    ) -> dict[str, LayerSource]:
        """Find the experts' tensors among the keys of a checkpoint.

        Keys of modules that the model does not have (extra prediction layers) are left out.

        Args:
            source: file or directory, for messages.
            shape_of: gives the shape of a tensor, which tells the orientation of families that have both in use.
        Raises:
            FormatError: experts missing, twice, or too many.
            UnsupportedModel: the family stores experts in a way that needs more than slicing.
        """
        layers = {name: LayerSource(name, spec) for name, spec in self._specs.items()}
        others: list[str] = []
        for key in keys:
            target, pattern = self.target(key)
            if target not in self._parameters:
                others.append(key)
            if target in self._listed:
                name, projection, index = self._listed[target]
                layers[name].single[projection, index] = key
            module, _, parameter = target.rpartition(".")
            if module not in layers or parameter not in ("gate_up_proj", "down_proj"):
                continue
            layer = layers[module]
            if pattern is None or self._turns(pattern):
                layer.fused[parameter] = key
                if layer.spec.is_transposed != self._is_turned(pattern, key, parameter, layer.spec, shape_of):
                    layer.transposed.add(parameter)
            else:
                projection = self._projection(pattern, parameter, key)
                owner, index = self._owner(pattern, layer, self._expert_index(pattern, key))
                layers.get(owner, layer).single[projection, index] = key
        for layer in layers.values():
            layer.check_complete(source)
        _check_beside(layers, others, source)
        return layers

    def missing_biases(self, keys: Iterable[str]) -> list[str]:
        """Biases of experts that no key feeds."""
        wanted = [f"{name}.{bias}" for name, spec in self._specs.items() for bias in spec.bias_shapes]
        found = {self.target(key)[0] for key in keys} if wanted else set()
        return [name for name in wanted if name not in found]

    def _turns(self, pattern: str) -> bool:
        """Whether the converter of a pattern does nothing but transpose one tensor."""
        return [type(op).__name__ for op in self._by_pattern[pattern].operations] == ["Transpose"]

    def _is_turned(self, pattern, key, parameter, spec, shape_of) -> bool:
        """Whether the file's fused tensor is the module's with in and out exchanged."""
        if pattern is None:
            return False
        depends = getattr(self._by_pattern[pattern].operations[0], "check_dims", False)
        kept = spec.stored_shape(parameter, spec.is_transposed)
        return not (depends and shape_of is not None and tuple(shape_of(key)) == kept)

    def _projection(self, pattern: str, parameter: str, key: str) -> str:
        """Which matrix a per-expert key holds: the converter stacks experts, then puts gate before up."""
        converter = self._by_pattern[pattern]
        steps = [type(op).__name__ for op in converter.operations]
        position = converter.source_patterns.index(pattern)
        splits = steps == ["ErnieFuseAndSplitTextVisionExperts"]
        if parameter == "gate_up_proj" and len(converter.source_patterns) == 2:
            if splits or steps == ["MergeModulelist", "Concatenate"]:
                return ("gate", "up")[position]
        if parameter == "down_proj" and (splits or steps == ["MergeModulelist"]):
            return "down"
        raise UnsupportedModel(
            f"checkpoint tensor {key}",
            expected="one tensor per expert and projection, or fused [experts, out, in]",
            found=f"a layout that transformers converts by {' + '.join(steps)}",
            remedy="this family is not supported yet",
        )

    def _owner(self, pattern: str, layer: LayerSource, index: int) -> tuple[str, int]:
        """The module that holds a numbered expert, and its number there.

        ERNIE-VL numbers the experts of two modules through, one after the other; `layer` is the first of them.
        """
        modules = [target.rpartition(".")[0] for target in self._by_pattern[pattern].target_patterns]
        part = index // layer.spec.num_experts
        if len(modules) == 1 or part >= len(modules):
            return layer.name, index
        return layer.name.removesuffix(modules[0]) + modules[part], index % layer.spec.num_experts

    def _expert_index(self, pattern: str, key: str) -> int:
        """Number that stands for the `*` of a converter pattern such as `.experts.*.w1.weight`."""
        renamed = key
        for renaming in self._renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        expression = r"(\d+)".join(re.escape(part) for part in pattern.split("*"))
        found = re.search(expression, renamed)
        if found is None:
            raise UnsupportedModel(
                f"checkpoint tensor {key}", expected=f"a name like {pattern}", found="no expert number"
            )
        return int(found.group(1))


def _check_beside(layers: Mapping[str, LayerSource], keys: Iterable[str], source: object) -> None:
    """Raise where the checkpoint holds something beside the experts' weights that nobody reads.

    Args:
        keys: those that feed no parameter of the model.
    Raises:
        UnsupportedModel: scales, zero points, biases and the like: without them the weights are others.
    """
    owners: dict[str, LayerSource] = {}  # what their names begin with, whole components
    fused: dict[str, LayerSource] = {}
    for layer in layers.values():
        for key in layer.single.values():
            owners[re.sub(r"\.\d+\.[^.]+\.[^.]+$", "", key)] = layer
        for key in layer.fused.values():
            fused[key] = owners[key.removesuffix(".weight")] = layer
        owners[layer.name] = layer
    for key in keys:
        begins = [key[: dot.start()] for dot in re.finditer(r"\.", key)]
        layer = next((owners[begin] for begin in begins if begin in owners), None)
        layer = layer or next(
            (fused[key[: m.start()]] for m in re.finditer("_", key) if key[: m.start()] in fused), None
        )
        if layer is None:
            continue
        if not key.endswith(_OF_ACTIVATIONS):
            raise UnsupportedModel(
                f"{source}: tensor {key}",
                expected="weights of experts, and scales that quantization_config in config.json explains",
                found="one beside them that is not read",
                remedy="use the bf16 version of the checkpoint",
            )
        layer.unread.append(key)


def _listed(name: str, spec: ExpertsSpec) -> Iterator[tuple[str, tuple[str, int]]]:
    """Keys of the experts of a ModuleList, with projection and number."""
    for index in range(spec.num_experts):
        for projection, child in zip(PROJECTIONS, spec.expert_keys or (), strict=False):
            yield f"{name}.{index}.{child}.weight", (projection, index)
