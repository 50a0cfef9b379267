"""Random layers, and one call of the product on them next to the truth."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kt_sft.autograd.moe import join, submit
from kt_sft.autograd.settings import LoraOperands, LoraTensors, MoeSettings, native_projections
from kt_sft.native import native
from tests.helpers.reference import CLAMP_ALPHA, CLAMP_LIMIT, Problem


def marked(isa: str, value: object, name: str | None = None) -> object:
    """A value of `parametrize`; with the mark `amx` where the kernels of this level are meant."""
    return pytest.param(value, id=name or isa, marks=[pytest.mark.amx] if isa.startswith("amx") else [])


LEVELS = ("scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
ISAS = [marked(isa, isa) for isa in LEVELS]
# Weight format, group and rows: all that the kernels compute.
FORMATS = [
    ("bf16", 0, "bf16"),
    ("int8", 0, "bf16"),
    ("int8", 0, "int8"),
    ("int4", 32, "bf16"),
    ("int4", 64, "bf16"),
    ("int4", 32, "int8"),
    ("int4", 128, "int8"),
    ("int8", 0, "bfp16"),
    ("int4", 32, "bfp16"),
]


def format_id(value: tuple[str, int, str]) -> str:
    kind, group, rows = value
    return f"{kind}{f'g{group}' if group else ''}-rows_{rows}"


@contextmanager
def using_isa(name: str) -> Iterator[None]:
    """Kernels up to this level; skips the test on a CPU without it."""
    library = native()
    if name not in ("auto", *library.isa_detected()):
        pytest.skip(f"this CPU lacks {name}: it has {', '.join(library.isa_detected())}")
    library.set_isa(name)
    try:
        yield
    finally:
        library.set_isa("auto")


@contextmanager
def using_threads(threads: int, pools: int = 1) -> Iterator[None]:
    """That many threads in as many pools, more than the machine has CPUs if need be."""
    library = native()
    before = library.num_threads(), library.num_pools()
    library.set_threads(threads, pools, fake_nodes=True)
    try:
        yield
    finally:
        library.set_threads(*before)


@dataclass(frozen=True)
class LayerCase:
    """Sizes of one test; sides differ and are no multiples of tiles."""

    experts: int = 5
    hidden: int = 52
    inter: int = 37
    tokens: int = 23
    top_k: int = 3
    rank: int = 5
    lora: str = "fused"  # fused | separate | down | gate | none
    p: float = 0.0
    sentinel: bool = True
    seed: int = 0
    format: str = "bf16"
    group: int = 0
    rows: str = "bf16"
    activation: str = "silu"
    bias: bool = False

    def terms(self) -> int:
        """Of the longest sum."""
        return max(self.hidden, self.inter, self.tokens)


def with_format(case: LayerCase, value: tuple[str, int, str]) -> LayerCase:
    return dataclasses.replace(case, format=value[0], group=value[1], rows=value[2])


def f32_randn(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    """f32 values in float64."""
    return (torch.randn(*shape, generator=generator) * scale).double()


def bf16_randn(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    """bf16 values in float64."""
    return f32_randn(generator, *shape, scale=scale).to(torch.bfloat16).double()


def make_problem(case: LayerCase) -> Problem:
    """Random float64 problem: bf16 activations, f32 LoRA; weights before a layer quantises them (`stored`)."""
    g = torch.Generator().manual_seed(case.seed)
    e, h, i, r = case.experts, case.hidden, case.inter, case.rank
    lora = {}
    if case.lora in ("fused", "separate", "gate"):
        lora["gate"] = (f32_randn(g, e, r, h, scale=h**-0.5), f32_randn(g, e, r, i, scale=r**-0.5), 1.5)
    if case.lora == "fused":
        lora["up"] = (lora["gate"][0], f32_randn(g, e, r, i, scale=r**-0.5), 1.5)
    elif case.lora == "separate":
        lora["up"] = (f32_randn(g, e, r + 2, h, scale=h**-0.5), f32_randn(g, e, r + 2, i, scale=r**-0.5), 0.75)
    if case.lora in ("fused", "separate", "down"):
        lora["down"] = (f32_randn(g, e, r, i, scale=i**-0.5), f32_randn(g, e, r, h, scale=r**-0.5), 0.7)
    bias = {"gate": f32_randn(g, e, i), "up": f32_randn(g, e, i), "down": f32_randn(g, e, h)} if case.bias else None
    return Problem(
        x=bf16_randn(g, case.tokens, h),
        ids=torch.randint(0, e + case.sentinel, (case.tokens, case.top_k), generator=g),
        weights=torch.rand(case.tokens, case.top_k, generator=g).double(),
        gate=bf16_randn(g, e, i, h, scale=h**-0.5),
        up=bf16_randn(g, e, i, h, scale=h**-0.5),
        down=bf16_randn(g, e, h, i, scale=i**-0.5),
        dout=bf16_randn(g, case.tokens, h),
        lora=lora,
        shares_a=case.lora == "fused",
        p=case.p,
        seed=987654321 + case.seed,
        format=case.format,
        group=case.group,
        rows=case.rows,
        activation=case.activation,
        bias=bias,
    )


def make_layer(problem: Problem):
    """A native layer over a store with the problem's weights."""
    layer = empty_layer(problem)
    for e in range(layer.num_experts):
        matrices = (problem.gate, problem.up, problem.down)
        layer.store.load_expert(e, *(t[e].to(torch.bfloat16).contiguous() for t in matrices))
    return layer


def empty_layer(problem: Problem, names: str | tuple[str, str, str] | None = None):
    """A native layer for the problem, whose store has no weights yet; names: of formats, if not the problem's."""
    experts, inter, hidden = problem.gate.shape
    store = native().ExpertStore(experts, hidden, inter, names or problem.format, problem.group or 32)
    return native().MoeLayer(store, problem.activation, CLAMP_ALPHA, CLAMP_LIMIT)


def stored(problem: Problem, layer) -> Problem:
    """The problem with the weights that the layer holds."""
    result = dataclasses.replace(problem, **{n: torch.empty_like(getattr(problem, n)) for n in ("gate", "up", "down")})
    for e in range(problem.gate.shape[0]):
        parts = [torch.empty(t.shape[1:]) for t in (problem.gate, problem.up, problem.down)]
        layer.store.unpack_expert(e, *parts, dtype="f32")
        result.gate[e], result.up[e], result.down[e] = (t.double() for t in parts)
    return result


def lora_inputs(problem: Problem) -> tuple[tuple, dict[str, Tensor]]:
    """Leaves in the order of `kt_sft.autograd.moe`, and by name; fused: gate_b is [experts, rank, 2 * inter]."""
    leaf = {}
    for name, (a, b, _) in problem.lora.items():
        leaf[f"{name}_a"], leaf[f"{name}_b"] = a.float().requires_grad_(), b.float().requires_grad_()
    if problem.shares_a:
        leaf["gate_b"] = torch.cat([leaf["gate_b"], leaf.pop("up_b")], dim=-1).detach().requires_grad_()
        del leaf["up_a"]
    order = ("gate_a", "gate_b", "up_a", "up_b", "down_a", "down_b")
    return tuple(leaf.get(name) for name in order), leaf


class MoeCall:
    """What `submit` takes beside the tensors of a call, with LoRA factors that nobody stores."""

    def __init__(self, layer, *, scales=(1.0, 1.0, 1.0), seed=0, bias=None, **settings):
        self.layer, self.scales, self.seed, self.bias = layer, scales, seed, bias
        self.settings = MoeSettings(**settings)

    def submit(self, x: Tensor, ids: Tensor, weights: Tensor, factors: LoraTensors = (None,) * 6, **more):
        operands = tuple(None if t is None else t.detach().cpu().float().contiguous().clone() for t in factors)
        return submit(
            x, ids, weights, self.layer, self.settings, factors=factors, seed=self.seed, bias=self.bias,
            lora=LoraOperands(native_projections(operands, self.scales, self.layer.inter)), **more,
        )  # fmt: skip


def moe(x: Tensor, ids: Tensor, weights: Tensor, factors: LoraTensors, call: MoeCall) -> Tensor:
    """Submit and join with nothing between."""
    return join(call.submit(x, ids, weights, factors))


def make_call(problem: Problem, layer, *, retain: bool = True, chunk_size: int = 1024) -> MoeCall:
    scales = tuple(problem.lora[name][2] if name in problem.lora else 0.0 for name in ("gate", "up", "down"))
    bias = None if problem.bias is None else tuple(problem.bias[name].float() for name in ("gate", "up", "down"))
    return MoeCall(
        layer, rows=problem.rows, scales=scales, dropout=problem.p, seed=problem.seed, retain=retain,
        chunk_size=chunk_size, bias=bias,
    )  # fmt: skip


def run(
    problem: Problem, layer=None, *, dtype=torch.float32, retain=True, chunk_size=1024, backward=True
) -> dict[str, Tensor]:
    """Output and gradients of the product, named as in `reference.solve`."""
    layer = layer if layer is not None else make_layer(problem)
    call = make_call(problem, layer, retain=retain, chunk_size=chunk_size)
    lora, leaf = lora_inputs(problem)
    x = problem.x.to(dtype).requires_grad_()
    weights = problem.weights.float().requires_grad_()
    out = moe(x, problem.ids, weights, lora, call)
    result = {"out": out.detach()}
    if not backward:
        return result
    out.backward(problem.dout.to(dtype))
    result |= {"dx": x.grad, "dweights": weights.grad}
    for name, tensor in leaf.items():
        result[f"d{name}"] = tensor.grad
    if problem.shares_a:
        inter = problem.gate.shape[1]
        fused = result.pop("dgate_b")
        result["dgate_b"], result["dup_b"] = fused[..., :inter], fused[..., inter:]
    return result
