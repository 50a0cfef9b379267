"""Gate activations that the kernels have, by the names that transformers and torch give them."""

from __future__ import annotations

# Class name of a module, or name of a function -> kernel name.
ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "silu": "silu",
    "GELUActivation": "gelu",
    "gelu": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "ReLU": "relu",
    "relu": "relu",
}


def activation_name(act_fn: object) -> str | None:
    """The kernels' name of a gate activation (module or function); None if they lack it."""
    if getattr(act_fn, "approximate", "none") == "tanh":  # torch's own nn.GELU
        return "gelu_tanh"
    if type(act_fn).__name__ == "GELU":
        return "gelu"
    return ACTIVATIONS.get(getattr(act_fn, "__name__", type(act_fn).__name__))
