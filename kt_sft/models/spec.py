"""Which modules of a model are routed experts, and whether these kernels can compute them.

Everything is read off the experts modules that transformers decorates with `use_experts_implementation`; only families
that deviate have a file of their own (`families.py`). A decorated module keeps `gate_up_proj`
[experts, 2 * inter, hidden] and `down_proj` [experts, hidden, inter] and says itself whether it has a gate, a bias or
transposed weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from kt_sft.errors import UnsupportedModel
from kt_sft.models.activations import ACTIVATIONS, activation_name
from kt_sft.models.families import family_of
from kt_sft.models.layout import ExpertsSpec

if TYPE_CHECKING:
    from torch import nn

_LATER = "this family is not supported yet"


def is_experts_module(module: nn.Module) -> bool:
    """Whether transformers' experts interface governs this module, or a file of ours describes it."""
    if family_of(module) is not None:
        return True
    if not all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed")):
        return False
    from kt_sft.compat.transformers import has_gate_function

    return has_gate_function(module)


def experts_spec(module: nn.Module, name: str) -> ExpertsSpec:
    """Read the spec off an experts module (on any device, meta included).

    Args:
        name: the module's path in the model, for messages.
    Raises:
        UnsupportedModel: not gated, bias, transposed weights, a gate of its own, another activation or layout.
    """
    from kt_sft.compat.transformers import has_plain_gate

    def refuse(what: str, expected: object, found: object) -> UnsupportedModel:
        return UnsupportedModel(
            f"{name} ({type(module).__name__}), {what}", expected=expected, found=found, remedy=_LATER
        )

    family = family_of(module)
    if family is not None:
        spec = family.experts_spec(module)
        if spec is None:
            raise refuse("gate", f"an activation among {', '.join(sorted(set(ACTIVATIONS.values())))}", "another one")
        return spec
    if not is_experts_module(module):
        raise refuse("experts module", "one of transformers' experts interface", "a module without its attributes")
    if not module.has_gate:
        raise refuse("experts", "gate and up projections", "no gate")
    if module.has_bias:
        raise refuse("expert weights", "no bias", "a bias")
    if module.is_transposed:
        raise refuse("expert weights", "[out, in]", "transposed [in, out]")
    if not has_plain_gate(module):
        raise refuse("gate", "act(gate) * up", "a gate function of its own")
    activation = activation_name(getattr(module, "act_fn", None))
    if activation is None:
        act_name = type(getattr(module, "act_fn", None)).__name__
        raise refuse("gate activation", " or ".join(sorted(set(ACTIVATIONS.values()))), act_name)

    shapes = {key: tuple(p.shape) for key, p in module.named_parameters()}
    shapes.update({key: tuple(b.shape) for key, b in module.named_buffers()})
    down = shapes.get("down_proj", ())
    expected = {"gate_up_proj": (down[0], 2 * down[2], down[1]), "down_proj": down} if len(down) == 3 else {}
    if not expected or shapes != expected:
        layout = "gate_up_proj [experts, 2 inter, hidden] and down_proj [experts, hidden, inter] only"
        raise refuse("expert weights", layout, shapes)
    return ExpertsSpec(num_experts=down[0], hidden=down[1], inter=down[2], activation=activation)


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
    return {name: replace(spec, has_router_scale=_has_router_scale(model, name)) for name, spec in specs.items()}


def _has_router_scale(model: nn.Module, name: str) -> bool:
    """Whether a module beside the experts has a `per_expert_scale` of its own."""
    return any(hasattr(child, "per_expert_scale") for child in model.get_submodule(name.rpartition(".")[0]).children())


def iter_routed_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The `RoutedExperts` modules of a loaded model with their names, in layer order.

    Recognised by what they can do, since this leaf may not import `kt_sft.nn`.
    """
    for name, module in model.named_modules():
        if all(hasattr(type(module), method) for method in ("load_expert", "unpack_expert", "packed_bytes")):
            yield name, module
