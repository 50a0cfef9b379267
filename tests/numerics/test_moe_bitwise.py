"""Equal bit by bit: any number of threads, both tape policies, inference and training, chunks, other tokens."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kt_sft.native import native
from tests.helpers.layers import (
    FORMATS,
    LayerCase,
    format_id,
    make_layer,
    make_problem,
    run,
    using_isa,
    using_threads,
    with_format,
)
from tests.helpers.tolerance import rel_l2


@pytest.fixture(params=[one for one in FORMATS if one[2] != "bfp16"], ids=format_id)
def summed_in_one_order(request) -> tuple[str, int, str]:
    """Block floating point is taken for few rows only."""
    return request.param


@pytest.fixture
def vector_isa():
    """Vector kernels sum in one order for any number of rows; dot and tile kernels, chosen by that number, do not."""
    with using_isa("avx512" if "avx512" in native().isa_detected() else "auto"):
        yield


def assert_same(a: dict, b: dict) -> None:
    assert set(a) == set(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize(
    "case",
    [
        LayerCase(seed=20),
        LayerCase(tokens=300, top_k=2, experts=3, p=0.2, seed=21),
        LayerCase(experts=8, hidden=260, inter=200, tokens=1, top_k=8, rank=8, sentinel=False, seed=22),
    ],
    ids=["small", "blocks", "decode"],
)
def test_one_thread_equals_many(case, weights):
    problem = make_problem(with_format(case, weights))
    layer = make_layer(problem)
    results = []
    for threads in (1, 2, 3, 7):
        with using_threads(threads):
            assert native().num_threads() == threads
            results.append(run(problem, layer))
    for other in results[1:]:
        assert_same(results[0], other)


@pytest.mark.parametrize("pools", [2, 3])
def test_pools_agree_with_one_pool(pools, weights):
    """Every pool sums its own columns of inter; f32 sums are cut there. int8 rows of down have a scale per pool."""
    case = LayerCase(experts=4, hidden=150, inter=400, tokens=40, top_k=2, rank=6, seed=23)
    problem = make_problem(with_format(case, weights))
    one = run(problem)
    with using_threads(2 * pools, pools):
        layer = make_layer(problem)
        assert layer.store.num_shards == pools
        many = run(problem, layer)
        assert_same(many, run(problem, layer))
    with using_threads(pools, pools):
        assert_same(many, run(problem, layer))
    # Values on a rounding boundary may fall to the other side; int8 weights are other ones with every shard.
    kind, _, rows = weights
    bound = 1e-4 if rows != "int8" and kind != "int8" else 2e-2
    for name in one:
        assert rel_l2(many[name], one[name]) <= bound, name


def test_a_layer_made_with_pools_works_with_another_number_of_them():
    problem = make_problem(LayerCase(hidden=70, inter=300, seed=24))
    with using_threads(2, 2):
        layer = make_layer(problem)
        want = run(problem, layer)
    assert_same(run(problem, layer), want)
    with using_threads(3, 3):
        assert_same(run(problem, layer), want)


@pytest.mark.parametrize("chunk", [1, 4, 7, 22, 23])
def test_results_do_not_depend_on_chunks(chunk, summed_in_one_order, vector_isa):
    problem = make_problem(with_format(LayerCase(p=0.2, seed=25), summed_in_one_order))
    layer = make_layer(problem)
    whole, parts = run(problem, layer), run(problem, layer, chunk_size=chunk)
    for name in ("out", "dx", "dweights"):
        assert torch.equal(whole[name], parts[name]), name
    for name in whole:
        assert rel_l2(parts[name], whole[name]) <= 1e-6, name


def test_retain_equals_recompute(weights):
    problem = make_problem(with_format(LayerCase(p=0.2, seed=26), weights))
    layer = make_layer(problem)
    assert_same(run(problem, layer, retain=True), run(problem, layer, retain=False))


@pytest.mark.parametrize("lora", ["fused", "none"])
def test_inference_equals_forward(lora, weights):
    problem = make_problem(with_format(LayerCase(lora=lora, seed=27), weights))
    layer = make_layer(problem)
    trained = run(problem, layer)["out"]
    with torch.no_grad():
        assert torch.equal(run(problem, layer, backward=False)["out"], trained)


def test_a_token_alone_equals_the_token_in_a_batch(summed_in_one_order, vector_isa):
    problem = make_problem(with_format(LayerCase(seed=28, hidden=130, inter=70, tokens=9), summed_in_one_order))
    layer = make_layer(problem)
    whole = run(problem, layer)
    for t in (0, 4, 8):
        rows = {n: getattr(problem, n)[t : t + 1] for n in ("x", "ids", "weights", "dout")}
        alone = run(dataclasses.replace(problem, **rows), layer)
        for name in ("out", "dx", "dweights"):
            assert torch.equal(alone[name][0], whole[name][t]), name


def test_two_calls_give_the_same(weights):
    problem = make_problem(with_format(LayerCase(p=0.1, seed=29), weights))
    layer = make_layer(problem)
    assert_same(run(problem, layer), run(problem, layer))


def test_steps_of_fixed_shape_allocate_nothing_native(weights):
    problem = make_problem(with_format(LayerCase(seed=38), weights))
    layer = make_layer(problem)
    run(problem, layer)
    growths = native().workspace_growths()
    for _ in range(3):
        run(problem, layer)
    assert native().workspace_growths() == growths
