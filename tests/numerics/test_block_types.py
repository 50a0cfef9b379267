"""Weights in the block types of GGUF files: the values of the gguf package, and every product with them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kt_sft.native import native
from tests.helpers.blocks import BLOCKS, TYPES, block_of, random_rows
from tests.helpers.layers import ISAS, LayerCase, make_problem, marked, run, using_isa, using_threads
from tests.helpers.reference import EXACT, KERNELS, solve
from tests.helpers.tolerance import BF16_HALF_ULP, F32_EPS, model_bound, rel_l2, rounding_bound

# gate, up, down: alike, and mixed as files mix them
MIXES = [
    *((name,) * 3 for name in TYPES),
    ("q4_k", "q5_k", "q6_k"),
    ("iq4_xs", "bf16", "q5_0"),
    ("q8_0", "int8", "f16"),
]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def make_linear(name: str, n: int, k: int, generator: torch.Generator):
    """A loaded layer, its file's bytes and its weights in f32."""
    layer = native().PackedLinear(n, k, name)
    rows = random_rows(name, n, k, generator)
    layer.load_blocks(rows)
    stored = torch.empty(n, k)
    layer.unpack(stored, "f32")
    return layer, rows, stored


@pytest.mark.parametrize("name", TYPES)
def test_weights_are_those_of_the_gguf_package(name, generator):
    gguf = pytest.importorskip("gguf")
    kind = getattr(gguf.GGMLQuantizationType, name.upper())
    _, rows, stored = make_linear(name, 45, 3 * max(32, block_of(name)), generator)
    want = torch.from_numpy(gguf.dequantize(rows.numpy(), kind)).reshape(stored.shape)
    assert torch.equal(stored, want)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("m", [1, 3, 5, 13, 200])
def test_both_products_equal_float64_on_the_stored_weights(name, m, generator):
    n, k = 70, 3 * max(32, block_of(name))
    layer, _, stored = make_linear(name, n, k, generator)
    stored = stored.double()
    a, dy = (torch.randn(m, width, generator=generator).bfloat16() for width in (k, n))
    out, dx = torch.empty(m, n), torch.empty(m, k)
    layer.forward(a, out, "f32")
    layer.input_grad(dy, dx, "f32")
    # An f32 sum, and one rounding of each weight that has an offset.
    assert ((out - a.double() @ stored.T).abs() <= 2 * (k + 1) * F32_EPS * (a.double().abs() @ stored.abs().T)).all()
    assert ((dx - dy.double() @ stored).abs() <= 2 * (n + 1) * F32_EPS * (dy.double().abs() @ stored.abs())).all()


ROWS = [row for row in native().kernel_rows() if row["format"].startswith(("block", "f16"))]


@pytest.mark.parametrize("row", [marked(row["isa"], row, row["name"]) for row in ROWS])
def test_every_row_of_the_table_by_name(row, generator):
    if not row["available"]:
        pytest.skip(f"this CPU lacks {row['isa']}")
    for name in TYPES:
        n, k = 70, 3 * max(32, block_of(name))
        layer, _, stored = make_linear(name, n, k, generator)
        m = row["max_m"] or 3 * row["block_m"] + 1
        width, other = (k, n) if row["op"] == "forward" else (n, k)
        a, out = torch.randn(m, width, generator=generator).bfloat16(), torch.empty(m, other)
        call = layer.forward if row["op"] == "forward" else layer.input_grad
        extra = {"rows": row["rows"]} if row["op"] == "forward" else {}
        try:
            call(a, out, "f32", kernel=row["name"], **extra)
        except ValueError as error:
            assert "not for this weight format" in str(error) or "needs int8 or int4" in str(error)
            continue
        truth = a.double() @ (stored.double().T if row["op"] == "forward" else stored.double())
        assert rel_l2(out, truth) <= (BF16_HALF_ULP / 8 if row["rows"] == "bfp16" else width * F32_EPS), name
        ran = name
    assert ran


@pytest.mark.parametrize("name", list(BLOCKS))
def test_few_rows_in_block_floating_point_stay_close(name, generator):
    n, k = 70, 768
    layer, _, stored = make_linear(name, n, k, generator)
    for m in (1, 2, 4, 5):
        a = torch.randn(m, k, generator=generator).bfloat16()
        out = torch.empty(m, n)
        layer.forward(a, out, "f32", rows="bfp16")
        assert rel_l2(out, a.double() @ stored.double().T) <= BF16_HALF_ULP / 8


def load(names: tuple[str, str, str], case: LayerCase, *, inter_blocks: int = 1):
    """A layer of random blocks, and the problem with its weights in float64."""
    generator = torch.Generator().manual_seed(case.seed)
    hidden = 512 if any(block_of(name) == 256 for name in names[:2]) else 96
    inter = inter_blocks * max(64, block_of(names[2]))
    case = dataclasses.replace(case, hidden=hidden, inter=inter)
    problem = make_problem(case)
    layer = native().MoeLayer(native().ExpertStore(case.experts, hidden, inter, names))
    shapes = {"gate": (inter, hidden), "up": (inter, hidden), "down": (hidden, inter)}
    for expert in range(case.experts):
        blocks = []
        for name, (projection, (n, k)) in zip(names, shapes.items(), strict=True):
            plain = getattr(problem, projection)[expert].bfloat16()
            one = native().PackedLinear(n, k, name)
            if name in TYPES:
                blocks.append(random_rows(name, n, k, generator, size=k**-0.5))
                one.load_blocks(blocks[-1])
            else:
                blocks.append(plain)
                one.load(plain)
            stored = torch.empty(n, k)
            one.unpack(stored, "f32")
            getattr(problem, projection)[expert] = stored.double()
        layer.store.load_expert(expert, *blocks)
    return layer, problem, case


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("names", MIXES, ids="-".join)
def test_output_and_gradients_match_float64(isa, names):
    with using_isa(isa):
        for case in (LayerCase(), LayerCase(lora="separate", rank=7, tokens=61, p=0.1, seed=1)):
            layer, problem, case = load(names, case)
            got = run(problem, layer, retain=case.seed == 0, chunk_size=40)
            model, plain = solve(problem, KERNELS), solve(problem, EXACT)
            for name, value in got.items():
                assert rel_l2(value, model[name]) <= model_bound(name, case.terms()), name
                assert rel_l2(value, plain[name]) <= rounding_bound(name, "int8" if "int8" in names else "bf16"), name


@pytest.mark.parametrize("down", ["q5_1", "q6_k"])
def test_shards_hold_whole_blocks(down):
    case, results = LayerCase(experts=3, tokens=40), []
    for pools in (1, 3):
        with using_threads(pools, pools):
            layer, problem, _ = load(("q4_k", "q4_k", down), case, inter_blocks=3)
            assert layer.store.num_shards == pools
            results.append((run(problem, layer), problem))
    assert torch.equal(results[0][1].down, results[1][1].down)
    for name, value in results[0][0].items():  # sums over shards are added in another order
        assert rel_l2(results[1][0][name], value) <= model_bound(name, case.terms()), name


def test_bad_blocks_are_refused(generator):
    layer = native().PackedLinear(5, 64, "q8_0")
    rows = random_rows("q8_0", 5, 64, generator)
    with pytest.raises(ValueError, match=r"w: expected shape \[5, 68\]"):
        layer.load_blocks(rows[:, :-1].contiguous())
    with pytest.raises(ValueError, match="dtype u8"):
        layer.load_blocks(rows.to(torch.int32))
    with pytest.raises(ValueError, match="not from bf16"):
        layer.load(torch.zeros(5, 64, dtype=torch.bfloat16))
    rows[3, 34:36] = torch.tensor([float("nan")]).half().view(torch.uint8)
    with pytest.raises(ValueError, match="finite scales"):
        layer.load_blocks(rows)
    with pytest.raises(ValueError, match="whole blocks of 256, got 300 columns"):
        native().PackedLinear(5, 300, "q6_k")
    with pytest.raises(ValueError, match="no weights yet"):
        layer.forward(torch.zeros(1, 64, dtype=torch.bfloat16), torch.zeros(1, 5), "f32")
