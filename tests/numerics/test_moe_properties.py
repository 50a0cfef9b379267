"""What must hold exactly: edge cases of routing, bitwise equalities, errors."""

from __future__ import annotations

import pytest
import torch

from kt_sft.native import native
from kt_sft.ops.moe import NO_LORA, MoeCall, moe, to_operand
from tests.helpers.layers import LayerCase, lora_inputs, make_layer, make_problem, run
from tests.helpers.reference import solve
from tests.helpers.tolerance import model_bound, rel_l2


def assert_same(a: dict, b: dict) -> None:
    assert set(a) == set(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture
def restore_threads():
    before = native().num_threads()
    yield
    native().set_threads(before, 1)


@pytest.mark.parametrize(
    "case", [LayerCase(seed=20), LayerCase(tokens=300, top_k=2, experts=3, p=0.2, seed=21)], ids=["small", "blocks"]
)
def test_one_thread_equals_many_bitwise(case, restore_threads):
    problem = make_problem(case)
    results = []
    for threads in (1, 2, 3, 7):
        native().set_threads(threads, 1)
        results.append(run(problem))
    for other in results[1:]:
        assert_same(results[0], other)


@pytest.mark.parametrize("chunk", [1, 4, 7, 22, 23])
def test_results_do_not_depend_on_chunks(chunk):
    problem = make_problem(LayerCase(p=0.2, seed=22))
    whole, parts = run(problem), run(problem, chunk_size=chunk)
    for name in ("out", "dx", "dweights"):
        assert torch.equal(whole[name], parts[name]), name
    for name in whole:
        assert rel_l2(parts[name], whole[name]) <= 1e-6, name


def test_retain_equals_recompute_bitwise():
    problem = make_problem(LayerCase(p=0.2, seed=23))
    assert_same(run(problem, retain=True), run(problem, retain=False))


@pytest.mark.parametrize("lora", ["fused", "none"])
def test_inference_equals_forward_bitwise(lora):
    problem = make_problem(LayerCase(lora=lora, seed=24))
    layer = make_layer(problem)
    trained = run(problem, layer)["out"]
    with torch.no_grad():
        assert torch.equal(run(problem, layer, backward=False)["out"], trained)


def test_inference_keeps_no_tape():
    problem = make_problem(LayerCase(seed=25))
    layer = make_layer(problem)
    with torch.no_grad():
        out = moe(problem.x.float(), problem.ids, problem.weights.float(), lora_inputs(problem)[0], MoeCall(layer))
    assert out.grad_fn is None
    frozen = moe(problem.x.float(), problem.ids, problem.weights.float(), NO_LORA, MoeCall(layer))
    assert frozen.grad_fn is None


def test_two_forwards_before_one_backward():
    first, second = make_problem(LayerCase(seed=26)), make_problem(LayerCase(seed=27, tokens=11))
    second.gate, second.up, second.down = first.gate, first.up, first.down
    layer = make_layer(first)
    alone = [run(p, layer) for p in (first, second)]
    outs, inputs = [], []
    for p in (first, second):
        x = p.x.float().requires_grad_()
        lora, _ = lora_inputs(p)
        outs.append(moe(x, p.ids, p.weights.float(), lora, MoeCall(layer, scales=(1.5, 1.5, 0.7))))
        inputs.append(x)
    for out, p in zip(outs, (first, second), strict=True):
        out.backward(p.dout.float())
    for x, want in zip(inputs, alone, strict=True):
        assert torch.equal(x.grad, want["dx"])


def test_backward_twice_gives_the_same_gradients():
    problem = make_problem(LayerCase(seed=28))
    layer = make_layer(problem)
    x = problem.x.float().requires_grad_()
    out = moe(x, problem.ids, problem.weights.float(), lora_inputs(problem)[0], MoeCall(layer, scales=(1.5, 1.5, 0.7)))
    first = torch.autograd.grad(out, x, problem.dout.float(), retain_graph=True)[0]
    second = torch.autograd.grad(out, x, problem.dout.float())[0]
    assert torch.equal(first, second)


def test_no_tokens():
    case = LayerCase(tokens=0, seed=29)
    got = run(make_problem(case))
    assert got["out"].shape == (0, case.hidden) and got["dx"].shape == (0, case.hidden)
    for name, value in got.items():
        assert torch.count_nonzero(value) == 0, name


def test_only_sentinels_give_zero():
    problem = make_problem(LayerCase(seed=30))
    problem.ids = torch.full_like(problem.ids, 5)
    for name, value in run(problem).items():
        assert torch.count_nonzero(value) == 0, name


def test_expert_without_tokens_gets_zero_lora_grad():
    problem = make_problem(LayerCase(seed=31))
    problem.ids[problem.ids == 2] = 1
    got = run(problem)
    for name in ("dgate_a", "dgate_b", "dup_b", "ddown_a", "ddown_b"):
        assert torch.count_nonzero(got[name][2]) == 0, name
        assert torch.count_nonzero(got[name][1]) > 0, name


def test_all_rows_on_one_expert():
    case = LayerCase(tokens=250, top_k=1, seed=32)
    problem = make_problem(case)
    problem.ids = torch.full_like(problem.ids, 3)
    got, model = run(problem), solve(problem, rounding=True)
    for name, value in got.items():
        assert rel_l2(value, model[name]) <= model_bound(case.tokens), name


def test_a_repeated_id_counts_twice():
    problem = make_problem(LayerCase(seed=33, top_k=2, sentinel=False))
    problem.ids[:, 1] = problem.ids[:, 0]
    got, model = run(problem), solve(problem, rounding=True)
    for name, value in got.items():
        assert rel_l2(value, model[name]) <= model_bound(52), name


def test_zero_routing_weight_still_has_a_gradient():
    problem = make_problem(LayerCase(seed=34, sentinel=False))
    problem.weights[:, 0] = 0.0
    got, model = run(problem), solve(problem, rounding=True)
    assert torch.count_nonzero(got["dweights"][:, 0]) == problem.ids.shape[0]
    assert rel_l2(got["dweights"], model["dweights"]) <= model_bound(52)


def test_nan_in_one_token_stays_there():
    problem = make_problem(LayerCase(seed=35, sentinel=False))
    clean = run(problem)
    problem.x[4, 7] = float("nan")
    got = run(problem)
    bad = torch.zeros(problem.x.shape[0], dtype=torch.bool)
    bad[4] = True
    for name in ("out", "dx"):
        assert torch.isnan(got[name][bad]).all(), name
        assert torch.equal(got[name][~bad], clean[name][~bad]), name
    assert torch.isnan(got["dgate_a"]).any()


def test_nan_in_the_gradient_reaches_dx():
    problem = make_problem(LayerCase(seed=36, sentinel=False))
    problem.dout[6, 3] = float("nan")
    got = run(problem)
    assert torch.isnan(got["dx"][6]).all() and not torch.isnan(got["dx"][5]).any()


def test_small_integers_are_exact_through_the_down_projection():
    """Gate rows of huge values make silu(g) = g exactly, so that the whole layer is sums of small integers."""
    experts, hidden, inter = 3, 37, 21
    layer = native().MoeLayer(experts, hidden, inter)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randint(-2, 3, (inter, hidden), generator=g).bfloat16() for _ in range(experts)]
    downs = [torch.randint(-2, 3, (hidden, inter), generator=g).bfloat16() for _ in range(experts)]
    gates = [torch.full((inter, hidden), 64.0).bfloat16() for _ in range(experts)]
    for e in range(experts):
        layer.load_expert(e, gates[e], weights[e], downs[e])
    x = torch.zeros(8, hidden)
    x[torch.arange(8), torch.randint(0, hidden, (8,), generator=g)] = 1.0  # one-hot: u is a column of up, g = 64
    ids = torch.randint(0, experts, (8, 1), generator=g)
    out = moe(x, ids, torch.ones(8, 1), NO_LORA, MoeCall(layer))
    want = torch.stack(
        [64.0 * (downs[e].double() @ (weights[e].double() @ x[t].double())) for t, e in enumerate(ids[:, 0].tolist())]
    )
    assert torch.equal(out.double(), want)


def test_gradient_accumulates_in_f32():
    problem = make_problem(LayerCase(seed=37))
    layer = make_layer(problem)
    lora, leaf = lora_inputs(problem)
    for _ in range(16):
        out = moe(problem.x.float(), problem.ids, problem.weights.float(), lora, MoeCall(layer, scales=(1.5, 1.5, 0.7)))
        out.backward(problem.dout.float())
    once = run(problem, layer)
    assert rel_l2(leaf["down_b"].grad / 16, once["ddown_b"]) <= 1e-6


def test_steps_of_fixed_shape_allocate_nothing_native():
    problem = make_problem(LayerCase(seed=38))
    layer = make_layer(problem)
    run(problem, layer)
    growths = native().workspace_growths()
    for _ in range(3):
        run(problem, layer)
    assert native().workspace_growths() == growths


def test_unpack_returns_what_was_loaded():
    problem = make_problem(LayerCase(seed=39))
    layer = make_layer(problem)
    gate, up = (torch.empty(37, 52, dtype=torch.bfloat16) for _ in range(2))
    down = torch.empty(52, 37, dtype=torch.bfloat16)
    layer.unpack_expert(3, gate, up, down)
    assert torch.equal(gate.double(), problem.gate[3]) and torch.equal(up.double(), problem.up[3])
    assert torch.equal(down.double(), problem.down[3])


@pytest.mark.parametrize("experts, hidden, inter", [(64, 2048, 1408), (128, 2048, 768), (16, 7168, 2048)])
def test_packed_bytes_of_real_shapes_are_within_three_percent(experts, hidden, inter):
    own = experts * 3 * hidden * inter * 2
    assert own <= native().MoeLayer.packed_bytes_for(experts, hidden, inter) <= 1.03 * own


class TestErrors:
    """Every refusal names the argument, what was expected and what was found."""

    @pytest.fixture
    def layer(self):
        return make_layer(make_problem(LayerCase(seed=40)))

    def call(self, layer, x=None, ids=None, weights=None, lora=NO_LORA, **kwargs):
        x = torch.zeros(4, 52) if x is None else x
        ids = torch.zeros(4, 3, dtype=torch.int64) if ids is None else ids
        weights = torch.zeros(4, 3) if weights is None else weights
        with torch.no_grad():
            return moe(x, ids, weights, lora, MoeCall(layer, **kwargs))

    def test_wrong_hidden(self, layer):
        with pytest.raises(ValueError, match=r"x: expected shape \[4, 52\], got bf16 \[4, 51\]"):
            self.call(layer, x=torch.zeros(4, 51))

    def test_negative_id(self, layer):
        with pytest.raises(ValueError, match="topk_ids: expected ids >= 0"):
            self.call(layer, ids=torch.full((4, 3), -1))

    def test_weights_of_another_shape(self, layer):
        with pytest.raises(ValueError, match=r"topk_weights: expected shape \[4, 3\]"):
            self.call(layer, weights=torch.zeros(4, 2))

    def test_rank_beyond_256(self, layer):
        lora = (torch.zeros(5, 257, 52), torch.zeros(5, 257, 74), None, None, None, None)
        with pytest.raises(ValueError, match="rank 1..256"):
            self.call(layer, lora=lora, operands=tuple(to_operand(t) for t in lora))

    def test_lora_of_another_width(self, layer):
        lora = (torch.zeros(5, 4, 50), torch.zeros(5, 4, 74), None, None, None, None)
        with pytest.raises(ValueError, match=r"lora gate.a: expected shape \[5, any, 52\]"):
            self.call(layer, lora=lora)

    def test_dropout_of_one(self, layer):
        with pytest.raises(ValueError, match="dropout"):
            self.call(layer, dropout=1.0)

    def test_missing_experts(self):
        with pytest.raises(ValueError, match="no weights yet"):
            self.call(native().MoeLayer(5, 52, 37))

    def test_load_of_wrong_shape_and_dtype(self, layer):
        good, down = torch.zeros(37, 52, dtype=torch.bfloat16), torch.zeros(52, 37, dtype=torch.bfloat16)
        with pytest.raises(ValueError, match=r"up: expected shape \[37, 52\]"):
            layer.load_expert(0, good, good.T.contiguous(), down)
        with pytest.raises(ValueError, match="gate: expected dtype bf16, got f32"):
            layer.load_expert(0, good.float(), good, down)
        with pytest.raises(ValueError, match="out of range"):
            layer.load_expert(5, good, good, down)

    def test_unknown_isa_activation_and_format(self):
        with pytest.raises(ValueError, match="expected one of auto, scalar, avx2"):
            native().set_isa("sse2")
        with pytest.raises(ValueError, match="expected silu, got mish"):
            native().MoeLayer(1, 4, 4, "bf16", "mish")
        with pytest.raises(ValueError, match="expected bf16, int8 or int4, got fp3"):
            native().MoeLayer(1, 4, 4, "fp3", "silu")

    def test_more_pools_than_numa_nodes(self):
        with pytest.raises(ValueError, match="NUMA"):
            native().set_threads(2, 999)
