"""The frozen linear layer: both products of every format against float64 on the stored weights, by every kernel row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kt_sft.autograd.linear import packed_linear
from kt_sft.native import native
from tests.helpers.layers import marked
from tests.helpers.tolerance import BF16_HALF_ULP, F32_EPS, rel_l2

FORMATS = (("bf16", 32), ("int8", 32), ("int4", 32), ("int4", 64), ("int4", 128))
# (m, n, k): one row, tails of every tile and panel, more than one row block, more columns than a task takes
SHAPES = (
    (1, 1, 1),
    (1, 37, 45),
    (3, 64, 32),
    (5, 130, 67),
    (13, 96, 320),
    (50, 33, 129),
    (200, 70, 130),
    (391, 300, 64),
)


def make(n: int, k: int, weight_format: str = "bf16", group: int = 32, *, weight: Tensor | None = None):
    """A loaded layer and its stored weights in float64."""
    weight = torch.randn(n, k).to(torch.bfloat16) if weight is None else weight
    layer = native().PackedLinear(n, k, weight_format, group)
    layer.load(weight)
    stored = torch.empty(n, k)
    layer.unpack(stored, "f32")
    return layer, stored.double()


def rows_of(m: int, width: int) -> Tensor:
    return torch.randn(m, width).to(torch.bfloat16)


def forward(layer, a: Tensor, dtype: str = "f32", **kwargs) -> Tensor:
    out = torch.full((a.shape[0], layer.n), float("nan"), dtype=torch.float32 if dtype == "f32" else torch.bfloat16)
    layer.forward(a, out, dtype, **kwargs)
    return out


def input_grad(layer, dy: Tensor, dtype: str = "f32", **kwargs) -> Tensor:
    out = torch.full((dy.shape[0], layer.k), float("nan"), dtype=torch.float32 if dtype == "f32" else torch.bfloat16)
    layer.input_grad(dy, out, dtype, **kwargs)
    return out


def sum_bound(a: Tensor, b: Tensor, terms: int, per_operand: float = 0.0) -> Tensor:
    """Of a b^T, elementwise: f32 sums of `terms` products, operands rounded by `per_operand`; factor 2 for slack."""
    return 2 * (terms * F32_EPS + per_operand) * (a.double().abs() @ b.double().abs().T) + 1e-30


def gradient_truth(layer, dy: Tensor, stored: Tensor) -> tuple[Tensor, float]:
    """dy W in float64, and the relative rounding of an operand: int8 folds its scale into dy, which is rounded."""
    return dy.double() @ stored, BF16_HALF_ULP if layer.format == "int8" else 0.0


def quantised(a: Tensor) -> Tensor:
    """Rows rounded as W8A8 rounds them, in float64."""
    scale = a.float().abs().amax(1, keepdim=True) / 127  # [m, 1]
    return ((a.float() / scale).round() * scale).nan_to_num(0.0).double()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("weight_format", "group"), FORMATS)
def test_both_products_equal_float64_on_the_stored_weights(weight_format, group, shape):
    m, n, k = shape
    layer, stored = make(n, k, weight_format, group)
    a, dy = rows_of(m, k), rows_of(m, n)
    assert ((forward(layer, a) - a.double() @ stored.T).abs() <= sum_bound(a, stored, k)).all()
    truth, rounding = gradient_truth(layer, dy, stored)
    assert ((input_grad(layer, dy) - truth).abs() <= sum_bound(dy, stored.T, n, rounding)).all()


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@pytest.mark.parametrize(("weight_format", "group"), FORMATS[1:])
def test_int8_rows_equal_float64_on_the_quantised_rows(weight_format, group, shape):
    m, n, k = shape
    layer, stored = make(n, k, weight_format, group)
    a = rows_of(m, k)
    a[-1] = 0
    got = forward(layer, a, rows="int8")
    # The kernel's scale is a rounded quotient, so an element may fall to the neighbouring integer.
    assert rel_l2(got, quantised(a) @ stored.T) <= 1e-3
    assert not got[-1].any()


# Rows of block types are in test_block_types.py.
ROWS = [row for row in native().kernel_rows() if row["format"] in ("bf16", "int8", "int4")]


@pytest.mark.parametrize("row", [marked(row["isa"], row, row["name"]) for row in ROWS])
def test_every_row_of_the_table_by_name_is_exact_on_small_integers(row):
    if not row["available"]:
        pytest.skip(f"this CPU lacks {row['isa']}")
    for m in sorted({1, row["max_m"] or 3 * row["block_m"] + 1}):
        n, k = 70, 133
        integers = torch.randint(-7, 8, (n, k))
        if row["format"] == "int8":
            integers[:, 0] = 127  # the scale is then 1
        weight = integers.to(torch.bfloat16)
        layer, stored = make(n, k, row["format"], weight=weight)
        if row["op"] == "forward":
            a = torch.randint(-8, 9, (m, k)).to(torch.bfloat16)
            if row["rows"] == "int8":
                a[:, 1] = 127
            got, truth = forward(layer, a, rows=row["rows"], kernel=row["name"]), a.double() @ stored.T
        else:
            dy = torch.randint(-8, 9, (m, n)).to(torch.bfloat16)
            got, truth = input_grad(layer, dy, kernel=row["name"]), dy.double() @ stored
        if row["format"] != "int4":
            assert torch.equal(stored, weight.double())
            assert torch.equal(got.double(), truth)
        else:  # its scales are searched: products are exact, sums round
            assert rel_l2(got, truth) <= (n + k) * F32_EPS


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_bias_is_added_to_the_sums_before_the_one_rounding(dtype):
    layer, stored = make(67, 45)
    a, bias = rows_of(9, 45), torch.randn(67)
    got = forward(layer, a, dtype, bias=bias)
    exact = forward(layer, a) + bias
    assert torch.equal(got, exact.to(got.dtype))
    assert rel_l2(got, a.double() @ stored.T + bias.double()) <= (BF16_HALF_ULP if dtype == "bf16" else 1e-6)


@pytest.mark.parametrize("weight_format", ["bf16", "int8"])
@pytest.mark.parametrize("shape", [(1, 300, 200), (37, 300, 900), (400, 300, 900)], ids=str)
def test_results_do_not_depend_on_threads_or_pools(weight_format, shape):
    m, n, k = shape
    before = native().num_threads()
    a, dy, weight = rows_of(m, k), rows_of(m, n), torch.randn(n, k).to(torch.bfloat16)
    results = []
    try:
        for threads, pools in ((1, 1), (2, 1), (3, 1), (4, 2)):
            native().set_threads(threads, pools, fake_nodes=True)
            layer, _ = make(n, k, weight_format, weight=weight)
            results.append((forward(layer, a, "bf16"), input_grad(layer, dy, "bf16")))
    finally:
        native().set_threads(before)
    for y, dx in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(dx, results[0][1])


def test_placed_layer_computes_the_same():
    """Large enough for its weight to be split over the memory of two pools."""
    before = native().num_threads()
    weight, a = torch.randn(2048, 1100).to(torch.bfloat16), rows_of(3, 1100)
    try:
        native().set_threads(4, 2, fake_nodes=True)
        placed, _ = make(2048, 1100, weight=weight)
        y = forward(placed, a)
        native().set_threads(1)
        assert torch.equal(forward(placed, a), y)  # made for two pools, used by one
        assert torch.equal(forward(make(2048, 1100, weight=weight)[0], a), y)
    finally:
        native().set_threads(before)


@pytest.mark.parametrize("weight_format", ["bf16", "int8", "int4"])
def test_nan_stays_in_its_row(weight_format):
    layer, _ = make(40, 70, weight_format)
    a, dy = rows_of(8, 70), rows_of(8, 40)
    clean_y, clean_dx = forward(layer, a), input_grad(layer, dy)
    a[3, 69], dy[5, 39] = float("nan"), float("inf")
    y, dx = forward(layer, a), input_grad(layer, dy)
    assert y[3].isnan().all() and not dx[5].isfinite().any()
    others = torch.arange(8)
    assert torch.equal(y[others != 3], clean_y[others != 3]) and torch.equal(dx[others != 5], clean_dx[others != 5])
    if weight_format != "bf16":
        assert forward(layer, a, rows="int8")[3].isnan().all()


def test_bf16_weights_are_kept_bit_by_bit():
    weight = torch.randint(-(2**15), 2**15, (45, 77), dtype=torch.int16).view(torch.bfloat16)  # every kind of NaN too
    layer, _ = make(45, 77, weight=weight)
    unpacked = torch.empty_like(weight)
    layer.unpack(unpacked)
    assert torch.equal(unpacked.view(torch.int16), weight.view(torch.int16))
    assert layer.packed_bytes == 2 * 64 * 96


def test_strided_operands_and_no_rows():
    layer, stored = make(33, 40)
    wide = rows_of(6, 100)
    assert torch.equal(forward(layer, wide[::2, 20:60]), forward(layer, wide[::2, 20:60].contiguous()))
    other = native().PackedLinear(33, 40)
    padded = torch.randn(33, 64).to(torch.bfloat16)
    other.load(padded[:, :40])
    assert rel_l2(forward(other, rows_of(0, 40)), torch.empty(0, 33)) == 0
    unpacked = torch.empty(33, 40, dtype=torch.bfloat16)
    other.unpack(unpacked)
    assert torch.equal(unpacked, padded[:, :40])


def test_more_rows_than_one_pass_takes():
    layer, stored = make(40, 33)
    a = rows_of(4096 + 77, 33)
    got = forward(layer, a, "bf16")
    assert rel_l2(got, a.double() @ stored.T) <= BF16_HALF_ULP
    assert torch.equal(got[4000:], forward(layer, a[4000:], "bf16"))


def test_call_of_a_known_shape_takes_no_more_scratch():
    layer, _ = make(64, 96)
    a, dy = rows_of(50, 96), rows_of(50, 64)
    forward(layer, a), input_grad(layer, dy)
    before = native().workspace_growths()
    forward(layer, a), input_grad(layer, dy)
    assert native().workspace_growths() == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_operation_takes_every_float_dtype_and_any_leading_dimensions(dtype):
    layer, stored = make(20, 36)
    x = torch.randn(2, 3, 36).to(torch.bfloat16).to(dtype).requires_grad_()
    y = packed_linear(x, layer)
    assert y.shape == (2, 3, 20) and y.dtype == dtype
    rounding = {torch.bfloat16: BF16_HALF_ULP, torch.float16: 2.0**-11, torch.float32: 1e-6}[dtype]
    assert rel_l2(y.detach(), x.detach().double() @ stored.T) <= rounding
    dy = torch.randn(2, 3, 20).to(torch.bfloat16).to(dtype)
    y.backward(dy)
    assert x.grad.dtype == dtype and rel_l2(x.grad, dy.double() @ stored) <= rounding
    with torch.no_grad():
        assert torch.equal(packed_linear(x, layer), y)
    alone = packed_linear(x.detach()[0, 0], layer)  # no leading dimension; one row may be summed in another order
    assert alone.shape == (20,) and rel_l2(alone, y.detach()[0, 0]) <= rounding


def test_gradient_of_a_transposed_output_gradient():
    layer, stored = make(20, 36)
    x = torch.randn(5, 36).to(torch.bfloat16).requires_grad_()
    dy = torch.randn(20, 5).to(torch.bfloat16).T  # its last dimension is strided
    packed_linear(x, layer).backward(dy)
    assert rel_l2(x.grad, dy.double() @ stored) <= BF16_HALF_ULP


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: native().PackedLinear(0, 4), "positive"),
        (lambda: native().PackedLinear(4, 4, "int3"), "bf16, int8, int4 or rawint4"),
        (lambda: native().PackedLinear(4, 4, "int4", 48), "group_size"),
        (lambda: forward(native().PackedLinear(4, 4), rows_of(1, 4)), "no weights yet"),
        (lambda: native().PackedLinear(4, 4).load(torch.zeros(4, 4)), "dtype bf16"),
        (lambda: native().PackedLinear(4, 4).load(torch.zeros(4, 5).bfloat16()), r"shape \[4, 4\]"),
        (lambda: make(4, 4, "int8", weight=torch.full((4, 4), float("nan")).bfloat16()), "not finite|NaN|infinit"),
        (lambda: forward(make(4, 4)[0], rows_of(2, 5)), r"shape \[any, 4\]"),
        (lambda: forward(make(4, 4)[0], torch.zeros(2, 4)), "dtype bf16"),
        (lambda: forward(make(4, 4)[0], rows_of(2, 4), bias=torch.zeros(5)), r"shape \[4\]"),
        (lambda: forward(make(4, 4)[0], rows_of(2, 4), rows="int8"), "int8 or int4 weights"),
        (lambda: forward(make(4, 4)[0], rows_of(2, 4), rows="int4"), "expected bf16, bfp16 or int8"),
        (lambda: make(4, 4)[0].forward(rows_of(2, 4), torch.zeros(2, 4), "f16"), "expected bf16 or f32"),
        (lambda: make(4, 4)[0].forward(rows_of(2, 4), torch.zeros(3, 4), "f32"), r"shape \[2, 4\]"),
        (lambda: make(4, 4)[0].forward(rows_of(2, 4), torch.zeros(4, 4)[::2], "f32"), "contiguous"),
        (lambda: forward(make(4, 4)[0], rows_of(2, 4), kernel="gemm_fast"), "no such row"),
        (lambda: forward(make(4, 4)[0], rows_of(2, 4), kernel="gemm_bf16_s8_f32_1x1_scalar"), "not for this"),
        (lambda: input_grad(make(4, 4)[0], rows_of(2, 4), kernel="gemm_bf16_bf16_f32_1x1_scalar"), "not for this"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_kernel_that_the_cpu_lacks_or_with_too_many_rows_is_refused():
    for row in ROWS:
        layer, _ = make(4, 4, row["format"])
        run = forward if row["op"] == "forward" else input_grad
        extra = {"rows": row["rows"]} if row["op"] == "forward" else {}
        if not row["available"]:
            with pytest.raises(ValueError, match="lacks"):
                run(layer, rows_of(1, 4), kernel=row["name"], **extra)
        elif row["max_m"]:
            with pytest.raises(ValueError, match="at most"):
                run(layer, rows_of(row["max_m"] + 1, 4), kernel=row["name"], **extra)
