"""Whether the memory of a tensor is there."""

from __future__ import annotations

import torch
from torch import Tensor


def check_storage(tensor: Tensor, name: str) -> None:
    """Before torch reads a tensor: it does so, too, where a storage was resized since.

    Raises:
        ValueError: the tensor's memory was released, or ends before its last element.
    """
    if not tensor.is_cpu or tensor.layout is not torch.strided:
        return
    num_bytes, size = tensor.untyped_storage().nbytes(), tensor.itemsize
    if num_bytes >= tensor.nbytes + tensor.storage_offset() * size and tensor.is_contiguous():
        return  # the usual one, in a fifth of the time
    if tensor.is_nested or tensor.numel() == 0:
        return
    steps = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed_bytes = (tensor.storage_offset() + steps + 1) * size
    if num_bytes < needed_bytes:
        raise ValueError(
            f"{name}: expected {needed_bytes} bytes of memory for {tensor.dtype} {list(tensor.shape)}, "
            f"found {num_bytes}; it was released or resized, gather the tensor before the call"
        )
