"""Where a checkpoint keeps each expert's weights.

Checkpoints hold one tensor per expert and projection (`...experts.0.gate_proj.weight`, `...experts.0.w1.weight`) or
fused 3-D tensors. transformers already knows how every family's names map to its experts modules; this module asks
that mapping instead of listing families, and turns the answer into slices that can be read one expert at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kt_sft.errors import FormatError, UnsupportedModel

if TYPE_CHECKING:
    from torch import nn

    from kt_sft.models.spec import ExpertsSpec

PROJECTIONS = ("gate", "up", "down")


@dataclass(frozen=True)
class WeightSlice:
    """One expert's matrix: a tensor of the checkpoint and the part of it on the leading axes (empty: all of it)."""

    key: str
    rows: tuple[int | slice, ...] = ()


@dataclass
class LayerSource:
    """Checkpoint keys of one experts module, of one form: fused (two keys) or one key per expert and projection."""

    name: str
    spec: ExpertsSpec
    fused: dict[str, str] = field(default_factory=dict)
    single: dict[tuple[str, int], str] = field(default_factory=dict)

    def expert(self, index: int) -> tuple[WeightSlice, WeightSlice, WeightSlice]:
        """gate [inter, hidden], up [inter, hidden], down [hidden, inter] of one expert."""
        if self.single:
            gate, up, down = (WeightSlice(self.single[projection, index]) for projection in PROJECTIONS)
            return gate, up, down
        inter = self.spec.inter
        gate_up, down = self.fused["gate_up_proj"], self.fused["down_proj"]
        return (
            WeightSlice(gate_up, (index, slice(0, inter))),
            WeightSlice(gate_up, (index, slice(inter, 2 * inter))),
            WeightSlice(down, (index,)),
        )

    def expected_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape that the file must have, by checkpoint key."""
        spec = self.spec
        if self.fused:
            shapes = {"gate_up_proj": spec.gate_up_shape, "down_proj": spec.down_shape}
            return {key: shapes[parameter] for parameter, key in self.fused.items()}
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
                    remedy="config.json and weights must come from the same model",
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
                remedy="the checkpoint is incomplete or belongs to another model; download it again",
            )


class KeyMap:
    """transformers' renaming of checkpoint keys for one model.

    Args:
        model: the model as transformers builds it (meta device is enough), its experts modules still in place.
    """

    def __init__(self, model: nn.Module, specs: Mapping[str, ExpertsSpec]):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

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

    def target(self, key: str) -> tuple[str, str | None]:
        """The parameter that a checkpoint key feeds, and the converter pattern that matched (None: as it is)."""
        from transformers.core_model_loading import rename_source_key

        renamed, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, self._parameters)
        if renamed not in self._parameters and key in self._parameters:
            return key, None
        return renamed, pattern

    def plain_shape(self, key: str) -> tuple[int, ...] | None:
        """Shape the file must have for a key that feeds a non-expert parameter unchanged; None for all others."""
        target, pattern = self.target(key)
        if pattern is not None or target.rpartition(".")[0] in self._specs or target not in self._parameters:
            return None
        return tuple(self._parameters[target].shape)

    def layers(self, keys: Iterable[str], source: object) -> dict[str, LayerSource]:
        """Find the experts' tensors among the keys of a checkpoint.

        Keys of modules that the model does not have (extra prediction layers) are left out.

        Raises:
            FormatError: experts missing, twice, or too many.
            UnsupportedModel: the family stores experts in a way that needs more than slicing.
        """
        layers = {name: LayerSource(name, spec) for name, spec in self._specs.items()}
        for key in keys:
            target, pattern = self.target(key)
            module, _, parameter = target.rpartition(".")
            if module not in layers or parameter not in ("gate_up_proj", "down_proj"):
                continue
            if pattern is None:
                layers[module].fused[parameter] = key
            else:
                projection = self._projection(pattern, parameter, key)
                layers[module].single[projection, self._expert_index(pattern, key)] = key
        for layer in layers.values():
            layer.check_complete(source)
        return layers

    def _projection(self, pattern: str, parameter: str, key: str) -> str:
        """Which matrix a per-expert key holds: the converter stacks experts, then puts gate before up."""
        converter = self._by_pattern[pattern]
        steps = [type(op).__name__ for op in converter.operations]
        position = converter.source_patterns.index(pattern)
        if (
            parameter == "gate_up_proj"
            and steps == ["MergeModulelist", "Concatenate"]
            and len(converter.source_patterns) == 2
        ):
            return ("gate", "up")[position]
        if parameter == "down_proj" and steps == ["MergeModulelist"]:
            return "down"
        raise UnsupportedModel(
            f"checkpoint tensor {key}",
            expected="one tensor per expert and projection, or fused [experts, out, in]",
            found=f"a layout that transformers converts by {' + '.join(steps)}",
            remedy="this family is not supported yet",
        )

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
