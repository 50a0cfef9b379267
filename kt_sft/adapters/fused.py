"""PEFT's own layouts of LoRA on fused experts (`target_parameters`).

    <experts>(.base_layer).lora_A.weight  [experts * rank, x]   expert by expert
    <experts>(.base_layer).lora_B.weight  [y, rank * experts]   the expert varies fastest

`layout` says which of x and y is `in` and which `out`.
The wrapper of gate_up_proj lies inside that of down_proj, hence `.base_layer`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kt_sft.adapters import layout, peft_config
from kt_sft.adapters.model import INCOMPLETE, OTHER_MODEL, PARAMETERS, Adapter, BaseModel, Lora
from kt_sft.adapters.plain import LinearReader, linear_tensors, whole_tensors
from kt_sft.adapters.tensor_file import PREFIX, TensorFile
from kt_sft.errors import FormatError, UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor

_TAKEN = {"F32", "BF16", "F16"}  # element types that PEFT keeps right whichever way it loads them
RELEASES = {"peft-0.18": "0.18.1", "peft-0.19": "0.19.1"}


@dataclass(frozen=True)
class _Stored:
    """Where one fused parameter's factors are."""

    stem: str  # without A.weight or B.weight
    rank: int
    scale: float


def read(
    folder: Path, tensors: TensorFile, config: Mapping[str, Any], beside: Mapping[str, Any], base: BaseModel
) -> Adapter:
    """Open an adapter of PEFT's layout, of any release.

    Args:
        beside: values of kt_sft.json.
    Raises:
        FormatError: tensors missing, of another shape, of no target of the model, or in a layout that cannot be told.
    """
    stored: dict[str, _Stored] = {}
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    known: set[str] = set()
    for module in base.specs:
        mine = peft_config.named_parameters(config, module)
        for depth, parameter in enumerate(reversed(mine)):
            rank = peft_config.rank_of(config, parameter)
            entry = _Stored(
                f"{module}{'.base_layer' * depth}.lora_", rank, peft_config.scale_of(config, parameter, rank)
            )
            stored[parameter] = entry
            known |= {f"{entry.stem}A.weight", f"{entry.stem}B.weight"}
            for projection in _projections(parameter):
                ranks[f"{module}.{projection}"] = rank
                scales[f"{module}.{projection}"] = entry.scale
    linear = LinearReader(tensors, config, base, known)
    whole = linear.whole()
    widths = {name: _widths(tensors, entry, name, base) for name, entry in stored.items()}
    name_of_layout, swapped = layout.decide(widths, base.specs, base.model_type, config, beside, tensors.path)
    for name, found in widths.items():
        out, into = layout.matrix_shape(base.specs[name.rpartition(".")[0]], name)
        expected = (out, into) if swapped[name] else (into, out)
        if found != expected:
            what = f"{stored[name].stem}A.weight and B.weight: widths"
            raise FormatError(tensors.path, what, expected=expected, found=found, remedy=OTHER_MODEL)

    def experts(module: str) -> dict[str, Lora]:
        loras: dict[str, Lora] = {}
        for parameter in PARAMETERS:
            name = f"{module}.{parameter}"
            if name in stored:
                loras |= _unfused(tensors, stored[name], name, base, swapped[name])
        return loras

    form = "peft-0.19" if name_of_layout == layout.NEW else "peft-0.18"
    is_plain = not linear.has_other_names and tensors.dtypes() <= _TAKEN
    as_is = [form for form in RELEASES if is_plain and _has_layout(form, swapped, base)]
    return Adapter(
        folder, form, base, config, ranks | linear.ranks, scales | linear.scales, linear, experts, whole=whole,
        extras=linear.extras, as_is=tuple(as_is),
    )  # fmt: skip


def _has_layout(form: str, swapped: Mapping[str, bool], base: BaseModel) -> bool:
    """Whether a release reads the experts' factors the right way round."""
    specs = {name: base.specs[name.rpartition(".")[0]] for name in swapped}
    return all(swapped[name] == layout.exchanges(form, spec, base.model_type) for name, spec in specs.items())


def _projections(parameter: str) -> tuple[str, ...]:
    return ("down",) if parameter.endswith(".down_proj") else ("gate", "up")


def _widths(tensors: TensorFile, entry: _Stored, name: str, base: BaseModel) -> tuple[int, int]:
    """Columns of lora_A and rows of lora_B, after a check of the stacked axes."""
    stacked = base.specs[name.rpartition(".")[0]].num_experts * entry.rank
    found = []
    for role, axis in (("A", 0), ("B", 1)):
        key = f"{entry.stem}{role}.weight"
        if key not in tensors:
            raise FormatError(tensors.path, f"tensor {key}", expected="present", found="missing", remedy=INCOMPLETE)
        shape = tensors.shape(key)
        if len(shape) != 2 or shape[axis] != stacked:
            expected = f"{stacked} (experts times rank) along axis {axis}"
            raise FormatError(tensors.path, f"tensor {key}", expected=expected, found=list(shape), remedy=OTHER_MODEL)
        found.append(shape[1 - axis])
    return found[0], found[1]


def _unfused(tensors: TensorFile, entry: _Stored, name: str, base: BaseModel, swapped: bool) -> dict[str, Lora]:
    module, _, parameter = name.rpartition(".")
    spec = base.specs[module]
    lora_a = tensors.read(f"{entry.stem}A.weight").unflatten(0, (spec.num_experts, -1))  # [experts, rank, x]
    lora_b = tensors.read(f"{entry.stem}B.weight").unflatten(1, (-1, spec.num_experts)).permute(2, 0, 1)
    a, b = (lora_b.mT, lora_a.mT) if swapped else (lora_a, lora_b)  # [experts, rank, in], [experts, out, rank]
    if parameter == "down_proj":
        return {"down": Lora(a, b, entry.scale)}
    return {
        "gate": Lora(a, b[:, spec.gate_rows], entry.scale),
        "up": Lora(a, b[:, spec.up_rows], entry.scale),
    }


def write(
    adapter: Adapter, form: str, *, is_uniform: bool = False
) -> tuple[dict[str, Any], Iterator[tuple[str, Tensor]]]:
    """adapter_config.json and the tensors of PEFT's layout.

    gate and up share one factor a there. Where theirs differ, both are kept: at twice the rank, which is exact.

    Args:
        is_uniform: one rank and one scale for all, for readers that know no patterns.
    Raises:
        UnsupportedModel: PEFT 0.19 does not know that the family's parameters are transposed.
    """
    base = adapter.base
    if form == "peft-0.19" and base.model_type.startswith("llama4") and adapter.experts:
        raise UnsupportedModel(
            f"--to {form}", expected="a family whose experts PEFT reads the right way round", found=base.model_type
        )
    others = (*adapter.linears, *adapter.bare)
    ranks, scales = ({name: values[name] for name in others} for values in (adapter.ranks, adapter.scales))
    for extra in adapter.extras:
        if extra.kind == "embedding":
            name = extra.parameter.removesuffix(".weight")
            ranks[name] = peft_config.rank_of(adapter.config, name)
            scales[name] = peft_config.scale_of(adapter.config, name, ranks[name])
    for module in adapter.experts:
        loras = adapter.read_experts(module)
        if "gate" in loras or "up" in loras:
            fused = _fused_gate_up(loras, base, module, only_sizes=True)
            ranks[f"{module}.gate_up_proj"], scales[f"{module}.gate_up_proj"] = fused
        if "down" in loras:
            ranks[f"{module}.down_proj"], scales[f"{module}.down_proj"] = loras["down"].rank, loras["down"].scale
    _level(ranks)
    if is_uniform:
        ranks = dict.fromkeys(ranks, max(ranks.values()))
        scales = dict.fromkeys(scales, peft_config.uniform(adapter)[1])
    config = peft_config.fused_config(adapter, ranks, scales, RELEASES[form])
    return config, _tensors(adapter, form, ranks, scales)


def _level(ranks: dict[str, int]) -> None:
    """One rank for each parameter name over the layers: layers of lower rank are padded with zeros."""
    for parameter in PARAMETERS:
        names = [name for name in ranks if name.endswith(f".experts.{parameter}")]
        for name in names:
            ranks[name] = max(ranks[other] for other in names)


def _tensors(
    adapter: Adapter, form: str, ranks: Mapping[str, int], scales: Mapping[str, float]
) -> Iterator[tuple[str, Tensor]]:
    for module in adapter.experts:
        loras, spec = adapter.read_experts(module), adapter.base.specs[module]
        fused: dict[str, Lora] = {}
        if "gate" in loras or "up" in loras:
            fused["gate_up_proj"] = _fused_gate_up(loras, adapter.base, module)
        if "down" in loras:
            fused["down_proj"] = loras["down"]
        swaps = layout.exchanges(form, spec, adapter.base.model_type)
        for depth, parameter in enumerate(reversed(fused)):
            target = f"{module}.{parameter}"
            lora = fused[parameter].fitted(ranks[target], scales[target])
            a, b = (lora.b.mT, lora.a.mT) if swaps else (lora.a, lora.b)
            stem = f"{PREFIX}{module}{'.base_layer' * depth}.lora_"
            yield f"{stem}A.weight", a.flatten(0, 1)
            yield f"{stem}B.weight", b.permute(1, 2, 0).flatten(1)
    yield from linear_tensors(adapter, ranks, scales)
    yield from whole_tensors(adapter)


def _fused_gate_up(loras: dict[str, Lora], base: BaseModel, module: str, *, only_sizes: bool = False) -> Any:
    """One product that makes gate's and up's rows; with `only_sizes` its rank and scale."""
    import torch

    spec = base.specs[module]
    gate, up = loras.get("gate"), loras.get("up")
    one = gate or up
    assert one is not None
    scale = one.scale
    is_shared = gate is None or up is None or (gate.scale == up.scale and _same(gate.a, up.a))
    if only_sizes:
        return (one.rank if is_shared or gate is None or up is None else gate.rank + up.rank), scale
    if is_shared:
        a, rank = one.a, one.rank
    else:
        assert gate is not None and up is not None
        up = up.fitted(up.rank, scale)
        a, rank = torch.cat([gate.a, up.a.to(gate.a.dtype)], dim=1), gate.rank + up.rank
    b = one.b.new_zeros(spec.num_experts, 2 * spec.inter, rank)
    if gate is not None:
        b[:, spec.gate_rows, : gate.rank] = gate.b
    if up is not None:
        b[:, spec.up_rows, rank - up.rank :] = up.b.to(b.dtype)
    return Lora(a, b, scale)


def _same(one: Tensor, other: Tensor) -> bool:
    import torch

    return one.shape == other.shape and (one.data_ptr() == other.data_ptr() or torch.equal(one, other))
