"""The routed experts as one differentiable operation: forward keeps a tape, backward spends it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kt_sft.native import native
from kt_sft.ops.cpu_copy import cpu_copy

_NO_TAPE = (None, None, None, None)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_HUGE_BYTES = 4 << 20  # two huge pages, of which one is whole wherever it begins

# Order of the LoRA tensors in this file: a [num_experts, rank, in] and b [num_experts, rank, out] of gate, up, down.
# up_a and up_b None with gate_b [num_experts, rank, 2 * inter]: gate and up share a (PEFT's fused gate_up_proj).
LoraTensors = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
NO_LORA: LoraTensors = (None,) * 6
# (a, b, scale) of gate, up and down as the extension takes them; None: no LoRA there.
Projection = tuple[Tensor, Tensor, float] | None
Projections = tuple[Projection, Projection, Projection]


@dataclass
class MoeCall:
    """What one call needs beside the tensors that autograd sees.

    Args:
        layer: `kt_sft._native.MoeLayer`.
        rows: `bf16` or, with quantised weights, `int8` (activations rounded to integers row by row) or `bfp16` (up to
            four rows per expert in block floating point). Gradients pass straight through that rounding and are those
            of the stored weights.
        scales: LoRA scale of gate, up and down (PEFT's own entries, never alpha / rank computed again).
        projections: `native_projections` of the LoRA tensors and scales; None: made here.
        shared: their operands that are a parameter's own memory: to write one before backward is an error, as in torch.
        dropout: probability of the inverted dropout on the input of the LoRA branches; 0 turns it off.
        seed: of the dropout masks.
        chunk_size: tokens per native pass.
        retain: keep gate and up products for backward; False computes them again.
        after_backward: called once the gradients are there.
        bias: of gate and up `[num_experts, inter]` and of down `[num_experts, hidden]`, f32 on the CPU, contiguous.
    """

    layer: object
    rows: str = "bf16"
    scales: tuple[float, float, float] = (1.0, 1.0, 1.0)
    projections: Projections | None = None
    shared: tuple[Tensor, ...] = ()
    dropout: float = 0.0
    seed: int = 0
    chunk_size: int = 1024
    retain: bool = True
    after_backward: Callable[[], None] | None = None
    bias: tuple[Tensor, Tensor, Tensor] | None = None

    def native_lora(self, lora: LoraTensors) -> Projections:
        """The projections, made on first use; backward gets those of forward."""
        if self.projections is None:
            self.projections = native_projections(tuple(to_operand(t) for t in lora), self.scales, self.layer.inter)
        return self.projections

    def options(self) -> dict[str, object]:
        """What forward and backward of one call must agree in."""
        return {
            "dropout_p": self.dropout,
            "dropout_seed": self.seed,
            "chunk_size": self.chunk_size,
            "rows": self.rows,
            "bias": self.bias,
        }


def to_operand(tensor: Tensor | None) -> Tensor | None:
    """f32 CPU copy of a LoRA factor, contiguous."""
    return None if tensor is None else cpu_copy(tensor, torch.float32, "lora", copy=True)


def native_projections(operands: LoraTensors, scales: tuple[float, float, float], inter: int) -> Projections:
    """The operands and scales of gate, up and down."""
    pairs = split_projections(operands, inter)
    return tuple(None if a is None else (a, b, scale) for (a, b), scale in zip(pairs, scales, strict=True))


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
    return _run_forward(_inputs(x, topk_ids, topk_weights), lora, call, tape=_NO_TAPE, like=x)


def _inputs(x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """CPU copies in the extension's dtypes, the very tensors where nothing has to change."""
    return (
        _input(x, torch.bfloat16, "x"),  # [tokens, hidden]
        _input(topk_ids, torch.int64, "topk_ids"),  # [tokens, k]
        _input(topk_weights, torch.float32, "topk_weights"),  # [tokens, k]
    )


def _input(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    if tensor.dtype is dtype and tensor.is_cpu and not tensor.requires_grad and tensor.is_contiguous():
        return tensor  # each step below costs a microsecond even where it does nothing
    is_number = tensor.is_floating_point() if dtype.is_floating_point else tensor.dtype in INTEGERS
    if not is_number:
        kind = "floating point numbers" if dtype.is_floating_point else "integers"
        raise ValueError(f"{name}: expected {kind}, got {tensor.dtype}")
    return cpu_copy(tensor, dtype, name)


def _result(x: Tensor, like: Tensor) -> tuple[Tensor, str]:
    """Uninitialised output of the extension, shaped as its input x, for a result of dtype `like.dtype`; dtype name."""
    if like.dtype is torch.bfloat16:
        return torch.empty_like(x), "bf16"
    return torch.empty_like(x, dtype=torch.float32), "f32"


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """On the CPU whatever the default device is; large ones in huge pages, which cost less to touch and to find."""
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    if tensor.nbytes >= _HUGE_BYTES:
        native().advise_huge_pages(tensor)
    return tensor


def moe_into(out: Tensor, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, call: MoeCall) -> None:
    """`moe` without gradients into memory of the caller; may run in any thread.

    Args:
        out: bf16 or f32 `[tokens, hidden]`, on the CPU, contiguous; overwritten.
        x: bf16 `[tokens, hidden]`, on the CPU, contiguous.
        topk_ids: int64 `[tokens, k]`, likewise; an id >= num_experts skips its slot.
        topk_weights: f32 `[tokens, k]`, likewise.
        call: its `projections` are the LoRA, if any.
    """
    call.layer.forward(
        x, topk_ids, topk_weights, lora=call.native_lora(NO_LORA), g=None, u=None, xa=None, out=out,
        out_dtype="bf16" if out.dtype is torch.bfloat16 else "f32", **call.options(),
    )  # fmt: skip


def _run_forward(inputs: tuple, lora: LoraTensors, call: MoeCall, *, tape: tuple, like: Tensor) -> Tensor:
    x, ids, weights = inputs
    out, out_dtype = _result(x, like)
    g, u, *xa = tape
    call.layer.forward(
        x, ids, weights, lora=call.native_lora(lora), g=g, u=u, xa=tuple(xa), out=out, out_dtype=out_dtype,
        **call.options(),
    )  # fmt: skip
    return out if like.is_cpu and out.dtype is like.dtype else out.to(like.device, like.dtype)


def _tape(rows: int, call: MoeCall, lora: LoraTensors) -> tuple[Tensor | None, ...]:
    """g and u, f16, and x A^T of gate and of up, f32 `[rows, rank]`, where they have an A of their own."""
    gate, up, _ = call.native_lora(lora)
    g, u = (empty((rows, call.layer.inter_stride), torch.float16) for _ in range(2))
    own = (gate, None if gate is not None and up is not None and up[0] is gate[0] else up)
    return g, u, *(None if one is None else empty((rows, one[0].shape[1]), torch.float32) for one in own)


class _Moe(torch.autograd.Function):
    """The tape is (x, topk_ids, topk_weights, g, u, x A^T of gate and of up, shared operands): torch tensors, which
    checkpointing and offload hooks can drop."""

    @staticmethod
    def forward(ctx, x, topk_ids, topk_weights, gate_a, gate_b, up_a, up_b, down_a, down_b, call):
        lora = (gate_a, gate_b, up_a, up_b, down_a, down_b)
        inputs = _inputs(x, topk_ids, topk_weights)
        tape = _tape(topk_ids.numel(), call, lora) if call.retain else _NO_TAPE
        out = _run_forward(inputs, lora, call, tape=tape, like=x)
        ctx.save_for_backward(*inputs, *tape, *call.shared)
        ctx.call = call
        ctx.x_like = (x.device, x.dtype)
        ctx.weights_like = (topk_weights.device, topk_weights.dtype)
        ctx.lora_like = tuple(None if t is None else (t.device, t.dtype, t.shape, _is_expert_minor(t)) for t in lora)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, ids, weights, g, u, *xa = ctx.saved_tensors[: 3 + len(_NO_TAPE)]
        call: MoeCall = ctx.call
        needs_x, _, needs_weights, *needs_lora = ctx.needs_input_grad[:9]
        like = empty((0,), ctx.x_like[1])
        dx, dx_dtype = _result(x, like)
        dweights = empty(weights.shape, torch.float32) if needs_weights else None
        dlora = tuple(
            _empty_gradient(*spec[2:]) if needed else None
            for spec, needed in zip(ctx.lora_like, needs_lora, strict=True)
        )
        lora = call.native_lora(NO_LORA)
        call.layer.backward(
            cpu_copy(dout, torch.bfloat16, "dout"), x, ids, weights, lora=lora, g=g, u=u, xa=tuple(xa),
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


def _is_expert_minor(factor: Tensor) -> bool:
    """Whether experts are the fastest index of `[num_experts, rank, dim]`, as in PEFT's `[dim, rank * num_experts]`."""
    experts, rank, _ = factor.shape
    return factor.stride() == (1, experts, experts * rank)


def _empty_gradient(shape: tuple[int, ...], expert_minor: bool) -> Tensor:
    """f32 in the memory layout of the factor, so that autograd takes the gradient as it is."""
    experts, rank, dim = shape
    if expert_minor:
        return empty((dim, rank, experts), torch.float32).permute(2, 1, 0)
    return empty(shape, torch.float32)


def _native_grads(dlora: LoraTensors, lora: tuple, inter: int) -> tuple:
    """((da, db) or None) of gate, up and down; the shared a of a fused pair is written once, through gate."""
    gate, up, down = split_projections(dlora, inter)
    if up[0] is not None and up[0] is gate[0]:
        up = (None, up[1])
    return tuple(None if present is None else pair for present, pair in zip(lora, (gate, up, down), strict=True))
