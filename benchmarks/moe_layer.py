"""The routed experts of one MoE layer with LoRA, as data; and the torch ways to compute them, as contenders.

Formulas as in docs/numerics.md: one expert maps x [m, hidden] to down(silu(gate(x)) * up(x)), every projection with a
LoRA of rank r; gate and up share one A, which is PEFT's form for a fused gate_up_proj.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

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
    lora: Lora


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


def make_layer(shape: LayerShape, rank: int, seed: int = 0) -> Layer:
    """Random weights of the size that keeps activations near one, LoRA factors non-zero in A and B."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*size: int, scale: float) -> Tensor:
        return torch.randn(*size, generator=rng) * scale

    experts, hidden, inter = shape.num_experts, shape.hidden, shape.inter
    gate_up = torch.empty(experts, 2 * inter, hidden, dtype=torch.bfloat16)
    down = torch.empty(experts, hidden, inter, dtype=torch.bfloat16)
    _fill_by_rolling(gate_up, normal(2 * inter, hidden, scale=hidden**-0.5).bfloat16())
    _fill_by_rolling(down, normal(hidden, inter, scale=inter**-0.5).bfloat16())
    lora = Lora(
        normal(experts, rank, hidden, scale=hidden**-0.5),
        normal(experts, rank, 2 * inter, scale=0.1 * rank**-0.5),
        normal(experts, rank, inter, scale=inter**-0.5),
        normal(experts, rank, hidden, scale=0.1 * rank**-0.5),
    )
    for one in lora.tensors():
        one.requires_grad_()
    return Layer(shape, gate_up, down, lora)


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
    weights_of: Callable[[int], tuple[Tensor, Tensor]],
) -> Tensor:
    """The layer as a loop over active experts, `[tokens, hidden]` in x's dtype.

    Stiffer than the eager form of transformers: rows are sorted and gathered once and LoRA factors unbound once, which
    spares autograd a zero tensor of all experts for every expert.
    """
    routes = group_by_expert(topk_ids, layer.shape.num_experts)
    grouped = x[routes.token]  # [rows, hidden]
    per_expert = [one.unbind(0) for one in lora]
    outputs = []
    for expert, start, end in routes.segments():
        gate_up, down = weights_of(expert)
        gate_up_a, gate_up_b, down_a, down_b = (one[expert] for one in per_expert)
        rows = grouped[start:end]  # [m, hidden]
        gate, up = (F.linear(rows, gate_up) + LORA_SCALE * (rows @ gate_up_a.T) @ gate_up_b).chunk(2, -1)
        h = F.silu(gate) * up  # [m, inter]
        outputs.append(F.linear(h, down) + LORA_SCALE * (h @ down_a.T) @ down_b)
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
    gate_up_a, gate_up_b, down_a, down_b = lora

    def with_lora(rows: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        low = F.grouped_mm(rows, a.transpose(-2, -1), offs=ends)  # [rows, rank]
        return F.grouped_mm(rows, weight.transpose(-2, -1), offs=ends) + LORA_SCALE * F.grouped_mm(low, b, offs=ends)

    gate, up = with_lora(grouped, gate_up, gate_up_a, gate_up_b).chunk(2, -1)
    y = with_lora(F.silu(gate) * up, down, down_a, down_b)  # [rows, hidden]
    weighted = y * topk_weights.flatten()[routes.order, None].to(y.dtype)
    back = torch.empty_like(routes.order)
    back[routes.order] = torch.arange(back.numel())
    return weighted[back].view(*topk_ids.shape, -1).sum(1)  # [tokens, hidden]


class TorchLayer:
    """A torch contender: `kind` is loop or grouped; weights in `dtype`, LoRA cast to it once per call."""

    def __init__(self, layer: Layer, kind: str, gate_up: Tensor, down: Tensor, *, dtype: torch.dtype) -> None:
        self.layer, self.kind, self.dtype = layer, kind, dtype
        self._gate_up, self._down = gate_up, down

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        lora = [one.to(self.dtype) for one in self.layer.lora.tensors()]
        if self.kind == "grouped":
            return grouped_layer(
                x, topk_ids, topk_weights, layer=self.layer, lora=lora, gate_up=self._gate_up, down=self._down
            )
        return expert_loop(
            x,
            topk_ids,
            topk_weights,
            layer=self.layer,
            lora=lora,
            weights_of=lambda e: (self._gate_up[e].to(self.dtype), self._down[e].to(self.dtype)),
        )

    def input_of(self, batch: Batch) -> Tensor:
        return batch.x.to(self.dtype)

    def lora_leaves(self) -> list[Tensor]:
        return self.layer.lora.tensors()

    def canonical(self, gradients: list[Tensor]) -> list[Tensor]:
        """Gradients of `lora_leaves()` in the order and layout of `Lora`."""
        return gradients


def torch_contenders(layer: Layer) -> dict[str, TorchLayer]:
    """The opponents by name; the two of one dtype share their weights."""
    contenders = {}
    for dtype, label in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        gate_up, down = layer.gate_up.to(dtype), layer.down.to(dtype)
        for kind, name in (("loop", "torch loop"), ("grouped", "grouped_mm")):
            contenders[f"{name} {label}"] = TorchLayer(layer, kind, gate_up, down, dtype=dtype)
    return contenders


def exact_layer(layer: Layer) -> TorchLayer:
    """The reference: the loop in float64, weights converted one expert at a time."""
    return TorchLayer(layer, "loop", layer.gate_up, layer.down, dtype=torch.float64)


class OurLayer:
    """kt_sft's routed experts with LoRA in the layout of stock PEFT's `target_parameters`."""

    def __init__(self, layer: Layer, *, chunk_size: int, cpu_activation: str) -> None:
        from kt_sft.models.spec import ExpertsSpec
        from kt_sft.nn.expert_lora import ExpertLora, LoraFactor, LoraPair
        from kt_sft.nn.routed_experts import RoutedExperts

        shape, lora = layer.shape, layer.lora
        spec = ExpertsSpec(shape.num_experts, shape.hidden, shape.inter, "silu")
        self.experts = RoutedExperts(spec, chunk_size=chunk_size, cpu_activation=cpu_activation)
        for index in range(shape.num_experts):
            gate, up = layer.gate_up[index].chunk(2)
            self.experts.load_expert(index, gate, up, layer.down[index])
        # PEFT keeps one factor as [experts * rank, dim] and the other as [dim, rank * experts].
        layouts = ("expert_minor", "expert_major", "expert_minor", "expert_major")
        self._factors = [
            LoraFactor(torch.nn.Parameter(_to_layout(one.detach(), layout)), layout, shape.num_experts)
            for one, layout in zip(lora.tensors(), layouts, strict=True)
        ]
        for factor, one in zip(self._factors, lora.tensors(), strict=True):
            if not torch.equal(factor.canonical(), one):
                raise RuntimeError(
                    f"LoraFactor {factor.layout}: canonical() does not restore [experts, rank, dim]; "
                    "bring benchmarks/moe_layer.py in line with kt_sft/nn/expert_lora.py"
                )
        gate_up_a, gate_up_b, down_a, down_b = self._factors
        self._factor_type = LoraFactor
        self.experts.lora = ExpertLora(
            gate_up=LoraPair(a=gate_up_a, b=gate_up_b, scaling=lambda: LORA_SCALE),
            down=LoraPair(a=down_a, b=down_b, scaling=lambda: LORA_SCALE),
            dropout=0.0,
            active=lambda: True,
        )

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        return self.experts(x, topk_ids, topk_weights)

    def input_of(self, batch: Batch) -> Tensor:
        return batch.x

    def lora_leaves(self) -> list[Tensor]:
        return [factor.parameter for factor in self._factors]

    def canonical(self, gradients: list[Tensor]) -> list[Tensor]:
        """Gradients of `lora_leaves()` in the order and layout of `Lora`."""
        return [
            self._factor_type(torch.nn.Parameter(gradient), factor.layout, factor.num_experts).canonical().detach()
            for factor, gradient in zip(self._factors, gradients, strict=True)
        ]


def _to_layout(factor: Tensor, layout: str) -> Tensor:
    """[experts, rank, dim] as PEFT has it: expert_major [experts * rank, dim], expert_minor [dim, rank * experts]."""
    return (factor.flatten(0, 1) if layout == "expert_major" else factor.permute(2, 1, 0).flatten(1)).contiguous()


def infer(contender: TorchLayer | OurLayer, batch: Batch) -> Tensor:
    with torch.no_grad():
        return contender.forward(contender.input_of(batch), batch.topk_ids, batch.topk_weights)


def step(contender: TorchLayer | OurLayer, batch: Batch) -> list[Tensor]:
    """Forward and backward: the output and the gradients of x, topk_weights and every LoRA leaf."""
    x = contender.input_of(batch).detach().requires_grad_()
    topk_weights = batch.topk_weights.detach().requires_grad_()
    out = contender.forward(x, batch.topk_ids, topk_weights)
    gradients = torch.autograd.grad(out, [x, topk_weights, *contender.lora_leaves()], batch.dout.to(out.dtype))
    return [out.detach(), *gradients]


def answers(contender: TorchLayer | OurLayer, batch: Batch) -> list[Tensor]:
    """`step` with LoRA gradients in canonical layout, to compare contenders."""
    out, dx, dtopk_weights, *lora = step(contender, batch)
    return [out, dx, dtopk_weights, *contender.canonical(lora)]


def worst_error(got: list[Tensor], expected: list[Tensor]) -> float:
    """Largest over the tensors of: norm of the difference / norm of the expected tensor. NaN counts as infinite."""
    errors = [((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(got, expected, strict=True)]
    return max(error if error == error else float("inf") for error in errors)
