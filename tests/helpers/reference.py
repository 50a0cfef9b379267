"""Float64 truth of the routed experts: plain maths, and with the kernels' rounding points (docs/numerics.md)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kt_sft.ops.dropout import HIDDEN, INTER, dropout_mask


def round_bf16(t: Tensor) -> Tensor:
    """To the nearest bf16, ties to even, kept in t's dtype. Through f32 first: the kernels' sums are f32."""
    return t.float().to(torch.bfloat16).to(t.dtype)


def no_rounding(t: Tensor) -> Tensor:
    return t


@dataclass
class Problem:
    """One layer call in float64; LoRA as canonical (a [experts, rank, in], b [experts, rank, out], scale), or None."""

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

    def masks(self) -> tuple[Tensor, Tensor]:
        """Kept elements of x and of h, by (token * k + slot)."""
        pairs = self.ids.numel()
        if self.p == 0.0:
            return torch.ones(pairs, 1, dtype=torch.float64), torch.ones(pairs, 1, dtype=torch.float64)
        hidden, inter = self.x.shape[1], self.gate.shape[1]
        x_mask = dropout_mask(self.seed, HIDDEN, pairs, hidden, self.p)
        h_mask = dropout_mask(self.seed, INTER, pairs, inter, self.p)
        return torch.from_numpy(x_mask).double(), torch.from_numpy(h_mask).double()


def solve(problem: Problem, *, rounding: bool) -> dict[str, Tensor]:
    """Output and every gradient: out, dx, dweights, and d{gate,up,down}_{a,b} of the LoRA factors that are there.

    With shares_a the gradient of the common a is dgate_a.
    """
    q = round_bf16 if rounding else no_rounding
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
            _solve_expert(problem, expert, token, slot, masks, q, result)
    return result


def _solve_expert(
    problem: Problem, e: int, token: Tensor, slot: Tensor, masks: tuple, q, result: dict[str, Tensor]
) -> None:
    pair = token * problem.ids.shape[1] + slot
    x, dout, w = q(problem.x)[token], q(problem.dout)[token], problem.weights[token, slot, None]
    x_mask, h_mask = masks[0][pair], masks[1][pair]
    keep = 1.0 - problem.p
    lora = {name: (q(a[e]), q(b[e]), scale / keep) for name, (a, b, scale) in problem.lora.items()}

    def product(name: str, rows: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        y = rows @ getattr(problem, name)[e].T
        if name not in lora:
            return y, None
        a, b, scale = lora[name]
        ranked = scale * q((rows * mask) @ a.T)  # [m, rank]
        return y + ranked @ b, ranked

    g, ranked_gate = product("gate", x, x_mask)
    u, ranked_up = product("up", x, x_mask)
    g, u = q(g), q(u)  # [m, inter]
    sigmoid = torch.sigmoid(g)
    h = q(g * sigmoid * u)
    y, ranked_down = product("down", h, h_mask)  # [m, hidden]
    result["out"].index_add_(0, token, w * y)

    dh = dout @ problem.down[e]  # [m, inter], before the routing weight
    if "down" in lora:
        a, b, scale = lora["down"]
        dranked = scale * q(dout @ b.T)
        dh = dh + h_mask * (dranked @ a)
        result["ddown_a"][e] = (w * dranked).T @ (h * h_mask)
        result["ddown_b"][e] = (w * ranked_down).T @ dout
    result["dweights"][token, slot] = (dh * h).sum(1)
    dg = q(w * dh * u * sigmoid * (1 + g * (1 - sigmoid)))
    du = q(w * dh * g * sigmoid)
    dx = dg @ problem.gate[e] + du @ problem.up[e]
    groups = [("gate", dg, ranked_gate), ("up", du, ranked_up)]
    if problem.shares_a:
        a, b_gate, scale = lora["gate"]
        dranked = scale * q(dg @ b_gate.T + du @ lora["up"][1].T)
        dx = dx + x_mask * (dranked @ a)
        result["dgate_a"][e] = dranked.T @ (x * x_mask)
    for name, dy, ranked in groups:
        if name not in lora:
            continue
        a, b, scale = lora[name]
        result[f"d{name}_b"][e] = ranked.T @ dy
        if not problem.shares_a:
            dranked = scale * q(dy @ b.T)
            dx = dx + x_mask * (dranked @ a)
            result[f"d{name}_a"][e] = dranked.T @ (x * x_mask)
    result["dx"].index_add_(0, token, dx)
