"""Whether numbers are finite, in one pass and without a copy."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
