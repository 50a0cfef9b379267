"""The routed experts as two differentiable operations: `submit` hands the inputs over, `join` gives the output.

Backward mirrors them: join's hands the output's gradient over, submit's gives the gradients of the inputs. What is
computed between the two, in either direction, runs beside the kernels where these have a device to wait for.
"""

# x: a token, w: router weight of its expert e, ': transposed, s: LoRA scale, m: dropout mask; docs/numerics.md rounds.
#   g = x Wg' + s (m x Ag') Bg' + bg      u: the same of up      h = act(g) u      y = h Wd' + s (m h Ad') Bd' + bd
#   out = sum over e of w y
#   dh = dout Wd + s m (dout Bd) Ad       dw = <dh, h> + <dout, bd>      dg, du = w dh by the derivatives of act(g) u
#   dx = sum over e of  dg Wg + s m (dg Bg) Ag  +  du Wu + s m (du Bu) Au
#   dB = s d' (m i A')  and  dA = s m (B' d') i  over the rows of e, of (d, i) = (dg, x), (du, x), (w dout, h)

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kt_sft.autograd.settings import (
    NO_FACTORS,
    NO_LORA,
    Biases,
    LoraOperands,
    LoraTensors,
    MoeSettings,
    empty,
    split_projections,
)
from kt_sft.schedule import task_queue
from kt_sft.schedule.deferred import Deferral, Parts
from kt_sft.schedule.task_queue import Result
from kt_sft.transfer.routes import Route, route_of

_NO_TAPE = (None, None, None, None)


class Ticket:
    """What `join` takes: a pass that was submitted, and what ties both operations together in autograd."""

    __slots__ = ("passed", "tie")

    def __init__(self, passed: _Pass, tie: Tensor | None):
        self.passed = passed
        self.tie = tie


def submit(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    layer: object,
    settings: MoeSettings,
    *,
    factors: LoraTensors = NO_FACTORS,
    lora: LoraOperands = NO_LORA,
    bias: Biases | None = None,
    seed: int = 0,
    route: Route | None = None,
    is_beside: bool = False,
    deferral: Deferral | None = None,
) -> Ticket:
    """Begin the weighted sum of the chosen experts for every token.

    Args:
        x: hidden states `[tokens, hidden]`, bf16, f16 or f32; rounded to bf16. Without gradients `[..., hidden]`.
        topk_ids: expert of each (token, slot), integers `[tokens, k]`; an id >= num_experts skips its slot.
        topk_weights: router weights `[tokens, k]`.
        layer: `kt_sft._native.MoeLayer`.
        factors: the parameters of `lora` as autograd sees them, for their gradients.
        seed: of the dropout masks.
        route: of the tensors; None: as they lie, not to be written before `join`.
        is_beside: tensors on the CPU, too, are computed beside the caller.
        deferral: leaves experts to the next layer; without gradients only.
    Raises:
        ValueError: tensors of the wrong kind; what else does not fit the layer is raised by `join`.
    """
    route = route or route_of(x)
    passed = _Pass(layer, settings, lora, bias, seed, route, x)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, topk_weights, *factors)):
        if deferral is not None or is_beside:
            raise ValueError("submit: deferral and is_beside are for calls without gradients")
        return Ticket(passed, _Submit.apply(x, topk_ids, topk_weights, *factors, passed))
    passed.start(x, topk_ids, topk_weights, is_beside=is_beside, deferral=deferral)
    return Ticket(passed, None)


def join(ticket: Ticket) -> Tensor:
    """The output of a pass, once.

    Returns:
        `[tokens, hidden]` in the dtype and on the device of the hidden states; sums in f32, rounded once.
    Raises:
        ValueError: a shape or id does not fit the layer.
        RuntimeError: it was joined before; or an input was written since its submit, and its gradients are wanted.
        Exception: what else went wrong in the pass.
    """
    tie, ticket.tie = ticket.tie, None
    return ticket.passed.finish() if tie is None else _Join.apply(tie, ticket.passed)


class _Submit(torch.autograd.Function):
    """Its output has no elements: it orders join after submit, and their backwards the other way round."""

    @staticmethod
    def forward(ctx, x, topk_ids, topk_weights, gate_a, gate_b, up_a, up_b, down_a, down_b, passed):
        factors = (gate_a, gate_b, up_a, up_b, down_a, down_b)
        passed.will_go_back(ctx.needs_input_grad, topk_weights, factors)
        passed.start(x, topk_ids, topk_weights)
        ctx.passed = passed
        return x.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        return ctx.passed.finish_gradients()


class _Join(torch.autograd.Function):
    """The tape is (x, topk_ids, topk_weights, g, u, x A^T of gate and of up, shared operands): torch tensors, which
    checkpointing and offload hooks can drop. It is saved here, when the pass is known to have gone well."""

    @staticmethod
    def forward(ctx, tie, passed):
        out = passed.finish()
        ctx.save_for_backward(*passed.take_tape())
        ctx.passed = passed
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        ctx.passed.start_gradients(dout, ctx.saved_tensors)
        return dout.new_empty(0), None


class _Pass:
    """One pass of the kernels, forward and backward; the tensors of either are gone when its second half has run."""

    __slots__ = (
        *("layer", "settings", "lora", "bias", "seed", "route", "device", "dtype", "wants"),
        *("_gradients", "_result", "_tape", "_versions"),
    )

    def __init__(
        self,
        layer: object,
        settings: MoeSettings,
        lora: LoraOperands,
        bias: Biases | None,
        seed: int,
        route: Route,
        x: Tensor,
    ):
        self.layer = layer
        self.settings = settings
        self.lora = lora
        self.bias = bias
        self.seed = seed
        self.route = route
        self.device = x.device
        self.dtype = x.dtype
        self.wants: _Wants | None = None
        self._result: Result | None = None

    def will_go_back(self, needed: tuple[bool, ...], topk_weights: Tensor, factors: LoraTensors) -> None:
        """Before `start`: gradients are wanted, `needed` of x, ids, weights and the factors."""
        self.wants = _Wants(
            needed[0],
            (topk_weights.device, topk_weights.dtype) if needed[2] else None,
            tuple(_Factor.of(f) if needs else None for f, needs in zip(factors, needed[3:9], strict=True)),
        )
        self._gradients: dict[int, _Gradients] = {}

    def start(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        *,
        is_beside: bool = False,
        deferral: Deferral | None = None,
    ) -> None:
        """Hand the inputs over; see `submit`."""
        if topk_ids.dim() != 2 or topk_weights.dim() != 2:
            shapes = f"{list(topk_ids.shape)} and {list(topk_weights.shape)}"
            raise ValueError(f"topk_ids, topk_weights: expected [tokens, k], got {shapes}")
        if x.dim() == 0 or (x.dim() != 2 and self.wants is not None):
            raise ValueError(f"x: expected [tokens, hidden], got {list(x.shape)}")
        route, to_slots = self.route, self.settings.to_slots
        rows = route.bring(x, torch.bfloat16, "x")  # [tokens, hidden]
        ids = route.bring(topk_ids, torch.int64, "topk_ids")  # [tokens, k]
        weights = route.bring(topk_weights, torch.float32, "topk_weights")  # [tokens, k]
        out = route.output(rows, self._result_dtype)
        arrived = route.arrival()
        tape = _NO_TAPE
        if self.wants is not None:
            tape = self._new_tape(ids.numel()) if self.settings.retain else _NO_TAPE
            self._tape = (rows, ids, weights, *tape, *self.lora.shared)
            self._versions = _versions((rows, ids, weights, *self.lora.shared))

        def slots() -> Tensor:
            if arrived is not None:
                arrived()
            return ids if to_slots is None else to_slots(ids)

        def compute(chosen: Tensor, into: Tensor) -> None:
            self._forward(rows, chosen, weights, tape, into)

        def work() -> Tensor:
            try:
                compute(slots(), out)
                return out
            finally:
                route.release()

        run = task_queue.submit if is_beside or route.is_beside else task_queue.run_now
        if deferral is None:
            self._result = run(work)
        else:
            parts = Parts(slots, weights, self.layer.num_experts, compute, route.release)
            self._result = deferral.start(parts, out, run=run)

    def _forward(self, x: Tensor, ids: Tensor, weights: Tensor, tape: tuple, out: Tensor) -> None:
        g, u, *xa = tape
        self.layer.forward(
            x, ids, weights, lora=self.lora.projections, g=g, u=u, xa=tuple(xa), out=out,
            out_dtype=_name(out.dtype), dropout_seed=self.seed, bias=self.bias, **self.settings.options,
        )  # fmt: skip

    def finish(self) -> Tensor:
        """Wait for the output; see `join`."""
        result, self._result = self._result, None
        if result is None:
            raise RuntimeError("experts: this pass was joined before; submit once for each join")
        try:
            return self.route.deliver(result.result(), self.device, self.dtype)
        finally:
            result = None  # an error holds this frame, and would hold itself

    def take_tape(self) -> tuple[Tensor | None, ...]:
        """What backward needs, for autograd to keep.

        Raises:
            RuntimeError: a tensor that the kernels read in place was written since.
        """
        tape, self._tape = self._tape, ()
        if self._versions != _versions((*tape[:3], *self.lora.shared)):
            raise RuntimeError(
                "experts: hidden states, router weights, ids or LoRA factors were modified by an inplace operation "
                "between submit and join, which have to see the same values; write to a copy"
            )
        return tape

    def start_gradients(self, dout: Tensor, saved: tuple[Tensor | None, ...]) -> None:
        """Hand the output's gradient over, with what `take_tape` gave."""
        x, ids, weights, g, u, *xa = saved[: 3 + len(_NO_TAPE)]
        wants, lora, route = self.wants, self.lora.projections, route_of(dout)
        dy = route.bring(dout, torch.bfloat16, "gradient")  # [tokens, hidden]
        dx = route.output(x, self._result_dtype) if wants.x else None
        dweights = route.output(weights, torch.float32) if wants.weights else None
        dlora = tuple(None if factor is None else factor.empty_gradient(route) for factor in wants.factors)
        arrived = route.arrival()

        def work() -> None:
            if arrived is not None:
                arrived()
            self.layer.backward(
                dy, x, ids, weights, lora=lora, g=g, u=u, xa=tuple(xa), dx=dx, dx_dtype=_name(self._result_dtype),
                dtopk_weights=dweights, lora_grads=_native_grads(dlora, lora, self.layer.inter),
                dropout_seed=self.seed, bias=self.bias, **self.settings.options,
            )  # fmt: skip
            route.release()

        run = task_queue.submit if route.is_beside else task_queue.run_now
        self._gradients[_backward_number()] = _Gradients(run(work), route, dx, dweights, dlora)

    def finish_gradients(self) -> tuple[Tensor | None, ...]:
        """Wait for the gradients of this backward; those of `_Submit.forward`'s arguments."""
        found, wants = self._gradients.pop(_backward_number()), self.wants
        try:
            found.result.result()
        except BaseException:
            found = None  # an error holds this frame, and would hold itself
            raise
        if self.lora.after_backward is not None:
            self.lora.after_backward()
        deliver = found.route.deliver
        return (
            deliver(found.dx, self.device, self.dtype) if wants.x else None,
            None,
            None if wants.weights is None else deliver(found.dweights, *wants.weights),
            *(
                None if factor is None else deliver(gradient, factor.device, factor.dtype)
                for factor, gradient in zip(wants.factors, found.dlora, strict=True)
            ),
            None,
        )

    @property
    def _result_dtype(self) -> torch.dtype:
        """Of the sums as the kernels round them."""
        return torch.bfloat16 if self.dtype is torch.bfloat16 else torch.float32

    def _new_tape(self, rows: int) -> tuple[Tensor | None, ...]:
        """g and u, f16, and x A^T of gate and of up, f32 `[rows, rank]`, where they have an A of their own."""
        gate, up, _ = self.lora.projections
        g, u = (empty((rows, self.layer.inter_stride), torch.float16) for _ in range(2))
        own = (gate, None if gate is not None and up is not None and up[0] is gate[0] else up)
        return g, u, *(None if one is None else empty((rows, one[0].shape[1]), torch.float32) for one in own)


class _Factor(NamedTuple):
    """A LoRA factor `[num_experts, rank, dim]` that wants a gradient."""

    device: torch.device
    dtype: torch.dtype
    shape: torch.Size
    is_expert_minor: bool  # experts are the fastest index, as in PEFT's `[dim, rank * num_experts]`

    @classmethod
    def of(cls, factor: Tensor) -> _Factor:
        """What its gradient has to be like."""
        experts, rank, _ = factor.shape
        is_minor = factor.stride() == (1, experts, experts * rank)
        return cls(factor.device, factor.dtype, factor.shape, is_minor)

    def empty_gradient(self, route: Route) -> Tensor:
        """f32 in the memory layout of the factor, so that autograd takes the gradient as it is."""
        experts, rank, dim = self.shape
        made = empty((dim, rank, experts) if self.is_expert_minor else self.shape, torch.float32)
        if route.is_beside and self.device.type != "cpu":
            made = route.output(made, torch.float32)
        return made.permute(2, 1, 0) if self.is_expert_minor else made


class _Wants(NamedTuple):
    """Of what gradients are wanted, and like what."""

    x: bool
    weights: tuple[torch.device, torch.dtype] | None
    factors: tuple[_Factor | None, ...]


class _Gradients(NamedTuple):
    """Gradients on their way from join's backward to submit's."""

    result: Result
    route: Route
    dx: Tensor | None
    dweights: Tensor | None
    dlora: tuple[Tensor | None, ...]


def _versions(tensors: tuple[Tensor, ...]) -> list[int]:
    return [0 if t.is_inference() else t._version for t in tensors]


def _backward_number() -> int:
    """Which backward this thread is in: two of them may run through one graph at a time."""
    return torch._C._current_graph_task_id()


def _name(dtype: torch.dtype) -> str:
    return "bf16" if dtype is torch.bfloat16 else "f32"


def _native_grads(dlora: LoraTensors, lora: tuple, inter: int) -> tuple:
    """((da, db) or None) of gate, up and down; the shared a of a fused pair is written once, through gate."""
    gate, up, down = split_projections(dlora, inter)
    if up[0] is not None and up[0] is gate[0]:
        up = (None, up[1])
    return tuple(None if present is None else pair for present, pair in zip(lora, (gate, up, down), strict=True))
