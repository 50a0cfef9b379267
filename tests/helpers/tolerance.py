"""Error bounds, computed from the number format and the number of roundings; docs/numerics.md derives them."""

from __future__ import annotations

from torch import Tensor

from kt_sft.native import native

BF16_HALF_ULP = 2.0**-8  # largest relative error of one rounding to bf16; 1.66e-3 in the mean over many values
F32_EPS = 2.0**-24
INT8_ROW_ERROR = 2.0**-6  # more than the relative norm-wise error of a row of Gaussian values rounded to int8

# Roundings to bf16 between the inputs and a result, along its longest path (docs/numerics.md has the list).
ROUNDINGS = {"out": 1, "dweights": 1, "dx": 1, "d_a": 1, "d_b": 1}


def rel_l2(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want|| in float64; 0 for two zero tensors."""
    got, want = got.double(), want.double()
    scale = want.norm().item()
    error = (got - want).norm().item()
    return error / scale if scale > 0 else error


def rounds_scaled_gradients(weights: str) -> bool:
    """Whether the kernels in use round dy * scale in the input gradient: those with bf16 operands, for int8 weights."""
    return weights == "int8" and native().isa_active() in ("avx512_bf16", "amx_bf16", "amx_int8")


def rounding_bound(name: str, weights: str = "bf16") -> float:
    """Norm-wise bound against unrounded float64 on the stored weights: one half ulp per rounding on the way."""
    roundings = ROUNDINGS[name if name in ROUNDINGS else f"d_{name[-1]}"]
    return (roundings + (name != "out" and rounds_scaled_gradients(weights))) * BF16_HALF_ULP


def model_bound(name: str, terms: int, rows: str = "bf16", weights: str = "bf16") -> float:
    """Norm-wise bound against the float64 model with the same rounding points.

    What is left are f32 sums of `terms` products, and the values that such an error pushes over a rounding boundary.
    Errors of a sum are of either sign, about sqrt(terms) * 2^-24: a share of sqrt(terms) * 2^-24 / 2^-9 of all values
    moves by one ulp, 2^-7 at most and 2^-8 in the mean, which in the L2 norm weighs 2^-8 * sqrt(share); or one value,
    which may hold a sixteenth of the energy. When it is the largest of a row that becomes int8, the whole row is
    rounded anew. Between the inputs and the gradient of a routing weight only g and u are rounded, to f16: 2^-11.
    """
    share = min(1.0, terms**0.5 * F32_EPS / 2.0**-9)
    moved = 2.0**-8 if rows == "bf16" else 2.0**-8 + INT8_ROW_ERROR
    if name == "dweights":
        moved = 2.0**-11
    scaled = BF16_HALF_ULP if name != "out" and rounds_scaled_gradients(weights) else 0.0
    return 4 * terms * F32_EPS + max(4 * moved * share**0.5, moved / 4) + scaled
