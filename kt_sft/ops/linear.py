"""A frozen linear layer as one differentiable operation: the input gets a gradient, the packed weight none."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kt_sft.ops.cpu_copy import check_storage


def packed_linear(x: Tensor, layer: object, bias: Tensor | None = None, *, rows: str = "bf16") -> Tensor:
    """x W^T + bias.

    Args:
        x: bf16, f16 or f32 `[..., k]`; rounded to bf16.
        layer: `kt_sft._native.PackedLinear` of W `[n, k]`.
        bias: f32 `[n]` on the CPU, added to the f32 sums; it gets no gradient.
        rows: `bf16`, or `int8` with int8 weights: rows of x rounded to integers, straight through in backward.
    Returns:
        `[..., n]` in x's dtype and device; sums in f32, rounded once.
    Raises:
        ValueError: a shape or dtype does not fit the layer.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _Linear.apply(x, layer, bias, rows)
    return _forward(x, layer, bias, rows)


def _operand(x: Tensor, width: int, name: str) -> Tensor:
    """`[rows, width]` bf16 on the CPU, the very memory where nothing has to change."""
    if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] != width:
        raise ValueError(f"{name}: expected floating point [..., {width}], got {x.dtype} {list(x.shape)}")
    check_storage(x, name)
    flat = x.detach().to("cpu", torch.bfloat16).reshape(-1, width)
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def _result(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, str]:
    """Uninitialised output for a result of `dtype`, with its dtype name; on the CPU whatever the default device is."""
    is_bf16 = dtype == torch.bfloat16
    out = torch.empty((rows, width), dtype=torch.bfloat16 if is_bf16 else torch.float32, device="cpu")
    return out, "bf16" if is_bf16 else "f32"


def _forward(x: Tensor, layer: object, bias: Tensor | None, rows: str) -> Tensor:
    a = _operand(x, layer.k, "x")
    out, dtype = _result(a.shape[0], layer.n, x.dtype)
    layer.forward(a, out, dtype, rows, bias)
    return out.to(x.device, x.dtype).reshape(*x.shape[:-1], layer.n)


class _Linear(torch.autograd.Function):
    """Nothing is saved: the input gradient needs the weight only."""

    @staticmethod
    def forward(ctx, x, layer, bias, rows):
        ctx.layer = layer
        ctx.like = (x.device, x.dtype)
        return _forward(x, layer, bias, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        device, dtype = ctx.like
        a = _operand(dy, ctx.layer.n, "dy")
        dx, name = _result(a.shape[0], ctx.layer.k, dtype)
        ctx.layer.input_grad(a, dx, name)
        return dx.to(device, dtype).reshape(*dy.shape[:-1], ctx.layer.k), None, None, None
