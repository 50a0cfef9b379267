"""The routed experts as one differentiable operation: forward keeps a tape, backward spends it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Order of the LoRA tensors in this file: a [num_experts, rank, in] and b [num_experts, rank, out] of gate, up, down.
# up_a and up_b None with gate_b [num_experts, rank, 2 * inter]: gate and up share a (PEFT's fused gate_up_proj).
LoraTensors = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
NO_LORA: LoraTensors = (None,) * 6


@dataclass
class MoeCall:
    """What one call needs beside the tensors that autograd sees.

    Args:
        layer: `kt_sft._native.MoeLayer`.
        rows: `bf16` or, with quantised weights, `int8` (activations rounded to integers row by row) or `bfp16` (up to
            four rows per expert in block floating point). Gradients pass straight through that rounding and are those
            of the stored weights.
        scales: LoRA scale of gate, up and down (PEFT's own entries, never alpha / rank computed again).
        operands: f32 CPU copies of the LoRA tensors, contiguous along the last axis, in `LoraTensors` order;
            None: made here.
        dropout: probability of the inverted dropout on the input of the LoRA branches; 0 turns it off.
        seed: of the dropout masks.
        chunk_size: tokens per native pass.
        retain: keep gate and up products for backward; False computes them again.
        after_backward: called once the gradients are there.
    """

    layer: object
    rows: str = "bf16"
    scales: tuple[float, float, float] = (1.0, 1.0, 1.0)
    operands: LoraTensors | None = None
    dropout: float = 0.0
    seed: int = 0
    chunk_size: int = 1024
    retain: bool = True
    after_backward: Callable[[], None] | None = None
    _lora: tuple | None = field(default=None, repr=False)

    def native_lora(self, lora: LoraTensors) -> tuple:
        """((a, b, scale) or None) of gate, up and down in the form that the extension takes."""
        if self._lora is None:
            tensors = self.operands if self.operands is not None else tuple(to_operand(t) for t in lora)
            gate, up, down = split_projections(tensors, self.layer.inter)
            self._lora = tuple(
                None if a is None else (a, b, scale)
                for (a, b), scale in zip((gate, up, down), self.scales, strict=True)
            )
        return self._lora

    def options(self) -> dict[str, object]:
        """What forward and backward of one call must agree in."""
        return {
            "dropout_p": self.dropout,
            "dropout_seed": self.seed,
            "chunk_size": self.chunk_size,
            "rows": self.rows,
        }


def to_operand(tensor: Tensor | None) -> Tensor | None:
    """f32 CPU copy of a LoRA factor, contiguous."""
    return None if tensor is None else tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def split_projections(lora: LoraTensors, inter: int) -> tuple[tuple, tuple, tuple]:
    """(a, b) of gate, up and down; views of the fused tensors where gate and up share a."""
    gate_a, gate_b, up_a, up_b, down_a, down_b = lora
    if gate_b is not None and up_b is None and gate_b.shape[-1] == 2 * inter:
        return (gate_a, gate_b[..., :inter]), (gate_a, gate_b[..., inter:]), (down_a, down_b)
    return (gate_a, gate_b), (up_a, up_b), (down_a, down_b)


def moe(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, lora: LoraTensors, call: MoeCall) -> Tensor:
    """Weighted sum of the chosen experts for every token.

    Args:
        x: hidden states `[tokens, hidden]`, bf16, f16 or f32; rounded to bf16.
        topk_ids: expert of each (token, slot), int64 `[tokens, k]`; an id >= num_experts skips its slot.
        topk_weights: router weights `[tokens, k]`.
        lora: LoRA factors, or `NO_LORA`.
    Returns:
        `[tokens, hidden]` in x's dtype and device; sums in f32, rounded once.
    Raises:
        ValueError: a shape, dtype or id does not fit the layer.
    """
    wants_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, topk_weights, *lora))
    if wants_grad:
        return _Moe.apply(x, topk_ids, topk_weights, *lora, call)
    return _run_forward(_inputs(x, topk_ids, topk_weights), lora, call, tape=(None, None), like=x)


def _inputs(x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """CPU copies in the extension's dtypes, the very tensors where nothing has to change."""
    return (
        x.detach().to("cpu", torch.bfloat16).contiguous(),  # [tokens, hidden]
        topk_ids.detach().to("cpu", torch.int64).contiguous(),  # [tokens, k]
        topk_weights.detach().to("cpu", torch.float32).contiguous(),  # [tokens, k]
    )


def _result(tokens: int, hidden: int, like: Tensor) -> tuple[Tensor, str]:
    """Uninitialised output of the extension for a result of dtype `like.dtype`, with its dtype name."""
    name = "bf16" if like.dtype == torch.bfloat16 else "f32"
    return _empty((tokens, hidden), torch.bfloat16 if name == "bf16" else torch.float32), name


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """On the CPU whatever the default device is."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def _run_forward(inputs: tuple, lora: LoraTensors, call: MoeCall, *, tape: tuple, like: Tensor) -> Tensor:
    x, ids, weights = inputs
    out, out_dtype = _result(x.shape[0], x.shape[1], like)
    g, u = tape
    call.layer.forward(
        x, ids, weights, lora=call.native_lora(lora), g=g, u=u, out=out, out_dtype=out_dtype, **call.options(),
    )  # fmt: skip
    return out.to(like.device, like.dtype)


class _Moe(torch.autograd.Function):
    """The tape is (x, topk_ids, topk_weights, g, u): torch tensors, which checkpointing and offload hooks can drop."""

    @staticmethod
    def forward(ctx, x, topk_ids, topk_weights, gate_a, gate_b, up_a, up_b, down_a, down_b, call):
        lora = (gate_a, gate_b, up_a, up_b, down_a, down_b)
        inputs = _inputs(x, topk_ids, topk_weights)
        tape = (None, None)
        if call.retain:
            rows = topk_ids.numel()
            tape = tuple(_empty((rows, call.layer.inter_stride), torch.float16) for _ in range(2))
        out = _run_forward(inputs, lora, call, tape=tape, like=x)
        ctx.save_for_backward(*inputs, *tape)
        ctx.call = call
        ctx.x_like = (x.device, x.dtype)
        ctx.weights_like = (topk_weights.device, topk_weights.dtype)
        ctx.lora_like = tuple(None if t is None else (t.device, t.dtype, t.shape) for t in lora)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, ids, weights, g, u = ctx.saved_tensors
        call: MoeCall = ctx.call
        needs_x, _, needs_weights, *needs_lora = ctx.needs_input_grad[:9]
        like = _empty((0,), ctx.x_like[1])
        dx, dx_dtype = _result(x.shape[0], x.shape[1], like)
        dweights = _empty(weights.shape, torch.float32) if needs_weights else None
        dlora = tuple(
            _empty(spec[2], torch.float32) if needed else None
            for spec, needed in zip(ctx.lora_like, needs_lora, strict=True)
        )
        lora = call.native_lora(NO_LORA)
        call.layer.backward(
            dout.detach().to("cpu", torch.bfloat16).contiguous(), x, ids, weights, lora=lora, g=g, u=u,
            dx=dx if needs_x else None, dx_dtype=dx_dtype, dtopk_weights=dweights,
            lora_grads=_native_grads(dlora, lora, call.layer.inter), **call.options(),
        )  # fmt: skip
        if call.after_backward is not None:
            call.after_backward()
        grads_lora = tuple(
            None if grad is None else grad.to(spec[0], spec[1]) for grad, spec in zip(dlora, ctx.lora_like, strict=True)
        )
        return (
            dx.to(*ctx.x_like) if needs_x else None,
            None,
            dweights.to(*ctx.weights_like) if needs_weights else None,
            *grads_lora,
            None,
        )


def _native_grads(dlora: LoraTensors, lora: tuple, inter: int) -> tuple:
    """((da, db) or None) of gate, up and down; the shared a of a fused pair is written once, through gate."""
    gate, up, down = split_projections(dlora, inter)
    if up[0] is not None and up[0] is gate[0]:
        up = (None, up[1])
    return tuple(None if present is None else pair for present, pair in zip(lora, (gate, up, down), strict=True))
