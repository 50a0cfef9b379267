"""The quantisers of the kernels once more, in numpy: int8 by row, int4 by group, activations by row."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_F32 = np.float32


def int8_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Integers and scale of each row of the last axis, f32 arithmetic: max / 127, no less than 2^-126.

    A row that is not finite gives zeros and NaN, as the kernels give for activations.
    """
    v = values.numpy().astype(_F32)
    largest = np.abs(v).max(axis=-1, keepdims=True, initial=0.0)
    finite, zero = np.isfinite(largest), largest == 0
    with np.errstate(all="ignore"):
        tiny = largest < _F32(127.0 * 2.0**-126)
        inverse = np.where(tiny, _F32(2.0**126), _F32(127.0) / largest)
        scale = np.where(tiny, _F32(2.0**-126), largest / _F32(127.0))
        q = np.where(finite & ~zero, np.rint(v * np.where(zero, _F32(0.0), inverse)), _F32(0.0))
    scale = np.where(zero, _F32(0.0), np.where(finite, scale, _F32("nan")))
    return torch.from_numpy(q).double(), torch.from_numpy(scale).double()


def round_rows_to_int8(values: Tensor) -> Tensor:
    q, scale = int8_rows(values)
    return q * scale


def int4_groups(w: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Stored weights [n, k] and squared error of every group [n, groups], both in float64.

    The scale is the candidate of least squared error among the numbers of five significant bits between 3/32 and 5/32
    of the largest magnitude, of either sign.
    """
    n, k = w.shape
    groups = -(-k // group)
    v = np.zeros((n, groups * group), _F32)
    v[:, :k] = w.numpy()
    v = v.reshape(n, groups, group)
    largest = np.abs(v).max(-1, keepdims=True)
    step = 1 << 19
    first = ((largest * _F32(3 / 32)).view(np.uint32) + np.uint32(step - 1)) & np.uint32(~(step - 1) & 0xFFFFFFFF)
    best, stored = np.full((n, groups), np.inf), np.zeros(v.shape)
    for index in range(13):
        magnitude = (first + np.uint32(index * step)).view(_F32)
        usable = (magnitude <= largest * _F32(5 / 32)) & (largest > 0)
        for sign in (1.0, -1.0):
            scale = magnitude * _F32(sign)
            inverse = np.divide(_F32(1.0), scale, out=np.zeros_like(scale), where=usable)
            candidate = np.clip(np.rint(v * inverse), -8, 7) * scale.astype(np.float64)
            error = ((v - candidate) ** 2).sum(-1)
            better = (error < best) & usable[..., 0]
            best, stored = np.where(better, error, best), np.where(better[..., None], candidate, stored)
    best = np.where(np.isfinite(best), best, 0.0)
    return torch.from_numpy(stored.reshape(n, -1)[:, :k].copy()), torch.from_numpy(best)
