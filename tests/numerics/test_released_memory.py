"""Tensors whose memory was released or cut since: refused before anything reads it, at every door of the operations."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kt_sft import KTMoEWrapper
from kt_sft.autograd.linear import packed_linear
from kt_sft.autograd.settings import NO_FACTORS
from kt_sft.models.layout import ExpertsSpec
from kt_sft.native import native
from kt_sft.nn.expert_lora import EXPERT_MAJOR, LoraFactor
from kt_sft.nn.packed_linear import PackedLinear, pack_linear
from kt_sft.nn.routed_experts import RoutedExperts
from kt_sft.residency.expert_map import ExpertMap
from kt_sft.sources.tensors import TensorExperts
from tests.helpers.layers import MoeCall, moe

EXPERTS, HIDDEN, INTER, RANK = 3, 64, 32, 2


@pytest.fixture(scope="module")
def layer():
    store = native().ExpertStore(EXPERTS, HIDDEN, INTER)
    gate, up, down = torch.randn(INTER, HIDDEN), torch.randn(INTER, HIDDEN), torch.randn(HIDDEN, INTER)
    for expert in range(EXPERTS):
        store.load_expert(expert, gate.bfloat16(), up.bfloat16(), down.bfloat16())
    return native().MoeLayer(store)


# As the kernels read them, and of other types, which are converted first.
DTYPES = {
    "kernels'": {"x": torch.bfloat16, "topk_ids": torch.int64, "topk_weights": torch.float32},
    "others": {"x": torch.float32, "topk_ids": torch.int32, "topk_weights": torch.float64},
}


def inputs(kind: str = "others") -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    made = {
        "x": torch.randn(5, HIDDEN),
        "topk_ids": torch.randint(0, EXPERTS, (5, 2)),
        "topk_weights": torch.rand(5, 2),
    }
    return {name: tensor.to(DTYPES[kind][name]) for name, tensor in made.items()}


def release(tensor: torch.Tensor, how: str) -> torch.Tensor:
    tensor = tensor[:, ::2] if how == "cut, strided" else tensor
    storage = tensor.untyped_storage()
    storage.resize_(0 if how == "released" else storage.nbytes() - 2 * tensor.element_size())
    return tensor


HOW = ["released", "cut", "cut, strided"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["x", "topk_ids", "topk_weights"])
@pytest.mark.parametrize("wants_grad", [False, True])
@pytest.mark.parametrize("kind", DTYPES)
def test_inputs_of_the_experts(layer, name, how, wants_grad, kind):
    given = inputs(kind)
    given[name] = release(given[name], how)
    weights = given["topk_weights"].requires_grad_() if wants_grad and name != "topk_weights" else given["topk_weights"]
    with pytest.raises(ValueError, match=rf"^{name}: expected \d+ bytes of memory for .*, found \d+; it was released"):
        moe(given["x"], given["topk_ids"], weights, NO_FACTORS, MoeCall(layer, retain=True, chunk_size=4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_lora_factor(dtype):
    parameter = nn.Parameter(torch.randn(EXPERTS * RANK, HIDDEN, dtype=dtype))
    factor = LoraFactor(parameter, EXPERT_MAJOR, EXPERTS)
    parameter.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="^lora: expected .* found 0; it was released"):
        factor.operand()


@pytest.mark.parametrize("how", HOW)
def test_linear_layers(how):
    linear = nn.Linear(HIDDEN, INTER, bias=False).bfloat16()
    pack_linear(linear, "bf16")
    assert isinstance(linear, PackedLinear)
    with pytest.raises(ValueError, match="^x: expected .*; it was released"):
        packed_linear(release(torch.randn(3, 2 * HIDDEN if "strided" in how else HIDDEN), how), linear.layer)


def test_a_weight_that_is_to_be_packed():
    linear = nn.Linear(HIDDEN, INTER, bias=False).bfloat16()
    linear.weight.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="^weight: expected .*; it was released"):
        pack_linear(linear, "bf16")


def test_views_of_few_bytes_are_none_of_them(layer):
    given = inputs()
    given["x"] = torch.randn(1, HIDDEN).expand(5, HIDDEN)
    out = moe(*given.values(), NO_FACTORS, MoeCall(layer, retain=False, chunk_size=4))
    given["x"] = given["x"].contiguous()
    assert torch.equal(out, moe(*given.values(), NO_FACTORS, MoeCall(layer, retain=False, chunk_size=4)))


def test_experts_in_tensors_of_a_caller():
    gate, up, down = (torch.randn(EXPERTS, n, k) for n, k in ((INTER, HIDDEN), (INTER, HIDDEN), (HIDDEN, INTER)))
    experts = TensorExperts(gate, up, down, hidden=HIDDEN, inter=INTER, name="layer 0")
    up.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="^up_proj: expected .*; it was released"):
        experts.read("", 1)


@pytest.mark.parametrize("name", ["x", "topk_ids", "topk_weights"])
def test_inputs_of_the_operator(name):
    operator = KTMoEWrapper(0, EXPERTS, 2, HIDDEN, INTER, cpuinfer_threads=1)
    gate, up, down = (torch.randn(EXPERTS, n, k) for n, k in ((INTER, HIDDEN), (INTER, HIDDEN), (HIDDEN, INTER)))
    operator.load_weights_from_tensors(gate, up, down)
    given = inputs("kernels'")
    given[name] = release(given[name], "cut")
    with pytest.raises(ValueError, match="it was released"):
        operator.forward(*given.values())


def test_the_gradient_of_the_output(layer):
    given = inputs("kernels'")
    out = moe(given["x"].requires_grad_(), *list(given.values())[1:], NO_FACTORS, MoeCall(layer, chunk_size=4))
    gradient = torch.ones_like(out)
    gradient.untyped_storage().resize_(4)
    with pytest.raises(ValueError, match="^gradient: expected .*; it was released"):
        out.backward(gradient)


def test_weights_of_an_expert():
    experts = RoutedExperts(ExpertsSpec(EXPERTS, HIDDEN, INTER))
    gate, up, down = (torch.randn(*shape).bfloat16() for shape in ((INTER, HIDDEN), (INTER, HIDDEN), (HIDDEN, INTER)))
    up.untyped_storage().resize_(4)
    with pytest.raises(ValueError, match="^up: expected .*; it was released"):
        experts.load_expert(0, gate, up, down)


def test_hidden_states_of_three_dimensions(layer):
    experts = RoutedExperts(ExpertsSpec(EXPERTS, HIDDEN, INTER))
    x = torch.randn(2, 3, 2 * HIDDEN)[..., :HIDDEN]
    x.untyped_storage().resize_(4)
    with pytest.raises(ValueError, match="^x: expected .*; it was released"):
        experts(x, torch.zeros(6, 2, dtype=torch.int64), torch.ones(6, 2))


def test_a_linear_layer_under_autocast():
    linear = pack_linear(nn.Linear(HIDDEN, INTER, bias=False).bfloat16(), "bf16")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="^x: expected .*; it was released"):
        linear(release(torch.randn(3, HIDDEN), "cut"))


def test_the_mask_of_experts_on_a_gpu():
    mask = torch.zeros(EXPERTS, dtype=torch.bool)
    mask.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="^gpu_experts_mask: expected .*; it was released"):
        ExpertMap(EXPERTS, 0, mask)
