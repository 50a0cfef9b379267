"""Which modules of a model are routed experts, and whether these kernels can compute them.

Everything is read off the experts modules that transformers decorates with `use_experts_implementation`; no model
family is listed. A decorated module keeps `gate_up_proj` [experts, 2 * inter, hidden] and `down_proj`
[experts, hidden, inter] and says itself whether it has a gate, a bias or transposed weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kt_sft.errors import UnsupportedModel

if TYPE_CHECKING:
    from torch import nn

# Gate activations that the kernels have: class name of transformers' or torch's module -> kernel name.
ACTIVATIONS = {"SiLU": "silu", "SiLUActivation": "silu"}
_LATER = "this family is not supported yet"


@dataclass(frozen=True)
class ExpertsSpec:
    """Shape and gate activation of one layer's routed experts."""

    num_experts: int
    hidden: int
    inter: int
    activation: str = "silu"

    @property
    def gate_up_shape(self) -> tuple[int, int, int]:
        """Fused gate (first) and up weights, `[num_experts, 2 * inter, hidden]`."""
        return (self.num_experts, 2 * self.inter, self.hidden)

    @property
    def down_shape(self) -> tuple[int, int, int]:
        """Down weights, `[num_experts, hidden, inter]`."""
        return (self.num_experts, self.hidden, self.inter)

    @property
    def expert_bytes(self) -> int:
        """One expert's weights in bf16."""
        return 2 * 3 * self.hidden * self.inter


def is_experts_module(module: nn.Module) -> bool:
    """Whether transformers' experts interface governs this module."""
    return all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate"))


def experts_spec(module: nn.Module, name: str) -> ExpertsSpec:
    """Read the spec off an experts module (on any device, meta included).

    Args:
        name: the module's path in the model, for messages.
    Raises:
        UnsupportedModel: not gated, bias, transposed weights, a gate of its own, another activation or layout.
    """
    from transformers.integrations.moe import _default_apply_gate

    def refuse(what: str, expected: object, found: object) -> UnsupportedModel:
        return UnsupportedModel(
            f"{name} ({type(module).__name__}), {what}", expected=expected, found=found, remedy=_LATER
        )

    if not is_experts_module(module):
        raise refuse("experts module", "one of transformers' experts interface", "a module without its attributes")
    if not module.has_gate:
        raise refuse("experts", "gate and up projections", "no gate")
    if module.has_bias:
        raise refuse("expert weights", "no bias", "a bias")
    if module.is_transposed:
        raise refuse("expert weights", "[out, in]", "transposed [in, out]")
    if type(module)._apply_gate is not _default_apply_gate:
        raise refuse("gate", "act(gate) * up", "a gate function of its own")
    act_name = type(getattr(module, "act_fn", None)).__name__
    if act_name not in ACTIVATIONS:
        raise refuse("gate activation", " or ".join(sorted(set(ACTIVATIONS.values()))), act_name)

    shapes = {key: tuple(p.shape) for key, p in module.named_parameters()}
    shapes.update({key: tuple(b.shape) for key, b in module.named_buffers()})
    down = shapes.get("down_proj", ())
    expected = {"gate_up_proj": (down[0], 2 * down[2], down[1]), "down_proj": down} if len(down) == 3 else {}
    if not expected or shapes != expected:
        layout = "gate_up_proj [experts, 2 inter, hidden] and down_proj [experts, hidden, inter] only"
        raise refuse("expert weights", layout, shapes)
    return ExpertsSpec(num_experts=down[0], hidden=down[1], inter=down[2], activation=ACTIVATIONS[act_name])


def find_experts(model: nn.Module) -> dict[str, ExpertsSpec]:
    """Every routed-experts module of a model by name, in module order.

    Raises:
        UnsupportedModel: the model has none, or one that the kernels cannot compute.
    """
    specs = {name: experts_spec(module, name) for name, module in model.named_modules() if is_experts_module(module)}
    if not specs:
        model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise UnsupportedModel(
            f"model type {model_type!r}",
            expected="a mixture-of-experts model on transformers' experts interface",
            found="no routed experts",
            remedy="load it without kt_sft (LLaMA-Factory: use_kt: false)",
        )
    return specs


def iter_routed_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The `RoutedExperts` modules of a loaded model with their names, in layer order.

    Recognised by what they can do, since this leaf may not import `kt_sft.nn`.
    """
    for name, module in model.named_modules():
        if all(hasattr(type(module), method) for method in ("load_expert", "unpack_expert", "packed_bytes")):
            yield name, module
