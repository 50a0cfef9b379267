"""The maths of the native kernels in plain torch, for any dtype: documentation, and the truth of the tests."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def routed_experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    lora: dict[str, tuple[Tensor, Tensor, float]] | None = None,
    masks: dict[str, Tensor] | None = None,
    rounding: bool = False,
) -> Tensor:
    """Weighted sum of the chosen experts for every token, `[tokens, hidden]` in x's dtype.

    Args:
        x: `[tokens, hidden]`.
        topk_ids: `[tokens, k]`; ids >= num_experts are skipped.
        topk_weights: `[tokens, k]`.
        gate, up: `[num_experts, inter, hidden]`; down: `[num_experts, hidden, inter]`.
        lora: name of a projection -> (a `[num_experts, rank, in]`, b `[num_experts, rank, out]`, scale).
        masks: "hidden" `[tokens, k, hidden]` and "inter" `[tokens, k, inter]`: kept elements times 1 / (1 - p), in front of the
            LoRA branches.
        rounding: round to bf16 where the kernels do (straight-through in backward), for a tight comparison.
    """
    num_experts = gate.shape[0]
    rounded = _round_bf16 if rounding else (lambda t: t)
    x = rounded(x)
    out = torch.zeros_like(x)
    for expert in range(num_experts):
        token, slot = torch.where(topk_ids == expert)
        if token.numel() == 0:
            continue
        rows = x[token]  # [m, hidden]

        def project(name: str, weight: Tensor, rows: Tensor, mask: Tensor | None, e: int = expert) -> Tensor:
            y = rows @ weight[e].T
            if lora is None or name not in lora:
                return y
            a, b, scale = lora[name]
            dropped = rows if mask is None else rows * mask
            return y + scale * (rounded(dropped @ rounded(a[e]).T) @ rounded(b[e]))

        mask_x = None if masks is None else masks["hidden"][token, slot]
        mask_h = None if masks is None else masks["inter"][token, slot]
        g = rounded(project("gate", gate, rows, mask_x))  # [m, inter]
        u = rounded(project("up", up, rows, mask_x))
        h = rounded(F.silu(g) * u)
        y = project("down", down, h, mask_h)  # [m, hidden]
        out = out.index_add(0, token, y * topk_weights[token, slot, None].to(y.dtype))
    return out


class _RoundBf16(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t):
        return t.to(torch.bfloat16).to(t.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad


def _round_bf16(t: Tensor) -> Tensor:
    return _RoundBf16.apply(t)
