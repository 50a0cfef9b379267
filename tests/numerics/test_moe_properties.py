"""Edge cases of routing and of values, exact small integers, errors."""

from __future__ import annotations

import pytest
import torch

from kt_sft.autograd.settings import NO_FACTORS
from kt_sft.native import native
from tests.helpers.layers import (
    LayerCase,
    MoeCall,
    lora_inputs,
    make_layer,
    make_problem,
    moe,
    run,
    stored,
    with_format,
)
from tests.helpers.reference import KERNELS, round_bf16, solve
from tests.helpers.tolerance import model_bound, rel_l2


def test_inference_keeps_no_tape():
    problem = make_problem(LayerCase(seed=25))
    layer = make_layer(problem)
    with torch.no_grad():
        out = moe(problem.x.float(), problem.ids, problem.weights.float(), lora_inputs(problem)[0], MoeCall(layer))
    assert out.grad_fn is None
    frozen = moe(problem.x.float(), problem.ids, problem.weights.float(), NO_FACTORS, MoeCall(layer))
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


def solved(problem, layer) -> dict:
    return solve(stored(problem, layer), KERNELS)


def assert_matches_model(problem, terms: int, layer=None) -> dict:
    layer = layer if layer is not None else make_layer(problem)
    got, model = run(problem, layer), solved(problem, layer)
    for name, value in got.items():
        assert rel_l2(value, model[name]) <= model_bound(name, terms, problem.rows, problem.format), name
    return got


def test_no_tokens(weights):
    case = with_format(LayerCase(tokens=0, seed=29), weights)
    got = run(make_problem(case))
    assert got["out"].shape == (0, case.hidden) and got["dx"].shape == (0, case.hidden)
    for name, value in got.items():
        assert torch.count_nonzero(value) == 0, name


def test_one_token(weights):
    assert_matches_model(make_problem(with_format(LayerCase(tokens=1, sentinel=False, seed=44), weights)), 52)


def test_only_sentinels_give_zero(weights):
    problem = make_problem(with_format(LayerCase(seed=30), weights))
    problem.ids = torch.full_like(problem.ids, 5)
    for name, value in run(problem).items():
        assert torch.count_nonzero(value) == 0, name


def test_expert_without_tokens_gets_zero_lora_grad(weights):
    problem = make_problem(with_format(LayerCase(seed=31), weights))
    problem.ids[problem.ids == 2] = 1
    got = run(problem)
    for name in ("dgate_a", "dgate_b", "dup_b", "ddown_a", "ddown_b"):
        assert torch.count_nonzero(got[name][2]) == 0, name
        assert torch.count_nonzero(got[name][1]) > 0, name


def test_all_rows_on_one_expert(weights):
    problem = make_problem(with_format(LayerCase(tokens=250, top_k=1, seed=32), weights))
    problem.ids = torch.full_like(problem.ids, 3)
    assert_matches_model(problem, 250)


def test_a_repeated_id_counts_twice(weights):
    problem = make_problem(with_format(LayerCase(seed=33, top_k=2, sentinel=False), weights))
    problem.ids[:, 1] = problem.ids[:, 0]
    assert_matches_model(problem, 52)


def test_zero_routing_weight_still_has_a_gradient(weights):
    problem = make_problem(with_format(LayerCase(seed=34, sentinel=False), weights))
    problem.weights[:, 0] = 0.0
    got = assert_matches_model(problem, 52)
    assert torch.count_nonzero(got["dweights"][:, 0]) == problem.ids.shape[0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_a_bad_value_of_one_token_stays_there(weights, bad):
    problem = make_problem(with_format(LayerCase(seed=35, sentinel=False), weights))
    layer = make_layer(problem)
    clean = run(problem, layer)
    problem.x[4, 7] = bad
    got = run(problem, layer)
    others = torch.arange(problem.x.shape[0]) != 4
    assert not torch.isfinite(got["out"][4]).all()
    for name in ("out", "dx", "dweights"):
        assert torch.equal(got[name][others], clean[name][others]), name
    if bad != bad:
        assert torch.isnan(got["out"][4]).all() and torch.isnan(got["dx"][4]).all()
        assert torch.isnan(got["dgate_a"]).any()


def test_nan_in_the_gradient_reaches_dx(weights):
    problem = make_problem(with_format(LayerCase(seed=36, sentinel=False), weights))
    problem.dout[6, 3] = float("nan")
    got = run(problem)
    assert torch.isnan(got["dx"][6]).all() and not torch.isnan(got["dx"][5]).any()


@pytest.mark.parametrize("scale", [2.0**-12, 2.0**6, 2.0**12])
def test_large_and_small_hidden_states(weights, scale):
    """Within the range of f16, which keeps g and u for backward; a small g loses bits below 2^-14."""
    problem = make_problem(with_format(LayerCase(lora="none", seed=45), weights))
    problem.x *= scale
    assert_matches_model(problem, 52 if scale > 1 else 1000)


@pytest.mark.parametrize("exponent", [-40, 30])
def test_values_beyond_the_tape_stay_finite(weights, exponent):
    """g and u that f16 cannot hold: the output is that of f32, gradients saturate instead of becoming NaN.

    Nothing is subnormal in f32: bf16 dot instructions and AMX take such numbers for zero.
    """
    problem = make_problem(with_format(LayerCase(lora="none", seed=46), weights))
    problem.x *= 2.0**exponent
    got = assert_matches_model(problem, 1000)
    assert all(value.isfinite().all() for value in got.values())


def test_hidden_states_of_zeros(weights):
    problem = make_problem(with_format(LayerCase(seed=47), weights))
    problem.x.zero_()
    for name, value in run(problem).items():
        assert value.isfinite().all(), name
        assert name in ("dx", "dgate_b", "dup_b") or torch.count_nonzero(value) == 0, name


def test_rows_of_extreme_integers():
    """Every product of int8 rows and weights at +-127: the int32 sums and their zero points must hold."""
    hidden, inter = 2048, 64
    for kind in ("int8", "int4"):
        layer = native().MoeLayer(native().ExpertStore(1, hidden, inter, kind))
        for sign_w in (1.0, -1.0):
            w = torch.full((inter, hidden), sign_w * 2.0**-6, dtype=torch.bfloat16)
            layer.store.load_expert(0, w, w, w.T.contiguous())
            kept = [torch.empty(inter, hidden), torch.empty(inter, hidden), torch.empty(hidden, inter)]
            layer.store.unpack_expert(0, *kept, dtype="f32")
            for sign_x in (1.0, -1.0):
                x = torch.full((5, hidden), sign_x, dtype=torch.bfloat16)
                call = MoeCall(layer, rows="int8")
                out = moe(x.float(), torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1), NO_FACTORS, call)
                g = x.double() @ kept[0].double().T
                want = round_bf16(g * torch.sigmoid(g) * g) @ kept[2].double().T
                assert rel_l2(out, want) <= 1e-6, (kind, sign_w, sign_x)


def test_small_integers_are_exact_through_the_down_projection():
    """Gate rows of huge values make silu(g) = g exactly, so that the whole layer is sums of small integers."""
    experts, hidden, inter = 3, 37, 21
    layer = native().MoeLayer(native().ExpertStore(experts, hidden, inter))
    g = torch.Generator().manual_seed(1)
    weights = [torch.randint(-2, 3, (inter, hidden), generator=g).bfloat16() for _ in range(experts)]
    downs = [torch.randint(-2, 3, (hidden, inter), generator=g).bfloat16() for _ in range(experts)]
    gates = [torch.full((inter, hidden), 64.0).bfloat16() for _ in range(experts)]
    for e in range(experts):
        layer.store.load_expert(e, gates[e], weights[e], downs[e])
    x = torch.zeros(8, hidden)
    x[torch.arange(8), torch.randint(0, hidden, (8,), generator=g)] = 1.0  # one-hot: u is a column of up, g = 64
    ids = torch.randint(0, experts, (8, 1), generator=g)
    out = moe(x, ids, torch.ones(8, 1), NO_FACTORS, MoeCall(layer))
    want = torch.stack(
        [64.0 * (downs[e].double() @ (weights[e].double() @ x[t].double())) for t, e in enumerate(ids[:, 0].tolist())]
    )
    assert torch.equal(out.double(), want)


def test_unpack_returns_what_was_loaded():
    problem = make_problem(LayerCase(seed=39))
    layer = make_layer(problem)
    gate, up = (torch.empty(37, 52, dtype=torch.bfloat16) for _ in range(2))
    down = torch.empty(52, 37, dtype=torch.bfloat16)
    layer.store.unpack_expert(3, gate, up, down)
    assert torch.equal(gate.double(), problem.gate[3]) and torch.equal(up.double(), problem.up[3])
    assert torch.equal(down.double(), problem.down[3])


@pytest.mark.parametrize("experts, hidden, inter", [(64, 2048, 1408), (128, 2048, 768), (16, 7168, 2048)])
def test_packed_bytes_of_real_shapes_are_within_three_percent(experts, hidden, inter):
    own = experts * 3 * hidden * inter * 2
    assert own <= native().ExpertStore.packed_bytes_for(experts, hidden, inter) <= 1.03 * own


class TestErrors:
    """Every refusal names the argument, what was expected and what was found."""

    @pytest.fixture
    def layer(self):
        return make_layer(make_problem(LayerCase(seed=40)))

    def call(self, layer, x=None, ids=None, weights=None, lora=NO_FACTORS, **kwargs):
        x = torch.zeros(4, 52) if x is None else x
        ids = torch.zeros(4, 3, dtype=torch.int64) if ids is None else ids
        weights = torch.zeros(4, 3) if weights is None else weights
        with torch.no_grad():
            return moe(x, ids, weights, lora, MoeCall(layer, **kwargs))

    def test_wrong_hidden(self, layer):
        with pytest.raises(ValueError, match=r"x: expected shape \[any, 52\], got bf16 \[4, 51\]"):
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
            self.call(layer, lora=lora)

    def test_lora_of_another_width(self, layer):
        lora = (torch.zeros(5, 4, 50), torch.zeros(5, 4, 74), None, None, None, None)
        with pytest.raises(ValueError, match=r"lora gate.a: expected shape \[5, any, 52\]"):
            self.call(layer, lora=lora)

    def test_dropout_of_one(self, layer):
        with pytest.raises(ValueError, match="dropout"):
            self.call(layer, dropout=1.0)

    def test_missing_experts(self):
        with pytest.raises(ValueError, match="no weights yet"):
            self.call(native().MoeLayer(native().ExpertStore(5, 52, 37)))

    def test_load_of_wrong_shape_and_dtype(self, layer):
        good, down = torch.zeros(37, 52, dtype=torch.bfloat16), torch.zeros(52, 37, dtype=torch.bfloat16)
        with pytest.raises(ValueError, match=r"up: expected shape \[37, 52\]"):
            layer.store.load_expert(0, good, good.T.contiguous(), down)
        with pytest.raises(ValueError, match="gate: expected dtype bf16, got f32"):
            layer.store.load_expert(0, good.float(), good, down)
        with pytest.raises(ValueError, match="out of range"):
            layer.store.load_expert(5, good, good, down)

    def test_tensors_come_by_plain_dlpack_too(self, layer):
        """torch before 2.10, and other libraries, have no exchange table on their tensor types."""

        class Plain:
            def __init__(self, tensor: torch.Tensor) -> None:
                self.tensor, self.requires_grad = tensor, tensor.requires_grad

            def detach(self) -> Plain:
                return Plain(self.tensor.detach())

            def __dlpack__(self) -> object:
                return self.tensor.__dlpack__()

        values = torch.randn(100, requires_grad=True)
        assert native().sample_factors((Plain(values),)) == native().sample_factors((values,))
        down = torch.zeros(52, 37, dtype=torch.bfloat16)
        with pytest.raises(ValueError, match=r"up: expected shape \[37, 52\], got bf16 \[52, 37\]"):
            layer.store.load_expert(0, Plain(down.T.contiguous()), Plain(down), down)
        with pytest.raises(TypeError, match="gate: expected a tensor, got <class 'int'>"):
            layer.store.load_expert(0, 1, down, down)

    def test_unknown_isa_activation_and_format(self):
        with pytest.raises(ValueError, match="expected one of auto, scalar, avx2"):
            native().set_isa("sse2")
        with pytest.raises(ValueError, match="expected silu, gelu, gelu_tanh, relu or clamped_swiglu, got mish"):
            native().MoeLayer(native().ExpertStore(1, 4, 4, "bf16"), "mish")
        with pytest.raises(
            ValueError, match=r"int8, int4 or rawint4, or a type of GGUF files \(f16, q4_0, .*\), got fp3"
        ):
            native().ExpertStore(1, 4, 4, "fp3")

    def test_more_pools_than_numa_nodes(self):
        with pytest.raises(ValueError, match="NUMA"):
            native().set_threads(2, 999)
