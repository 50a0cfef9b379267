"""Output and every gradient against float64, per format, instruction set, LoRA form, dropout and tape policy."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kt_sft.native import native
from tests.helpers.layers import (
    FORMATS,
    ISAS,
    LayerCase,
    make_layer,
    make_problem,
    run,
    stored,
    using_isa,
    using_threads,
    with_format,
)
from tests.helpers.reference import EXACT, GATES, KERNELS, Problem, solve
from tests.helpers.tolerance import BF16_HALF_ULP, model_bound, rel_l2, rounding_bound, rounds_scaled_gradients

OUTPUT_BAR, GRADIENT_BAR = 4e-3, 1e-2  # against the rounding model; model_bound is below them at these sizes


@pytest.fixture(params=ISAS)
def isa(request):
    with using_isa(request.param):
        yield request.param


def check(case: LayerCase, got: dict, problem) -> None:
    """Against both truths; `problem` has the stored weights."""
    model = solve(problem, KERNELS)
    plain = solve(problem, dataclasses.replace(EXACT, int8_rows=KERNELS.int8_rows))
    assert set(got) == set(model)
    for name, value in got.items():
        error, bar = rel_l2(value, model[name]), OUTPUT_BAR if name == "out" else GRADIENT_BAR
        bound = model_bound(name, case.terms(), case.rows, case.format)
        assert error <= min(bar, bound), f"{name}: {error:.2e} from the rounding model, bound {bound:.1e}"
        # Where h becomes integers, the plain maths rounds another h than the kernels; a mean needs some tokens.
        if case.rows == "bf16" and case.tokens >= 16:
            assert rel_l2(value, plain[name]) <= rounding_bound(name, case.format), f"{name}: from float64"


def run_and_check(case: LayerCase, **options) -> None:
    problem = make_problem(case)
    layer = make_layer(problem)
    check(case, run(problem, layer, **options), stored(problem, layer))


CASES = [
    LayerCase(),
    LayerCase(lora="separate", rank=7, seed=1),
    LayerCase(lora="none", seed=2),
    LayerCase(lora="down", rank=1, seed=3),
    LayerCase(lora="gate", rank=3, seed=4),
    LayerCase(p=0.3, seed=5),
    LayerCase(lora="separate", p=0.1, seed=6),
    LayerCase(
        experts=3, hidden=300, inter=261, tokens=61, top_k=2, rank=9, seed=7
    ),  # several sum blocks, tails everywhere
    LayerCase(experts=2, hidden=33, inter=65, tokens=210, top_k=2, rank=2, seed=8),  # several row blocks per expert
    LayerCase(experts=9, hidden=31, inter=16, tokens=1, top_k=4, rank=17, seed=9),
]


def case_id(case: LayerCase) -> str:
    return f"{case.lora}-h{case.hidden}-i{case.inter}-t{case.tokens}-r{case.rank}-p{case.p}"


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_output_and_gradients_match_float64(isa, weights, case):
    run_and_check(with_format(case, weights), retain=case.seed % 2 == 0, chunk_size=97)


@pytest.mark.parametrize("activation", list(GATES))
def test_every_gate_function(isa, activation):
    run_and_check(LayerCase(tokens=41, p=0.2, seed=15, activation=activation))
    run_and_check(LayerCase(seed=16, lora="separate", activation=activation), retain=False)


@pytest.mark.parametrize("pools", [1, 2])
def test_biases(isa, weights, pools):
    """With several pools the bias of down is added once, and the columns of the others are those of the shard."""
    case = LayerCase(inter=173, tokens=41, p=0.2, seed=17, activation="clamped_swiglu", bias=True)
    with using_threads(2, pools):
        run_and_check(with_format(case, weights), retain=pools == 1, chunk_size=30)


@pytest.mark.parametrize("rank", [1, 2, 8, 12, 32, 64, 255, 256])
def test_any_rank(rank):
    run_and_check(LayerCase(experts=3, hidden=40, inter=24, tokens=9, top_k=2, rank=rank, seed=rank))


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 16, 33])
def test_any_number_of_rows(isa, weights, tokens):
    """All on one expert: each number of rows may have another kernel."""
    case = LayerCase(experts=1, hidden=96, inter=72, tokens=tokens, top_k=1, sentinel=False, seed=40 + tokens)
    run_and_check(with_format(case, weights))


SHAPES = dict(
    experts=st.integers(1, 9), hidden=st.integers(1, 200), inter=st.integers(1, 200), tokens=st.integers(1, 40),
    top_k=st.integers(1, 4), rank=st.integers(1, 40), lora=st.sampled_from(["fused", "separate", "none", "down"]),
    p=st.sampled_from([0.0, 0.25]), chunk=st.integers(1, 50), weights=st.sampled_from(FORMATS),
    retain=st.booleans(), seed=st.integers(0, 10**6),
)  # fmt: skip


def check_random_shape(experts, hidden, inter, tokens, top_k, rank, lora, p, chunk, weights, retain, seed) -> None:
    case = with_format(LayerCase(experts, hidden, inter, tokens, top_k, rank, lora, p, True, seed), weights)
    problem = make_problem(case)
    layer = make_layer(problem)
    got = run(problem, layer, chunk_size=chunk, retain=retain)
    problem = stored(problem, layer)
    model = solve(problem, KERNELS)
    spread = spread_of_scaled_gradients(problem, model) if rounds_scaled_gradients(case.format) else {}
    # Few values: one that moves by an ulp, or a row whose largest one does, weighs more than model_bound assumes.
    moved = 2.0**-8 if case.rows == "bf16" else 2.0**-6
    for name, value in got.items():
        size = model[name].norm().item()
        assert (value.double() - model[name]).norm().item() <= moved * size + spread.get(name, 0.0) + 1e-6, name


def spread_of_scaled_gradients(problem: Problem, model: dict) -> dict[str, float]:
    """How far the rounding of dy * scale may move each result of these very values, in the L2 norm.

    Which rows are rounded depends on the kernel that a block of rows gets, so the model leaves the step out. Relative
    errors up to one rounding's at random, of half again its deviation: the largest of eight draws, four times. A bound
    relative to the result would not do: a gradient is a sum over tokens and may cancel.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(dy: torch.Tensor) -> torch.Tensor:
        return dy * (1 + BF16_HALF_ULP * (2 * torch.rand(dy.shape, generator=generator, dtype=dy.dtype) - 1))

    rounding = dataclasses.replace(KERNELS, scaled_gradient=noise)
    draws = [solve(problem, rounding) for _ in range(8)]
    return {name: 4 * max((draw[name] - value).norm().item() for draw in draws) for name, value in model.items()}


@settings(max_examples=50, deadline=None, derandomize=True)
@given(**SHAPES)
def test_random_shapes_match_the_rounding_model(**drawn):
    check_random_shape(**drawn)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None)
@given(**SHAPES)
def test_many_random_shapes_match_the_rounding_model(**drawn):
    check_random_shape(**drawn)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_input_dtypes_come_back(dtype):
    problem = make_problem(LayerCase(seed=11))
    got, model = run(problem, dtype=dtype), solve(problem, KERNELS)
    assert got["out"].dtype == dtype and got["dx"].dtype == dtype
    extra = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}[dtype]
    assert rel_l2(got["out"], model["out"]) <= model_bound("out", 52) + extra
    assert rel_l2(got["dx"], model["dx"]) <= model_bound("dx", 52) + extra


def test_isas_agree(weights):
    case = with_format(LayerCase(experts=4, hidden=200, inter=150, tokens=40, rank=8, seed=12), weights)
    problem, results = make_problem(case), {}
    layer = make_layer(problem)
    for name in native().isa_detected():
        with using_isa(name):
            results[name] = run(problem, layer), rounds_scaled_gradients(case.format)
    first, _ = results.pop("scalar")
    for name, (got, rounds) in results.items():
        for key, value in got.items():
            bar = 1e-3 if key == "out" or not rounds else 1e-3 + BF16_HALF_ULP
            assert rel_l2(value, first[key]) <= bar, f"{name} {key}"


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_directional_finite_difference(kind):
    """Along a random direction of x and weights at once, the unrounded float64 loss changes as our gradients say."""
    case = LayerCase(seed=13, sentinel=False, format=kind)
    problem = make_problem(case)
    layer = make_layer(problem)
    got, problem = run(problem, layer), stored(problem, layer)
    g = torch.Generator().manual_seed(0)
    direction = {
        "x": torch.randn(problem.x.shape, generator=g).double(),
        "weights": torch.randn(problem.weights.shape, generator=g).double(),
    }
    step = 1e-5

    def loss(sign: float) -> float:
        moved = dataclasses.replace(
            problem,
            x=problem.x + sign * step * direction["x"],
            weights=problem.weights + sign * step * direction["weights"],
        )
        return (solve(moved, EXACT)["out"] * problem.dout).sum().item()

    slope = (loss(1) - loss(-1)) / (2 * step)
    ours = (got["dx"].double() * direction["x"]).sum() + (got["dweights"].double() * direction["weights"]).sum()
    mass = (
        got["dx"].double().norm() * direction["x"].norm()
        + got["dweights"].double().norm() * direction["weights"].norm()
    ).item()
    assert abs(ours.item() - slope) <= rounding_bound("dx", kind) * mass


def test_a_zeroed_kernel_would_be_seen():
    """The comparison itself: a result with one expert's columns missing is far outside of the bounds."""
    case = LayerCase(seed=14)
    problem = make_problem(case)
    layer = make_layer(problem)
    zero = torch.zeros(case.hidden, case.inter, dtype=torch.bfloat16)
    layer.store.load_expert(0, torch.zeros_like(zero.T.contiguous()), torch.zeros_like(zero.T.contiguous()), zero)
    with pytest.raises(AssertionError):
        check(case, run(problem, layer), problem)
