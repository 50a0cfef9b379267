"""Error bounds, computed from the number format and the number of roundings; docs/numerics.md derives them."""

from __future__ import annotations

from torch import Tensor

BF16_HALF_ULP = 2.0**-9  # largest relative error of one rounding to bf16
F32_EPS = 2.0**-24

# Roundings to bf16 between the inputs and a result, along its longest path (docs/numerics.md has the list).
ROUNDINGS = {"out": 4, "dweights": 4, "dx": 6, "d_a": 6, "d_b": 5}


def rel_l2(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want|| in float64; 0 for two zero tensors."""
    got, want = got.double(), want.double()
    scale = want.norm().item()
    error = (got - want).norm().item()
    return error / scale if scale > 0 else error


def rounding_bound(name: str) -> float:
    """Norm-wise bound against unrounded float64: one half ulp per rounding on the way."""
    key = name if name in ROUNDINGS else f"d_{name[-1]}"
    return ROUNDINGS[key] * BF16_HALF_ULP


def model_bound(terms: int) -> float:
    """Norm-wise bound against the float64 model with the same rounding points.

    What is left are f32 sums of `terms` products, and the values that such an error pushes over a rounding boundary:
    a share of about terms * 2^-24 / 2^-9 of all values moves by one ulp, 2^-8, which in the L2 norm weighs
    2^-8 * sqrt(share).
    """
    share = min(1.0, terms * F32_EPS / BF16_HALF_ULP)
    return 4 * (terms * F32_EPS + 2 * BF16_HALF_ULP * share**0.5)
