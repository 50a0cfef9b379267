"""Float64 truth of the routed experts: plain maths, and with the kernels' rounding points (docs/numerics.md)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.helpers.dropout import HIDDEN, INTER, dropout_mask
from tests.helpers.quantizers import round_rows_to_int8

Step = Callable[[Tensor], Tensor]


def round_bf16(t: Tensor) -> Tensor:
    """To the nearest bf16, ties to even, kept in t's dtype. Through f32 first: the kernels' sums are f32."""
    return t.float().to(torch.bfloat16).to(t.dtype)


def exact(t: Tensor) -> Tensor:
    return t


def round_f16(t: Tensor) -> Tensor:
    """To the nearest f16 of at most the largest finite one, kept in t's dtype; NaN stays."""
    return t.float().clamp(-65504.0, 65504.0).to(torch.float16).to(t.dtype)


def _glu(act: Step) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda g, u: act(g) * u


CLAMP_ALPHA, CLAMP_LIMIT = 1.702, 1.5  # a limit that values of order one reach


def clamped_swiglu(g: Tensor, u: Tensor, alpha: float = CLAMP_ALPHA, limit: float = CLAMP_LIMIT) -> Tensor:
    """As gpt-oss has it, with other limits."""
    g, u = g.clamp(max=limit), u.clamp(min=-limit, max=limit)
    return (u + 1.0) * g * torch.sigmoid(alpha * g)


# h = f(gate, up), by the name of the kernels' gate function.
GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": _glu(lambda g: g * torch.sigmoid(g)),
    "gelu": _glu(lambda g: 0.5 * g * torch.special.erfc(-g * math.sqrt(0.5))),
    "gelu_tanh": _glu(lambda g: 0.5 * g * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (g + 0.044715 * g**3)))),
    "relu": _glu(torch.relu),
    "clamped_swiglu": clamped_swiglu,
}


def for_tape(name: str, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """g and u before they are rounded for the tape: what the clamp cuts off stays clearly beyond the limit."""
    if name == "clamped_swiglu":
        beyond = 1.25 * CLAMP_LIMIT
        g, u = torch.where(g > CLAMP_LIMIT, beyond, g), torch.where(u.abs() > CLAMP_LIMIT, beyond * u.sign(), u)
    return g, u


def gate_gradients(name: str, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """h, dh/dg and dh/du, by autograd."""
    with torch.enable_grad():
        g, u = g.detach().requires_grad_(), u.detach().requires_grad_()
        h = GATES[name](g, u)
        slopes = torch.autograd.grad(h.sum(), (g, u)) if h.numel() else (g, u)
    return h.detach(), *slopes


@dataclass(frozen=True)
class Rounding:
    """What becomes of a value at each point of a call. Without arguments: nothing, the plain maths.

    `dataclasses.replace(KERNELS, h=exact)` turns one point off: that tells what it costs.
    """

    operand: Step = exact  # hidden states and the incoming gradient
    h: Step = exact  # act(g) u before the down projection and the LoRA branch
    tape: Step = exact  # g and u as backward sees them
    dgate_up: Step = exact  # dg and du
    int8_rows: Step = exact  # x and h before the products with the weights, when rows are int8
    scaled_gradient: Step = exact  # gradients times the scales of int8 weights, before the product with q


EXACT = Rounding()
KERNELS = Rounding(
    operand=round_bf16,
    h=round_bf16,
    tape=round_f16,
    dgate_up=round_bf16,
    int8_rows=round_rows_to_int8,
)


@dataclass
class Problem:
    """One layer call in float64; LoRA as canonical (a [experts, rank, in], b [experts, rank, out], scale), or None.

    The weights are those that the layer stores, so q * scale of a quantised format.
    """

    x: Tensor  # [tokens, hidden]
    ids: Tensor  # [tokens, k]
    weights: Tensor  # [tokens, k]
    gate: Tensor  # [experts, inter, hidden]
    up: Tensor
    down: Tensor  # [experts, hidden, inter]
    dout: Tensor  # [tokens, hidden]
    lora: dict[str, tuple[Tensor, Tensor, float]]
    shares_a: bool
    p: float = 0.0
    seed: int = 0
    format: str = "bf16"
    group: int = 32
    rows: str = "bf16"
    activation: str = "silu"
    bias: dict[str, Tensor] | None = None  # gate and up [experts, inter], down [experts, hidden]

    def masks(self) -> tuple[Tensor, Tensor]:
        """Kept elements of x and of h, by (token * k + slot)."""
        pairs = self.ids.numel()
        if self.p == 0.0:
            return torch.ones(pairs, 1, dtype=torch.float64), torch.ones(pairs, 1, dtype=torch.float64)
        hidden, inter = self.x.shape[1], self.gate.shape[1]
        x_mask = dropout_mask(self.seed, HIDDEN, pairs, hidden, self.p)
        h_mask = dropout_mask(self.seed, INTER, pairs, inter, self.p)
        return torch.from_numpy(x_mask).double(), torch.from_numpy(h_mask).double()


def solve(problem: Problem, rounding: Rounding) -> dict[str, Tensor]:
    """Output and every gradient: out, dx, dweights, and d{gate,up,down}_{a,b} of the LoRA factors that are there.

    With shares_a the gradient of the common a is dgate_a. Gradients pass straight through the rounding to int8 rows.
    """
    result = {
        "out": torch.zeros_like(problem.x),
        "dx": torch.zeros_like(problem.x),
        "dweights": torch.zeros_like(problem.weights),
    }
    for name, (a, b, _) in problem.lora.items():
        result[f"d{name}_a"], result[f"d{name}_b"] = torch.zeros_like(a), torch.zeros_like(b)
    if problem.shares_a:
        del result["dup_a"]
    masks = problem.masks()
    for expert in range(problem.gate.shape[0]):
        token, slot = torch.where(problem.ids == expert)
        if token.numel():
            _Expert(problem, rounding, expert, token, slot, masks).add_to(result)
    return result


class _Expert:
    """The rows of one expert."""

    def __init__(self, problem: Problem, q: Rounding, e: int, token: Tensor, slot: Tensor, masks: tuple):
        self.problem, self.q, self.e, self.token, self.slot = problem, q, e, token, slot
        pair = token * problem.ids.shape[1] + slot
        self.x, self.dout = q.operand(problem.x)[token], q.operand(problem.dout)[token]
        self.w = problem.weights[token, slot, None]
        self.x_mask, self.h_mask = masks[0][pair], masks[1][pair]
        keep = 1.0 - problem.p
        self.lora = {name: (a[e], b[e], scale / keep) for name, (a, b, scale) in problem.lora.items()}

    def forward(self, name: str, rows: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """The projection of rows, and the [m, rank] product of its LoRA branch."""
        base = self.q.int8_rows(rows) if self.problem.rows == "int8" else rows
        y = base @ getattr(self.problem, name)[self.e].T
        if self.problem.bias is not None:
            y = y + self.problem.bias[name][self.e]
        if name not in self.lora:
            return y, None
        a, b, scale = self.lora[name]
        ranked = scale * ((rows * mask) @ a.T)
        return y + ranked @ b, ranked

    def input_grad(self, name: str, dy: Tensor) -> Tensor:
        return self.q.scaled_gradient(dy) @ getattr(self.problem, name)[self.e]

    def add_to(self, result: dict[str, Tensor]) -> None:
        q, e, w = self.q, self.e, self.w
        g, ranked_gate = self.forward("gate", self.x, self.x_mask)
        u, ranked_up = self.forward("up", self.x, self.x_mask)
        y, _ = self.forward("down", q.h(GATES[self.problem.activation](g, u)), self.h_mask)  # [m, hidden]
        result["out"].index_add_(0, self.token, w * y)

        g, u = (q.tape(t) for t in for_tape(self.problem.activation, g, u))
        h, slope_g, slope_u = gate_gradients(self.problem.activation, g, u)
        dh = self.input_grad("down", self.dout)  # [m, inter], before the routing weight
        if "down" in self.lora:
            dh = dh + self.down_lora(q.h(h), result)
        result["dweights"][self.token, self.slot] = (dh * h).sum(1)
        if self.problem.bias is not None:
            result["dweights"][self.token, self.slot] += self.dout @ self.problem.bias["down"][e]
        dg = q.dgate_up(w * dh * slope_g)
        du = q.dgate_up(w * dh * slope_u)
        dx = self.input_grad("gate", dg) + self.input_grad("up", du)
        if "gate" in self.lora:
            result["dgate_b"][e] = ranked_gate.T @ dg
        if "up" in self.lora:
            result["dup_b"][e] = ranked_up.T @ du
        dx = dx + self.gate_up_lora(dg, du, result)
        result["dx"].index_add_(0, self.token, dx)

    def down_lora(self, h: Tensor, result: dict[str, Tensor]) -> Tensor:
        """Gradients of the factors of down; returns the branch's part of dh."""
        a, b, scale = self.lora["down"]
        ranked, dranked = scale * ((h * self.h_mask) @ a.T), scale * (self.dout @ b.T)
        result["ddown_a"][self.e] = (self.w * dranked).T @ (h * self.h_mask)
        result["ddown_b"][self.e] = (self.w * ranked).T @ self.dout
        return self.h_mask * (dranked @ a)

    def gate_up_lora(self, dg: Tensor, du: Tensor, result: dict[str, Tensor]) -> Tensor:
        """Gradients of the a factors of gate and up; returns the branches' part of dx."""
        sums = {name: dy @ self.lora[name][1].T for name, dy in (("gate", dg), ("up", du)) if name in self.lora}
        if self.problem.shares_a:
            sums = {"gate": sums["gate"] + sums["up"]}
        dx = torch.zeros_like(self.x)
        for name, dranked in sums.items():
            a, _, scale = self.lora[name]
            dranked = scale * dranked
            dx += self.x_mask * (dranked @ a)
            result[f"d{name}_a"][self.e] = dranked.T @ (self.x * self.x_mask)
        return dx
