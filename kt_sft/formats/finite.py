"""Whether numbers are finite, in one pass and without a copy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from kt_sft.errors import NonFinite

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def is_finite(tensor: Tensor, kind: torch.dtype | None = None, *, steps: int = 1) -> bool:
    """Whether no element is NaN or infinite, as it is or once it, divided by `steps`, is rounded to another type."""
    import torch

    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.element_size() == 1:
        tensor = tensor.float()
    ends = torch.stack(torch.aminmax(tensor))  # NaN comes through
    return bool((ends / steps).to(kind or ends.dtype).isfinite().all())


def check_finite(gate: Tensor, up: Tensor, down: Tensor) -> None:
    """Raise where a matrix `[rows, cols]` of an expert has NaN or infinity in it; uint8 blocks are left alone.

    Raises:
        NonFinite: names the first such number.
    """
    import torch

    for projection, weight in enumerate((gate, up, down)):
        # A sum carries NaN and infinity, and is twenty times as fast as asking each number; it may overflow, too.
        if not weight.is_floating_point() or math.isfinite(weight.sum().item()):
            continue
        places = torch.isfinite(weight).logical_not_().nonzero()
        if len(places):
            row, column = places[0].tolist()
            raise NonFinite(projection, f"{weight[row, column].item()} at row {row}, column {column}")
