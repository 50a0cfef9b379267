"""What the bindings refuse or resolve before a pointer is taken: names, views, memory, sizes, orders of calls."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from kt_sft.autograd.linear import packed_linear
from kt_sft.native import native
from tests.helpers.layers import MoeCall, moe

HIDDEN, INTER, EXPERTS = 40, 37, 3
NO_LORA = (None, None, None)


def bf16(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(torch.bfloat16)


@pytest.fixture(scope="module")
def layer():
    torch.manual_seed(0)
    made = native().MoeLayer(native().ExpertStore(EXPERTS, HIDDEN, INTER))
    for expert in range(EXPERTS):
        made.store.load_expert(expert, bf16(INTER, HIDDEN), bf16(INTER, HIDDEN), bf16(HIDDEN, INTER))
    return made


def inputs(tokens: int = 5) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, EXPERTS, (tokens, 2))
    return {"x": bf16(tokens, HIDDEN), "topk_ids": ids, "topk_weights": torch.rand(tokens, 2)}


def forward(layer, tensors: dict, out: object = None, **changes) -> torch.Tensor:
    out = torch.empty(tensors["x"].shape) if out is None else out
    names = {"out_dtype": "bf16" if out.dtype is torch.bfloat16 else "f32", "chunk_size": 4, "lora": NO_LORA}
    layer.forward(
        **tensors, **{"g": None, "u": None, "out": out, "dropout_p": 0.0, "dropout_seed": 0, **names, **changes}
    )
    return out


def backward(layer, tensors: dict, dx: torch.Tensor | None, **changes) -> None:
    names = {"dx_dtype": "f32", "dtopk_weights": None, "lora_grads": NO_LORA, "lora": NO_LORA, "chunk_size": 4}
    rest = {"g": None, "u": None, "dx": dx, "dropout_p": 0.0, "dropout_seed": 0, **names, **changes}
    layer.backward(bf16(*tensors["x"].shape), **tensors, **rest)


@pytest.mark.parametrize("name", ["f16", "F32", "", "bf16 ", "float32", "f32\0"])
def test_results_have_one_of_two_dtypes(layer, name):
    """Any other name took f32 for granted, and wrote it into memory of half the size."""
    small, linear = torch.empty(5, HIDDEN, dtype=torch.float16), native().PackedLinear(4, 4)
    words = "expected bf16 or f32|zero byte"
    with pytest.raises(ValueError, match=f"out_dtype: {words}" if "\0" not in name else words):
        forward(layer, inputs(), small, out_dtype=name)
    with pytest.raises(ValueError, match=words):
        backward(layer, inputs(), small, dx_dtype=name)
    with pytest.raises(ValueError, match=words):
        backward(layer, inputs(), None, dx_dtype=name)
    halves = [torch.empty(shape, dtype=torch.float16) for shape in ((INTER, HIDDEN), (INTER, HIDDEN), (HIDDEN, INTER))]
    with pytest.raises(ValueError, match=words):
        layer.store.unpack_expert(0, *halves, dtype=name)
    with pytest.raises(ValueError, match=words):
        linear.unpack(torch.empty(4, 4, dtype=torch.float16), name)
    with pytest.raises(ValueError, match=words):
        linear.input_grad(bf16(1, 4), torch.empty(1, 4, dtype=torch.float16), name)


@pytest.mark.parametrize("name", ["out_dtype", "rows"])
@pytest.mark.parametrize("value", [None, 3, b"f32", torch.float32])
def test_names_are_texts(layer, name, value):
    with pytest.raises(TypeError, match=rf"^{name}: expected a text, got <class '.*'>$"):
        forward(layer, inputs(), **{name: value})


def test_negative_bits_are_resolved(layer):
    tensors = inputs()
    views = {name: torch._neg_view(-tensors[name]) for name in ("x", "topk_ids", "topk_weights")}
    assert torch.equal(forward(layer, views), forward(layer, tensors))
    imaginary = torch.complex(torch.zeros(5, 2), -tensors["topk_weights"]).conj().imag
    assert imaginary.is_neg()
    assert torch.equal(forward(layer, {**tensors, "topk_weights": imaginary.contiguous()}), forward(layer, tensors))
    with torch.no_grad():
        for kind in (torch.float32, torch.bfloat16):
            x = tensors["x"].to(kind)
            got = moe(torch._neg_view(-x), tensors["topk_ids"], tensors["topk_weights"], (None,) * 6, MoeCall(layer))
            want = moe(x, tensors["topk_ids"], tensors["topk_weights"], (None,) * 6, MoeCall(layer))
            assert torch.equal(got, want)
    with pytest.raises(ValueError, match="out: expected a tensor without the negative bit"):
        forward(layer, tensors, torch._neg_view(torch.empty(5, HIDDEN)))


def test_memory_that_is_not_aligned_is_copied(layer):
    tensors = inputs()
    raw = bytearray(tensors["x"].nbytes + 1)
    moved = torch.frombuffer(raw, dtype=torch.bfloat16, offset=1).view(5, HIDDEN).copy_(tensors["x"])
    assert moved.data_ptr() % 2 == 1
    assert torch.equal(forward(layer, {**tensors, "x": moved}), forward(layer, tensors))
    with pytest.raises(ValueError, match="out: expected memory aligned"):
        forward(layer, tensors, moved)


def test_memory_that_is_gone_or_elsewhere(layer):
    tensors = inputs()
    gone = tensors["x"].clone()
    gone.untyped_storage().resize_(0)
    others = (
        gone,
        gone.to("meta"),
        torch.eye(HIDDEN).to_sparse(),
        torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.quint8),
    )
    for other in others:
        with pytest.raises(ValueError, match=r"^x: expected a tensor with memory[^\n]*$"):
            forward(layer, {**tensors, "x": other})


def test_what_is_written_has_memory_of_its_own(layer):
    tensors = inputs()
    wide = torch.empty(5, HIDDEN, 2, dtype=torch.bfloat16)
    refusals = {
        "requires no gradient": torch.empty(5, HIDDEN).requires_grad_(),
        "contiguous": torch.empty(HIDDEN).expand(5, HIDDEN),
        "contiguous tensor": torch.empty(5, 2 * HIDDEN)[:, :HIDDEN],
        "that of x": tensors["x"],
        "contiguous tensor, got bf16": wide[..., 0],
    }
    for words, out in refusals.items():
        with pytest.raises(ValueError, match=f"^out: expected .*{words}"):
            forward(layer, tensors, out)
    g = torch.empty(10, layer.inter_stride, dtype=torch.float16)
    with pytest.raises(ValueError, match="^u: expected memory of its own, got that of g$"):
        forward(layer, tensors, g=g, u=g)
    with pytest.raises(ValueError, match="^dtopk_weights: expected memory of its own, got that of topk_weights$"):
        backward(layer, tensors, None, dtopk_weights=tensors["topk_weights"])
    rows = torch.empty(1, HIDDEN).expand(INTER, HIDDEN)
    with pytest.raises(ValueError, match="^up: expected memory of its own for each element"):
        layer.store.unpack_expert(0, torch.empty(INTER, HIDDEN), rows, torch.empty(HIDDEN, INTER), dtype="f32")


def test_halves_of_a_matrix_are_not_one_another(layer):
    fused = torch.zeros(INTER, 2 * HIDDEN)
    down = torch.zeros(HIDDEN, INTER)
    layer.store.unpack_expert(1, fused[:, :HIDDEN], fused[:, HIDDEN:], down, dtype="f32")
    apart = [torch.zeros(INTER, HIDDEN), torch.zeros(INTER, HIDDEN), torch.zeros(HIDDEN, INTER)]
    layer.store.unpack_expert(1, *apart, dtype="f32")
    assert torch.equal(fused, torch.cat(apart[:2], 1)) and torch.equal(down, apart[2])
    with pytest.raises(ValueError, match="^up: expected memory of its own, got that of gate$"):
        layer.store.unpack_expert(1, fused[:, :HIDDEN], fused[:, HIDDEN - 1 : -1], down, dtype="f32")


@pytest.mark.parametrize("value", [2**24 + 1, 2**31, 2**40, 2**62, 2**63 - 1, 2**63, 2**70, 0, -1, -(2**63)])
def test_sizes_that_no_layer_has(value):
    for sizes in ((value, 32, 32), (2, value, 32), (2, 32, value)):
        with pytest.raises(ValueError, match="expected|positive"):
            native().ExpertStore(*sizes)
        with pytest.raises(ValueError, match="expected|positive"):
            native().ExpertStore.packed_bytes_for(*sizes, "int8")
    for sizes in ((value, 32), (32, value)):
        with pytest.raises(ValueError, match="expected|positive"):
            native().PackedLinear(*sizes)


def test_memory_that_the_system_refuses_is_named():
    with pytest.raises(MemoryError, match="the system refused [0-9]+ bytes"):
        native().PackedLinear(2**24, 2**24)


@pytest.mark.parametrize("size", [2**31, 2**62, 2**63 - 1])
def test_blocks_larger_than_the_matrix(size):
    """Sums with such sizes overflowed: shapes were taken for others, and loops did not end."""
    w, scales, out = torch.randint(0, 256, (40, 64), dtype=torch.uint8), torch.ones(1, 1), torch.empty(40, 64)
    native().dequantize_fp8(w, scales, size, size, out)
    want = w.view(torch.float8_e4m3fn).float()
    assert torch.equal(out.nan_to_num(), want.nan_to_num())
    with pytest.raises(ValueError, match=r"scales: expected shape \[1, 1\]"):
        native().dequantize_fp8(w, torch.ones(0, 0), size, size, out)
    native().dequantize_int4(w[:, :32], torch.ones(40, 1), size, out)
    for wrong in (0, -1, -size):
        with pytest.raises(ValueError, match="group: expected at least one element"):
            native().dequantize_int4(w[:, :32], torch.ones(40, 1), wrong, out)


def test_tensors_without_elements_end_at_once():
    endless = 2**40
    native().dequantize_gguf("Q4_0", torch.empty(endless, 0, dtype=torch.uint8), torch.empty(endless, 0))
    with pytest.raises(ValueError, match="fits into memory"):
        native().dequantize_gguf("Q4_0", torch.empty(0, 18 * 2**55, dtype=torch.uint8), torch.empty(0, 32 * 2**55))
    with pytest.raises(ValueError, match="operand: expected a factor with numbers"):
        native().operand_from_expert_minor(torch.empty(0, 0), torch.empty(2**31, 2**31, 0))
    with pytest.raises(ValueError, match="fits into memory|contiguous"):
        native().sample_factors((torch.empty(1).expand(2**31, 2**31),))


def test_blocks_for_a_layer_of_numbers():
    with pytest.raises(ValueError, match="only f16 and block types are loaded from blocks"):
        native().PackedLinear(4, 4).load_blocks(torch.zeros(4, 8, dtype=torch.uint8))


def test_threads_of_fake_nodes_are_bounded():
    for threads, pools in ((1025, 1), (1, 1025), (2**31 - 1, 2), (2**40, 2), (-1, 1), (1, -(2**40))):
        with pytest.raises(ValueError, match="expected"):
            native().set_threads(threads, pools, fake_nodes=True)


def test_parts_of_a_call_that_belong_together(layer):
    tensors = inputs()
    g = torch.empty(10, layer.inter_stride, dtype=torch.float16)
    faults = {
        "g and u: expected both or none": {"g": g},
        "xa gate: expected g and u": {"xa": (torch.empty(10, 4), None)},
        "lora: expected those of gate, up and down": {"lora": (None, None)},
        "lora gate: expected \\(a, b, scale\\)": {"lora": ((torch.empty(3, 4, HIDDEN),), None, None)},
        "bias: expected \\(gate, up, down\\)": {"bias": ()},
    }
    for words, changes in faults.items():
        with pytest.raises(ValueError, match=words):
            forward(layer, tensors, **changes)
    with pytest.raises(TypeError, match="out: expected a tensor, got <class 'NoneType'>"):
        layer.forward(
            **tensors,
            lora=NO_LORA,
            g=None,
            u=None,
            out=None,
            out_dtype="f32",
            dropout_p=0.0,
            dropout_seed=0,
            chunk_size=4,
        )


def test_shared_a_of_two_layouts(layer):
    a, b = torch.randn(EXPERTS, 8, HIDDEN), torch.randn(EXPERTS, 4, INTER)
    lora = ((a[:, :4], b, 1.0), (a[:, ::2], b, 1.0), None)  # one address, other strides
    with pytest.raises(ValueError, match="share A need one rank, one scale and one layout"):
        forward(layer, inputs(), lora=lora)


@pytest.mark.parametrize("expert", [-1, EXPERTS, 2**31, 2**63 - 1, -(2**63), 2**70])
def test_experts_that_are_not_there(layer, expert):
    blobs = [np.zeros(count, dtype=np.uint8) for count in layer.store.blob_bytes]
    matrices = (bf16(INTER, HIDDEN), bf16(INTER, HIDDEN), bf16(HIDDEN, INTER))
    for method, parts in (
        (layer.store.load_expert, matrices), (layer.store.unpack_expert, matrices), (layer.store.copy_expert, blobs),
        (layer.store.map_expert, blobs), (layer.store.export_expert, blobs),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="out of range|expected a number from"):
            method(expert, *parts)


def test_a_layer_without_init():
    for kind in (native().ExpertStore, native().MoeLayer, native().PackedLinear):
        blank = kind.__new__(kind)
        names = ("inter", "inter_stride", "store") if kind is native().MoeLayer else ("packed_bytes", "format")
        for name in names:
            with pytest.raises(TypeError, match="__init__ was not called"):
                getattr(blank, name)


def aligned(count: int) -> tuple[bytearray, memoryview]:
    memory = bytearray(count + 64)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % 64
    return memory, memoryview(memory)[start : start + count]


def test_mapped_memory_is_held_until_it_is_replaced(layer):
    other = native().MoeLayer(native().ExpertStore(EXPERTS, HIDDEN, INTER))
    memories, views = zip(*(aligned(count) for count in layer.store.blob_bytes))
    layer.store.export_expert(0, *views)
    for expert in range(EXPERTS):
        other.store.map_expert(expert, *views)
    with pytest.raises(BufferError):
        views[0].release()
    with pytest.raises(ValueError, match="memory that no expert of the layer is mapped from"):
        other.store.export_expert(0, *views)
    tensors = inputs()
    tensors["topk_ids"].zero_()
    assert torch.equal(forward(other, tensors), forward(layer, tensors))
    for expert in range(EXPERTS):
        other.store.load_expert(expert, bf16(INTER, HIDDEN), bf16(INTER, HIDDEN), bf16(HIDDEN, INTER))
    for view, memory in zip(views, memories):
        view.release()
        memory.clear()  # a bytearray that somebody holds cannot be cut


def test_reading_while_experts_change(layer):
    """Counts and copies wait for a load in another thread, whose half-written places they used to follow."""
    other = native().MoeLayer(native().ExpertStore(EXPERTS, HIDDEN, INTER))
    matrices = (bf16(INTER, HIDDEN), bf16(INTER, HIDDEN), bf16(HIDDEN, INTER))
    ends = threading.Event()
    faults: list[str] = []

    def read() -> None:
        out = [torch.empty_like(t) for t in matrices]
        while not ends.is_set():
            try:
                other.store.unpack_expert(1, *out)
                if not all(torch.equal(a, b) for a, b in zip(out, matrices)):
                    faults.append("half an expert")
            except ValueError as error:
                if "no weights yet" not in str(error):
                    faults.append(str(error))
            assert 0 <= other.store.missing_experts <= EXPERTS and other.store.mapped_experts == 0

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(300):
        other.store.load_expert(1, *matrices)
    ends.set()
    reader.join()
    assert not faults


def test_kinds_of_numbers_are_not_guessed(layer):
    """Ids of another kind were cut to whole numbers, complex rows lost half of themselves."""
    x, ids, weights = inputs().values()
    call = MoeCall(layer)
    wrong = {
        "topk_ids: expected integers": (x, ids.float(), weights),
        "topk_ids: expected integers, got torch.bool": (x, ids.bool(), weights),
        "x: expected floating point": (x.long(), ids, weights),
        "x: expected floating point numbers, got torch.complex64": (x.to(torch.complex64), ids, weights),
        "topk_weights: expected floating point": (x, ids, weights.long()),
    }
    for words, arguments in wrong.items():
        with pytest.raises(ValueError, match=words):
            moe(*arguments, (None,) * 6, call)
    linear = native().PackedLinear(4, 4)
    linear.load(bf16(4, 4))
    for x in (
        torch.ones(2, 4, dtype=torch.int64),
        torch.ones(2, 4, dtype=torch.complex64),
        torch.ones(2, 5),
        torch.tensor(1.0),
    ):
        with pytest.raises(ValueError, match=r"x: expected floating point \[..., 4\]"):
            packed_linear(x, linear)
