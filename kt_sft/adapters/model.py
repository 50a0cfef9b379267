"""The form in which adapters of all kinds are in memory, and what conversion has to know of the base model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kt_sft.models.expert_keys import PROJECTIONS, LayerSource

if TYPE_CHECKING:
    from torch import Tensor

    from kt_sft.models.layout import ExpertsSpec

PARAMETERS = ("gate_up_proj", "down_proj")  # of an experts module, in the order in which PEFT nests its wrappers
OTHER_MODEL = "take the model that it was trained on (kt-sft adapter: --base-model, kt-sft merge: --model)"
INCOMPLETE = f"copy the whole adapter again, or {OTHER_MODEL}"


@dataclass(frozen=True)
class Lora:
    """W + scale * b a, of one matrix or of those of all experts.

    Args:
        a: `[rank, in]` or `[experts, rank, in]`.
        b: `[out, rank]` or `[experts, out, rank]`.
    """

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Of each matrix."""
        return self.a.shape[-2]

    def delta(self, expert: int | None = None) -> Tensor:
        """What is added to the matrix, or to that of one expert, f32 `[out, in]`: the one place with this product."""
        a, b = (self.a, self.b) if expert is None else (self.a[expert], self.b[expert])
        return self.scale * (b.float() @ a.float())

    def fitted(self, rank: int, scale: float) -> Lora:
        """The same product at a rank that is no lower, padded with zeros, and at another scale, which goes into b."""
        import torch

        a, b, extra = self.a, self.b, rank - self.rank
        if extra:
            a = torch.cat([a, a.new_zeros(*a.shape[:-2], extra, a.shape[-1])], dim=-2)
            b = torch.cat([b, b.new_zeros(*b.shape[:-1], extra)], dim=-1)
        if scale != self.scale:
            b = b.float() * (self.scale / scale)
        return Lora(a, b, scale)


@dataclass(frozen=True)
class BaseModel:
    """The model that an adapter belongs to, without its weights.

    Args:
        path: directory or name, as the adapter is to state it; None if unknown.
        config: values of config.json.
        specs: routed experts by module name, in layer order.
        layers: where checkpoints keep the experts of each module.
        linears: all `nn.Linear` by module name, `(out, in)`.
        hub_names: what checkpoints call a Linear, where that is not its module name.
        parameters: shapes by name, buffers that are saved included, tied ones under each of theirs.
        bare: matrices that are no weight of a Linear, as most routers', by parameter name, `(out, in)`.
        routers: names of the Linear layers that are routers.
        tied: parameters that the config makes one matrix: target (the head) -> source (the embedding).
        may_grow: its vocabulary may still become another one; then nothing but pairs of LoRA is compared with it.
    """

    path: str | None
    model_type: str
    config: Mapping[str, Any]
    specs: Mapping[str, ExpertsSpec]
    layers: Mapping[str, LayerSource]
    linears: Mapping[str, tuple[int, int]]
    hub_names: Mapping[str, str]
    parameters: Mapping[str, tuple[int, ...]]
    bare: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    routers: frozenset[str] = frozenset()
    tied: Mapping[str, str] = field(default_factory=dict)
    may_grow: bool = False

    def target_names(self) -> set[str]:
        """What the targets of an adapter are compared with: names of modules and parameters, the experts' as well."""
        parameters = {*self.parameters, *self.bare, *(f"{m}.{p}" for m in self.specs for p in PARAMETERS)}
        keys = {key for layer in self.layers.values() for key in layer.single.values()}
        modules = {name.rpartition(".")[0] for name in parameters | keys}
        return parameters | modules | {*self.linears, *self.specs, *self.hub_names.values()}

    def expert_shape(self, module: str, projection: str) -> tuple[int, int]:
        """`(out, in)` of gate, up or down of one expert."""
        spec = self.specs[module]
        return (spec.hidden, spec.inter) if projection == "down" else (spec.inter, spec.hidden)


@dataclass(frozen=True)
class Extra:
    """Something that an adapter holds beside pairs of LoRA and whole parameters.

    Args:
        kind: a key of `kinds.KINDS`.
        parameter: of the model, that it changes.
        tensors: as PEFT stores them, by name without its prefix.
        apply: what it makes of the parameter, once what comes before it has been applied; f32 or f64 -> the same.
    """

    kind: str
    parameter: str
    tensors: Mapping[str, Callable[[], Tensor]]
    apply: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Adapter:
    """An opened adapter: names and shapes are checked, tensors are read as they are asked for.

    Args:
        source: file or directory.
        form: its name in `forms.FORMS`.
        config: values of adapter_config.json; of a GGUF file those that follow from it.
        beside: values of kt_sft.json, which PEFT does not know.
        ranks: rank by target: Linear, parameter of `base.bare`, or `<experts module>.<projection>`.
        scales: likewise.
        read_linear: by name of a Linear or of a parameter of `base.bare`.
        read_experts: by module name: gate, up and down where the adapter has them; several experts per tensor.
        whole: tensors that are trained as a whole (modules_to_save) or stored along, by parameter name.
        extras: whatever else there is.
        as_is: forms of PEFT whose releases read the files as they are.
    """

    source: Path
    form: str
    base: BaseModel
    config: Mapping[str, Any]
    ranks: Mapping[str, int]
    scales: Mapping[str, float]
    read_linear: Callable[[str], Lora]
    read_experts: Callable[[str], dict[str, Lora]]
    beside: Mapping[str, Any] = field(default_factory=dict)
    whole: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    extras: tuple[Extra, ...] = ()
    as_is: tuple[str, ...] = ()

    @property
    def linears(self) -> list[str]:
        """Module names, in model order."""
        return [name for name in self.base.linears if name in self.ranks]

    @property
    def bare(self) -> list[str]:
        """Parameters of `base.bare`, in model order."""
        return [name for name in self.base.bare if name in self.ranks]

    def projections(self, module: str) -> tuple[str, ...]:
        """Which of gate, up and down of an experts module the adapter has."""
        return tuple(p for p in PROJECTIONS if f"{module}.{p}" in self.ranks)

    @property
    def experts(self) -> list[str]:
        """Experts modules, in layer order."""
        return [name for name in self.base.specs if self.projections(name)]
