"""The routed experts of one MoE layer with or without LoRA, as data; and the torch ways to compute them.

Formulas as in docs/numerics.md: one expert maps x [m, hidden] to down(silu(gate(x)) * up(x)), every projection with a
LoRA of rank r; gate and up share one A, which is PEFT's form for a fused gate_up_proj.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

LORA_SCALE = 2.0


@dataclass(frozen=True)
class LayerShape:
    model: str
    hidden: int
    inter: int
    num_experts: int
    top_k: int

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's gate, up and down in bf16."""
        return 2 * 3 * self.hidden * self.inter


@dataclass(frozen=True)
class Lora:
    """Leaf tensors, f32: delta W_e = scale * b_e^T a_e."""

    gate_up_a: Tensor  # [experts, rank, hidden], shared by gate and up
    gate_up_b: Tensor  # [experts, rank, 2 * inter]
    down_a: Tensor  # [experts, rank, inter]
    down_b: Tensor  # [experts, rank, hidden]

    def tensors(self) -> list[Tensor]:
        return [self.gate_up_a, self.gate_up_b, self.down_a, self.down_b]


@dataclass(frozen=True)
class Layer:
    shape: LayerShape
    gate_up: Tensor  # bf16 [experts, 2 * inter, hidden]
    down: Tensor  # bf16 [experts, hidden, inter]
    lora: Lora | None

    @property
    def rank(self) -> int:
        """Rank of the LoRA, 0 without."""
        return self.lora.gate_up_a.shape[1] if self.lora is not None else 0

    def lora_tensors(self) -> list[Tensor]:
        return self.lora.tensors() if self.lora is not None else []


@dataclass(frozen=True)
class Batch:
    """One input of the layer and the gradient of its output."""

    x: Tensor  # bf16 [tokens, hidden]
    topk_ids: Tensor  # int64 [tokens, k]
    topk_weights: Tensor  # f32 [tokens, k]
    dout: Tensor  # bf16 [tokens, hidden]

    def head(self, tokens: int) -> Batch:
        return Batch(self.x[:tokens], self.topk_ids[:tokens], self.topk_weights[:tokens], self.dout[:tokens])


def _fill_by_rolling(target: Tensor, template: Tensor) -> None:
    """Give each expert the values of template in another order: drawing all weights would take most of the run."""
    flat = template.flatten()
    for index, expert in enumerate(target):
        expert.copy_(torch.roll(flat, 8191 * index).view_as(expert))


def make_lora(shape: LayerShape, rank: int, rng: torch.Generator) -> Lora:
    """Factors that are non-zero in A and B, and of a size that leaves the base weights the larger part."""

    def normal(*size: int, scale: float) -> Tensor:
        return (torch.randn(*size, generator=rng) * scale).requires_grad_()

    experts, hidden, inter = shape.num_experts, shape.hidden, shape.inter
    return Lora(
        normal(experts, rank, hidden, scale=hidden**-0.5),
        normal(experts, rank, 2 * inter, scale=0.1 * rank**-0.5),
        normal(experts, rank, inter, scale=inter**-0.5),
        normal(experts, rank, hidden, scale=0.1 * rank**-0.5),
    )


def make_layer(shape: LayerShape, rank: int, seed: int = 0) -> Layer:
    """Random weights of the size that keeps activations near one; rank 0: no LoRA."""
    rng = torch.Generator().manual_seed(seed)
    experts, hidden, inter = shape.num_experts, shape.hidden, shape.inter
    gate_up = torch.empty(experts, 2 * inter, hidden, dtype=torch.bfloat16)
    down = torch.empty(experts, hidden, inter, dtype=torch.bfloat16)
    _fill_by_rolling(gate_up, (torch.randn(2 * inter, hidden, generator=rng) * hidden**-0.5).bfloat16())
    _fill_by_rolling(down, (torch.randn(hidden, inter, generator=rng) * inter**-0.5).bfloat16())
    return Layer(shape, gate_up, down, make_lora(shape, rank, rng) if rank else None)


def with_rank(layer: Layer, rank: int, seed: int = 2) -> Layer:
    """The same base weights with a LoRA of another rank; 0: without one."""
    rng = torch.Generator().manual_seed(seed)
    return replace(layer, lora=make_lora(layer.shape, rank, rng) if rank else None)


def make_batches(shape: LayerShape, tokens: int, count: int, seed: int = 1) -> list[Batch]:
    """`count` inputs with independent uniform routing: k distinct experts per token, weights that sum to one."""
    rng = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        scores, ids = torch.rand(tokens, shape.num_experts, generator=rng).topk(shape.top_k, dim=-1)
        x = torch.randn(tokens, shape.hidden, generator=rng).bfloat16()
        dout = torch.randn(tokens, shape.hidden, generator=rng).bfloat16()
        batches.append(Batch(x, ids, scores / scores.sum(-1, keepdim=True), dout))
    return batches


class Computes(Protocol):
    """A contender: one way to compute the layer."""

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor: ...

    def input_of(self, batch: Batch) -> Tensor:
        """x in the contender's dtype."""

    def lora_leaves(self) -> list[Tensor]:
        """What gradients are computed for, beside x and topk_weights."""

    def canonical(self, gradients: list[Tensor]) -> list[Tensor]:
        """Gradients of `lora_leaves()` in the order and layout of `Lora`."""


@dataclass(frozen=True)
class Routes:
    """(token, slot) pairs in the order of their expert; row i of the grouped tensors is pair order[i]."""

    order: Tensor  # int64 [rows]
    token: Tensor  # int64 [rows]
    counts: Tensor  # int64 [experts]

    def segments(self) -> Iterator[tuple[int, int, int]]:
        """(expert, first row, end row) of the experts that have rows."""
        start = 0
        for expert, count in enumerate(self.counts.tolist()):
            if count:
                yield expert, start, start + count
            start += count


def group_by_expert(topk_ids: Tensor, num_experts: int) -> Routes:
    flat = topk_ids.flatten()
    order = torch.argsort(flat, stable=True)
    return Routes(order, order // topk_ids.shape[1], torch.bincount(flat, minlength=num_experts))


def expert_loop(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    layer: Layer,
    lora: list[Tensor],
    products_of: Callable[[int], tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]],
) -> Tensor:
    """The layer as a loop over active experts, `[tokens, hidden]` in x's dtype.

    Stiffer than the eager form of transformers: rows are sorted and gathered once and LoRA factors unbound once, which
    spares autograd a zero tensor of all experts for every expert. `products_of(expert)` gives the two products with the
    frozen weights.
    """
    routes = group_by_expert(topk_ids, layer.shape.num_experts)
    grouped = x[routes.token]  # [rows, hidden]
    per_expert = [one.unbind(0) for one in lora]

    def with_lora(rows: Tensor, product: Callable[[Tensor], Tensor], factors: list[Tensor]) -> Tensor:
        base = product(rows)
        if not factors:
            return base
        a, b = factors
        return base + LORA_SCALE * (rows @ a.T) @ b

    outputs = []
    for expert, start, end in routes.segments():
        gate_up, down = products_of(expert)
        factors = [one[expert] for one in per_expert]
        gate, up = with_lora(grouped[start:end], gate_up, factors[:2]).chunk(2, -1)
        outputs.append(with_lora(F.silu(gate) * up, down, factors[2:]))  # [m, hidden]
    weighted = torch.cat(outputs) * topk_weights.flatten()[routes.order, None].to(x.dtype)
    return torch.zeros_like(x).index_add(0, routes.token, weighted)


def grouped_layer(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    layer: Layer,
    lora: list[Tensor],
    gate_up: Tensor,
    down: Tensor,
) -> Tensor:
    """The layer by torch.nn.functional.grouped_mm, LoRA included: transformers' `grouped_mm` experts plus adapters."""
    routes = group_by_expert(topk_ids, layer.shape.num_experts)
    ends = routes.counts.cumsum(0).to(torch.int32)
    grouped = x[routes.token]  # [rows, hidden]

    def with_lora(rows: Tensor, weight: Tensor, factors: list[Tensor]) -> Tensor:
        base = F.grouped_mm(rows, weight.transpose(-2, -1), offs=ends)
        if not factors:
            return base
        a, b = factors
        low = F.grouped_mm(rows, a.transpose(-2, -1), offs=ends)  # [rows, rank]
        return base + LORA_SCALE * F.grouped_mm(low, b, offs=ends)

    gate, up = with_lora(grouped, gate_up, lora[:2]).chunk(2, -1)
    y = with_lora(F.silu(gate) * up, down, lora[2:])  # [rows, hidden]
    weighted = y * topk_weights.flatten()[routes.order, None].to(y.dtype)
    back = torch.empty_like(routes.order)
    back[routes.order] = torch.arange(back.numel())
    return weighted[back].view(*topk_ids.shape, -1).sum(1)  # [tokens, hidden]


class TorchLayer:
    """A torch contender: `kind` is loop or grouped; weights in `dtype`, LoRA cast to it once per call."""

    def __init__(self, layer: Layer, kind: str, gate_up: Tensor, down: Tensor, *, dtype: torch.dtype) -> None:
        self.layer, self.kind, self.dtype = layer, kind, dtype
        self._gate_up, self._down = gate_up, down

    def sharing(self, layer: Layer) -> TorchLayer:
        """The same base weights with the LoRA of `layer`."""
        return TorchLayer(layer, self.kind, self._gate_up, self._down, dtype=self.dtype)

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        lora = [one.to(self.dtype) for one in self.layer.lora_tensors()]
        if self.kind == "grouped":
            return grouped_layer(
                x, topk_ids, topk_weights, layer=self.layer, lora=lora, gate_up=self._gate_up, down=self._down
            )
        return expert_loop(x, topk_ids, topk_weights, layer=self.layer, lora=lora, products_of=self._products)

    def _products(self, expert: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        gate_up, down = self._gate_up[expert].to(self.dtype), self._down[expert].to(self.dtype)
        return lambda rows: F.linear(rows, gate_up), lambda rows: F.linear(rows, down)

    def input_of(self, batch: Batch) -> Tensor:
        return batch.x.to(self.dtype)

    def lora_leaves(self) -> list[Tensor]:
        return self.layer.lora_tensors()

    def canonical(self, gradients: list[Tensor]) -> list[Tensor]:
        """Gradients of `lora_leaves()` in the order and layout of `Lora`."""
        return gradients


OPPONENTS = ("torch loop fp32", "grouped_mm fp32", "torch loop bf16", "grouped_mm bf16", "torch _int_mm")


def torch_contenders(layer: Layer, names: Iterable[str] = OPPONENTS) -> dict[str, TorchLayer]:
    """Opponents by name; the two of one dtype share their weights."""
    contenders, weights = {}, {}
    for name in names:
        if name == "torch _int_mm":
            contenders[name] = Int8Layer(layer)
            continue
        kind, label = name.rsplit(" ", 1)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[label]
        if dtype not in weights:
            weights[dtype] = (layer.gate_up.to(dtype), layer.down.to(dtype))
        contenders[name] = TorchLayer(
            layer, {"torch loop": "loop", "grouped_mm": "grouped"}[kind], *weights[dtype], dtype=dtype
        )
    return contenders


def exact_layer(layer: Layer) -> TorchLayer:
    """The reference: the loop in float64, weights converted one expert at a time."""
    return TorchLayer(layer, "loop", layer.gate_up, layer.down, dtype=torch.float64)


class Int8Layer(TorchLayer):
    """torch's own int8 product, forward only: a scale per output channel and per row, `torch._int_mm` per expert.

    Weights are quantised once, rows in every call, as W8A8 has to.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer, "loop", layer.gate_up, layer.down, dtype=torch.float32)
        self._packed = [_quantise(one) for one in (layer.gate_up, layer.down)]

    def _products(self, expert: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        (gate_up, gate_up_scale), (down, down_scale) = ((q[expert], scale[expert]) for q, scale in self._packed)

        def product(rows: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
            q, scale = _quantise(rows)
            return torch._int_mm(q, weight.T) * (scale * weight_scale.T)

        return lambda rows: product(rows, gate_up, gate_up_scale), lambda rows: product(rows, down, down_scale)


def _quantise(values: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values and f32 scales `[..., 1]` along the last axis, symmetric."""
    values = values.float()
    scale = values.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return (values / scale).round().to(torch.int8), scale


def infer(contender: Computes, batch: Batch) -> Tensor:
    with torch.no_grad():
        return contender.forward(contender.input_of(batch), batch.topk_ids, batch.topk_weights)


def step(contender: Computes, batch: Batch) -> list[Tensor]:
    """Forward and backward: the output and the gradients of x, topk_weights and every LoRA leaf."""
    x = contender.input_of(batch).detach().requires_grad_()
    topk_weights = batch.topk_weights.detach().requires_grad_()
    out = contender.forward(x, batch.topk_ids, topk_weights)
    gradients = torch.autograd.grad(out, [x, topk_weights, *contender.lora_leaves()], batch.dout.to(out.dtype))
    return [out.detach(), *gradients]


def answers(contender: Computes, batch: Batch) -> list[Tensor]:
    """`step` with LoRA gradients in canonical layout, to compare contenders."""
    out, dx, dtopk_weights, *lora = step(contender, batch)
    return [out, dx, dtopk_weights, *contender.canonical(lora)]


def worst_error(got: list[Tensor], expected: list[Tensor]) -> float:
    """Largest over the tensors of: norm of the difference / norm of the expected tensor. NaN counts as infinite."""
    errors = [((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(got, expected, strict=True)]
    return max(error if error == error else float("inf") for error in errors)
