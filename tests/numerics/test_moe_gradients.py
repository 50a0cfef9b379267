"""Output and every gradient against float64, per instruction set, LoRA form, dropout and tape policy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kt_sft.native import native
from tests.helpers.layers import LayerCase, make_layer, make_problem, run
from tests.helpers.reference import solve
from tests.helpers.tolerance import model_bound, rel_l2, rounding_bound

ISAS = ("scalar", "avx2", "avx512")


@pytest.fixture(params=ISAS)
def isa(request):
    library = native()
    if request.param not in library.isa_detected():
        pytest.skip(f"this CPU lacks {request.param}: it has {', '.join(library.isa_detected())}")
    library.set_isa(request.param)
    yield request.param
    library.set_isa("auto")


def check(case: LayerCase, got: dict, problem) -> None:
    terms = max(case.hidden, case.inter, case.tokens)
    model, exact = solve(problem, rounding=True), solve(problem, rounding=False)
    assert set(got) == set(model)
    for name, value in got.items():
        assert rel_l2(value, model[name]) <= model_bound(terms), (
            f"{name}: {rel_l2(value, model[name]):.2e} from the rounding model"
        )
        assert rel_l2(value, exact[name]) <= rounding_bound(name), (
            f"{name}: {rel_l2(value, exact[name]):.2e} from float64"
        )


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


@pytest.mark.parametrize("retain", [True, False], ids=["retain", "recompute"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.lora}-h{c.hidden}-i{c.inter}-t{c.tokens}-r{c.rank}-p{c.p}")
def test_output_and_gradients_match_float64(isa, case, retain):
    problem = make_problem(case)
    check(case, run(problem, retain=retain, chunk_size=97), problem)


@pytest.mark.parametrize("rank", [1, 2, 8, 12, 32, 64, 255, 256])
def test_any_rank(rank):
    case = LayerCase(experts=3, hidden=40, inter=24, tokens=9, top_k=2, rank=rank, seed=rank)
    problem = make_problem(case)
    check(case, run(problem), problem)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    experts=st.integers(1, 9), hidden=st.integers(1, 130), inter=st.integers(1, 130), tokens=st.integers(1, 40),
    top_k=st.integers(1, 4), rank=st.integers(1, 40), lora=st.sampled_from(["fused", "separate", "none", "down"]),
    p=st.sampled_from([0.0, 0.25]), chunk=st.integers(1, 50), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_random_shapes_match_the_rounding_model(experts, hidden, inter, tokens, top_k, rank, lora, p, chunk, seed):
    case = LayerCase(experts, hidden, inter, tokens, top_k, rank, lora, p, True, seed)
    problem = make_problem(case)
    got, model = run(problem, chunk_size=chunk), solve(problem, rounding=True)
    for name, value in got.items():
        size = model[name].norm().item()
        # Few values: one that moves by an ulp weighs more than in the average that model_bound assumes.
        assert (value.double() - model[name]).norm().item() <= 2.0**-8 * size + 1e-6, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_input_dtypes_come_back(dtype):
    problem = make_problem(LayerCase(seed=11))
    got, model = run(problem, dtype=dtype), solve(problem, rounding=True)
    assert got["out"].dtype == dtype and got["dx"].dtype == dtype
    extra = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-11, torch.float32: 0.0}[dtype]
    assert rel_l2(got["out"], model["out"]) <= model_bound(52) + extra
    assert rel_l2(got["dx"], model["dx"]) <= model_bound(52) + extra


def test_isas_agree():
    problem = make_problem(LayerCase(experts=4, hidden=200, inter=150, tokens=40, rank=8, seed=12))
    library, results = native(), {}
    for name in library.isa_detected():
        library.set_isa(name)
        results[name] = run(problem)
    library.set_isa("auto")
    first = results.pop("scalar")
    for name, got in results.items():
        for key, value in got.items():
            assert rel_l2(value, first[key]) <= 1e-3, f"{name} {key}"


def test_directional_finite_difference():
    """Along a random direction of x and weights at once, the unrounded float64 loss changes as our gradients say."""
    problem = make_problem(LayerCase(seed=13, sentinel=False))
    got = run(problem)
    g = torch.Generator().manual_seed(0)
    direction = {
        "x": torch.randn(problem.x.shape, generator=g).double(),
        "weights": torch.randn(problem.weights.shape, generator=g).double(),
    }
    step = 1e-5

    def loss(sign: float) -> float:
        moved = make_problem(LayerCase(seed=13, sentinel=False))
        moved.x = problem.x + sign * step * direction["x"]
        moved.weights = problem.weights + sign * step * direction["weights"]
        return (solve(moved, rounding=False)["out"] * problem.dout).sum().item()

    slope = (loss(1) - loss(-1)) / (2 * step)
    ours = (got["dx"].double() * direction["x"]).sum() + (got["dweights"].double() * direction["weights"]).sum()
    mass = (
        got["dx"].double().norm() * direction["x"].norm()
        + got["dweights"].double().norm() * direction["weights"].norm()
    ).item()
    assert abs(ours.item() - slope) <= rounding_bound("dx") * mass


def test_a_zeroed_kernel_would_be_seen():
    """The comparison itself: a result with one expert's columns missing is far outside of the bounds."""
    case = LayerCase(seed=14)
    problem = make_problem(case)
    layer = make_layer(problem)
    zero = torch.zeros(case.hidden, case.inter, dtype=torch.bfloat16)
    layer.load_expert(0, torch.zeros_like(zero.T.contiguous()), torch.zeros_like(zero.T.contiguous()), zero)
    with pytest.raises(AssertionError):
        check(case, run(problem, layer), problem)
