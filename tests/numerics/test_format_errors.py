"""What the weight formats cost, and that the layer stores what the quantisers' formulas say."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.helpers.layers import LayerCase, make_layer, make_problem, run, stored
from tests.helpers.quantizers import int4_groups, int8_rows
from tests.helpers.reference import EXACT, round_bf16, solve
from tests.helpers.tolerance import rel_l2

# Whole layer, Gaussian weights, output against the layer before quantisation (docs/numerics.md has measured values).
LAYER_BARS = {
    ("int8", 0, "bf16"): 1.7e-2,
    ("int8", 0, "int8"): 3e-2,
    ("int4", 32, "bf16"): 0.16,
    ("int4", 64, "bf16"): 0.175,
    ("int4", 128, "bf16"): 0.19,
    ("int4", 32, "int8"): 0.165,
}
SIZES = [(256, 512), (2048, 768)]


def format_error(hidden: int, inter: int, kind: str, group: int, rows: str) -> float:
    case = LayerCase(2, hidden, inter, 32, 2, lora="none", sentinel=False, seed=60, format=kind, group=group, rows=rows)
    problem = make_problem(case)
    want = solve(problem, EXACT)["out"]
    return rel_l2(run(problem, dtype=torch.bfloat16, backward=False)["out"], want)


@pytest.mark.parametrize("weights", LAYER_BARS, ids=lambda w: f"{w[0]}g{w[1]}-rows_{w[2]}")
@pytest.mark.parametrize("hidden, inter", SIZES)
def test_error_of_the_format_over_the_whole_layer(hidden, inter, weights):
    assert format_error(hidden, inter, *weights) <= LAYER_BARS[weights]


def layer_and_stored(kind: str, group: int = 32, edit=lambda problem: None):
    problem = make_problem(LayerCase(experts=2, hidden=300, inter=140, tokens=1, seed=61, format=kind, group=group))
    edit(problem)
    for w in (problem.gate, problem.up, problem.down):
        w.copy_(round_bf16(w))
    layer = make_layer(problem)
    return layer, problem, stored(problem, layer)


def add_odd_rows(problem) -> None:
    problem.gate[0, 5] = 0.0
    problem.up[1, 7] *= 20.0
    problem.down[0, 2, 1:] = 0.0
    problem.gate[1, 3, :40] = 0.0
    problem.gate[1, 4] *= 2.0**-30


def test_int8_weights_are_those_of_the_formula():
    _, problem, got = layer_and_stored("int8", edit=add_odd_rows)
    for name in ("gate", "up", "down"):
        q, scale = int8_rows(getattr(problem, name))
        assert torch.equal(getattr(got, name), (q.float() * scale.float()).double()), name


@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_weights_are_the_best_candidate(group):
    """The f32 search may prefer another candidate where two are equally good."""
    _, problem, got = layer_and_stored("int4", group, add_odd_rows)
    for name in ("gate", "up", "down"):
        for w, held in zip(getattr(problem, name), getattr(got, name), strict=True):
            best, error = int4_groups(w, group)
            same = (best == held).double().mean().item()
            assert same >= 0.995, f"{name}: {same}"
            pad = -w.shape[1] % group
            difference = torch.nn.functional.pad(w - held, (0, pad)).reshape(w.shape[0], -1, group)
            assert (difference.square().sum(-1) <= error * (1 + 1e-5)).all(), name


@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_weights_are_bf16_numbers(group):
    """Scales have five significant bits, so every kernel multiplies with the very same weights."""
    layer, problem, got = layer_and_stored("int4", group, add_odd_rows)
    for e in range(2):
        rounded = [torch.empty(t.shape[1:], dtype=torch.bfloat16) for t in (got.gate, got.up, got.down)]
        layer.store.unpack_expert(e, *rounded)
        for held, half in zip((got.gate[e], got.up[e], got.down[e]), rounded, strict=True):
            assert torch.equal(held, half.double())


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(kind, bad):
    def spoil(problem) -> None:
        problem.up[1, 3, 4] = bad

    with pytest.raises(ValueError, match="finite"):
        layer_and_stored(kind, edit=spoil)


@pytest.mark.parametrize("kind, exponent", [("int8", -110), ("int8", 100), ("int4", -110), ("int4", 100)])
def test_weights_of_any_magnitude(kind, exponent):
    """Nothing overflows or underflows on the way to the scale."""

    def scale(problem) -> None:
        problem.gate *= 2.0**exponent

    _, problem, got = layer_and_stored(kind, edit=scale)
    assert rel_l2(got.gate, problem.gate) <= (0.01 if kind == "int8" else 0.13)


@pytest.mark.parametrize("kind, group", [("int8", 0), ("int4", 32), ("int4", 128)])
def test_rows_are_quantised_by_themselves(kind, group):
    """A row's weights are the same whatever its neighbours are."""
    _, _, plain = layer_and_stored(kind, group or 32)

    def enlarge(problem) -> None:
        problem.gate[:, 3] *= 20

    _, _, with_outlier = layer_and_stored(kind, group or 32, enlarge)
    others = torch.arange(plain.gate.shape[1]) != 3
    assert torch.equal(plain.gate[:, others], with_outlier.gate[:, others])


def test_int8_rows_differ_from_bf16_rows():
    """The setting reaches the kernels."""
    problem = make_problem(LayerCase(seed=62, format="int8"))
    layer = make_layer(problem)
    with torch.no_grad():
        outs = [run(dataclasses.replace(problem, rows=r), layer, backward=False)["out"] for r in ("bf16", "int8")]
    assert 1e-3 < rel_l2(*outs) < 3e-2


def test_int8_rows_need_integer_weights():
    problem = make_problem(LayerCase(seed=63, rows="int8"))
    with pytest.raises(ValueError, match="rows: int8 needs int8 or int4 weights"):
        run(problem)
