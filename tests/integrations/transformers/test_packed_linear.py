"""A bf16 model whose dense part is on the CPU: packed linear layers behind transformers and stock PEFT."""

from __future__ import annotations

import copy
import logging
import pickle
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors import safe_open
from torch import nn

import kt_sft
from kt_sft.integrations import peft as kt_peft
from kt_sft.integrations.llamafactory import args
from kt_sft.integrations.transformers import linears
from kt_sft.integrations.transformers.linears import pack_linears
from kt_sft.nn.packed_linear import PackedLinear, PackedWeight, pack_linear
from tests.helpers import parity, tiny_models
from tests.helpers.tolerance import rel_l2

FAMILIES = ("qwen3_moe", "deepseek_v2")  # the latter: router as nn.Linear, shared experts, dense MLP


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    return tiny_models.build(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return tiny_models.build("qwen3_moe", tmp_path_factory.mktemp("qwen"))


def load(directory, cpu_linear: str = "bf16", **kwargs) -> nn.Module:
    return kt_sft.load_model(directory, kt_sft.KTConfig(threads=1, cpu_linear=cpu_linear), dtype="bfloat16", **kwargs)


def packed_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]


def linear(n: int = 20, k: int = 36, *, bias: bool = True) -> nn.Linear:
    return nn.Linear(k, n, bias=bias).to(torch.bfloat16).requires_grad_(False)


def tensors_of(directory):
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            found.update({name: handle.get_tensor(name) for name in handle.keys()})  # noqa: SIM118
    return found


def assert_same_checkpoint(first, second) -> None:
    expected, found = tensors_of(first), tensors_of(second)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype and torch.equal(tensor, found[name]), name


# --- which layers ---


def test_every_frozen_linear_is_packed_but_routers(checkpoint):
    model, stock = load(checkpoint), load(checkpoint, "off")
    every = [name for name, module in stock.named_modules() if isinstance(module, nn.Linear)]
    assert packed_names(model) == [name for name in every if not name.endswith("mlp.gate")]
    assert "lm_head" in packed_names(model)
    hidden = sum(model.get_submodule(name).weight.numel() for name in packed_names(model))
    assert sum(p.numel() for p in stock.parameters()) == sum(p.numel() for p in model.parameters()) + hidden


def test_off_leaves_stock_modules(checkpoint):
    assert not packed_names(load(checkpoint, "off"))


def test_llamafactory_export_packs_nothing():
    arguments = {"kt_cpu_linear": "int8", "export_dir": None}
    assert args.kt_config(SimpleNamespace(**arguments)).cpu_linear == "int8"
    assert args.kt_config(SimpleNamespace(**arguments | {"export_dir": "out"})).cpu_linear == "off"


def test_f32_model_is_left_alone(qwen):
    assert not packed_names(parity.load_ours(qwen, cpu_linear="bf16"))


def test_tied_head_and_hooked_layers_are_left_alone(qwen, tmp_path):
    tied = tiny_models.build("qwen3_moe", tmp_path, tie_word_embeddings=True)
    assert "lm_head" not in packed_names(load(tied)) and packed_names(load(tied))
    model = load(qwen, "off")
    model.lm_head.register_forward_hook(lambda *_: None)
    assert "lm_head" not in pack_linears(model, kt_sft.KTConfig(cpu_linear="bf16"))


@pytest.mark.parametrize(("gain", "packs"), [(5.0, True), (1.0, False)])
def test_auto_packs_large_layers_where_that_is_faster(qwen, monkeypatch, caplog, gain, packs):
    monkeypatch.setattr(linears, "speedup", lambda: gain)
    model = load(qwen, "off")
    model.lm_head.weight = nn.Parameter(torch.zeros(2048, 48, dtype=torch.bfloat16))
    model.lm_head.out_features = 2048
    with caplog.at_level(logging.INFO, logger=linears.__name__):
        assert pack_linears(model, kt_sft.KTConfig()) == (["lm_head"] if packs else [])
    assert f"{gain:.1f} times torch's speed" in caplog.text and ("packed 1 " in caplog.text) == packs


def test_speed_is_measured_once():
    linears._speedup.cache_clear()
    assert linears.speedup() > 0
    assert linears.speedup() == linears.speedup() and linears._speedup.cache_info().misses == 1


# --- what they compute ---


def test_model_computes_what_the_stock_layers_compute(checkpoint):
    """Both round every linear's result to bf16 once: they part where f32 sums of another order round another way."""
    ids = tiny_models.token_ids()
    results = []
    for mode in ("bf16", "off"):
        model = parity.fill_lora(kt_peft.get_peft_model(load(checkpoint, mode), parity.all_linear()))
        results.append(parity.logits_and_grads(model.eval(), ids))
    assert results[0].keys() == results[1].keys()
    for name, value in results[1].items():
        assert rel_l2(results[0][name], value) <= 2 * parity.BF16_ROUNDOFF, name


@pytest.mark.parametrize("mode", ["bf16", "int8"])
def test_model_is_as_near_to_float64_as_the_stock_one(qwen, mode):
    ids = tiny_models.token_ids()
    truth = tiny_models.load_stock(qwen, torch.float64)(ids).logits.detach()
    with torch.no_grad():
        ours, stock = (rel_l2(load(qwen, kind).eval()(ids).logits, truth) for kind in (mode, "off"))
    assert ours <= (1.5 * stock if mode == "bf16" else 0.1)


def test_lora_on_attention_and_experts_trains_and_its_adapter_loads(checkpoint, tmp_path):
    model = kt_peft.get_peft_model(load(checkpoint), parity.all_linear()).train()
    assert any(name.endswith("q_proj.base_layer") or "q_a_proj.base" in name for name in packed_names(model))
    ids = tiny_models.token_ids()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    model.save_pretrained(tmp_path)
    again = kt_peft.load_adapter(load(checkpoint, device_map="cpu"), tmp_path)
    assert packed_names(again) == packed_names(model)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_parameters_are_counted_as_in_the_stock_model(checkpoint):
    counts = [
        kt_peft.get_peft_model(load(checkpoint, mode), parity.all_linear()).get_nb_trainable_parameters()
        for mode in ("bf16", "off")
    ]
    assert counts[0] == counts[1]


def test_autocast_decides_the_dtype():
    layer, x = pack_linear(linear()), torch.randn(3, 36)
    assert layer(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_trainable_bias_gets_its_gradient():
    plain = linear()
    packed = pack_linear(copy.deepcopy(plain))
    plain.bias.requires_grad_(True), packed.bias.requires_grad_(True)
    x = torch.randn(6, 36).to(torch.bfloat16)
    for module in (plain, packed):
        module(x).sum().backward()
    assert torch.equal(packed.bias.grad, plain.bias.grad)


# --- saving, merging, moving: whoever needs the weight gets it ---


def test_full_save_writes_the_weights_that_were_loaded(checkpoint, tmp_path):
    model = load(checkpoint)
    model.save_pretrained(tmp_path)
    assert_same_checkpoint(checkpoint, tmp_path)
    assert packed_names(model) and not any("q_proj.weight" in name for name in model.state_dict())


def test_int8_save_warns_that_weights_were_rounded(qwen, tmp_path, caplog):
    load(qwen, "int8").save_pretrained(tmp_path)
    assert "cpu_linear" in caplog.text
    name = "model.layers.0.self_attn.q_proj.weight"
    assert 1e-3 < rel_l2(tensors_of(tmp_path)[name], tensors_of(qwen)[name]) < 1.5e-2


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merged_model_is_the_stock_one(checkpoint, tmp_path, safe_merge):
    for mode in ("bf16", "off"):
        model = parity.fill_lora(kt_peft.get_peft_model(load(checkpoint, mode), parity.all_linear()))
        merged = model.merge_and_unload(safe_merge=safe_merge)
        assert packed_names(merged) == (["lm_head"] if mode == "bf16" else [])
        merged.save_pretrained(tmp_path / mode)
    assert_same_checkpoint(tmp_path / "bf16", tmp_path / "off")


def test_stock_peft_merges_and_trains_modules_too(qwen):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    results = []
    for mode in ("bf16", "off"):
        model = parity.fill_lora(peft.get_peft_model(load(qwen, mode), config))
        head = model.base_model.model.lm_head.modules_to_save["default"]
        assert type(head) is nn.Linear and head.weight.requires_grad
        with torch.no_grad():
            head.weight += 1
        results.append(model.merge_and_unload())
    ours, stock = (result.state_dict() for result in results)
    assert torch.equal(ours["lm_head.weight"], stock["lm_head.weight"])
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(ours[name], stock[name])


def test_resized_vocabulary_keeps_the_heads_rows(qwen):
    model, stock = load(qwen), load(qwen, "off")
    model.resize_token_embeddings(tiny_models.VOCAB + 5, mean_resizing=False)
    assert torch.equal(model.lm_head.weight[: tiny_models.VOCAB], stock.lm_head.weight)


@pytest.mark.parametrize(
    "use",
    [
        lambda layer: layer.weight.data,
        lambda layer: layer.weight.float(),
        lambda layer: nn.functional.linear(torch.zeros(2, 36).bfloat16(), layer.weight),
        lambda layer: torch.cat([layer.weight, layer.weight]),
        lambda layer: layer.weight.requires_grad_(True),
        lambda layer: layer.float(),
        lambda layer: layer.to("meta"),
        lambda layer: layer.restore(),
    ],
)
def test_use_of_the_weight_gives_an_ordinary_layer_back(use):
    plain = linear()
    layer = pack_linear(copy.deepcopy(plain))
    placeholder = layer.weight
    use(layer)
    assert type(layer) is nn.Linear and list(layer._parameters) == ["weight", "bias"]
    assert layer.weight is placeholder or layer.weight.device.type == "meta"
    if layer.weight.device.type != "meta":
        assert torch.equal(layer.weight, plain.weight.to(layer.weight.dtype))
        x = torch.randn(2, 36).to(layer.weight.dtype)
        assert torch.equal(layer(x), plain.to(x.dtype)(x))


def test_metadata_of_the_weight_leaves_the_layer_packed():
    layer = pack_linear(linear())
    weight = layer.weight
    assert isinstance(weight, nn.Parameter) and isinstance(layer, nn.Linear)
    assert weight.shape == (20, 36) and weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
    assert weight.numel() == 720 and weight.dim() == 2 and not weight.requires_grad and not weight.is_meta
    layer.requires_grad_(False).eval().to("cpu")
    assert type(layer) is PackedLinear and type(layer.weight) is PackedWeight


def test_state_dict_with_a_weight_is_packed():
    layer, other = pack_linear(linear()), linear()
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.stored_weight(), other.weight) and torch.equal(layer.bias, other.bias)
    layer.load_state_dict({"bias": other.bias})
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"size mismatch for weight: expected \[20, 36\], found \[36, 20\]"):
            layer.load_state_dict({"weight": other.weight.mT, "bias": other.bias}, strict=strict)


def test_copies_are_ordinary_layers_and_pickles_are_refused():
    plain = linear()
    layer = pack_linear(copy.deepcopy(plain)).eval()
    copied = copy.deepcopy(layer)
    assert type(copied) is nn.Linear and torch.equal(copied.weight, plain.weight) and not copied.training
    assert type(layer) is PackedLinear
    for refused in (pickle.dumps, copy.copy):
        with pytest.raises(TypeError, match="cannot be pickled"):
            refused(layer)


@pytest.mark.parametrize(
    "layer", [nn.Linear(4, 4), nn.Bilinear(2, 2, 2).bfloat16(), nn.Linear(4, 4, device="meta").bfloat16()], ids=str
)
def test_other_layers_are_refused(layer):
    with pytest.raises(ValueError, match="expected an nn.Linear"):
        pack_linear(layer)


def test_weight_that_is_not_finite_names_its_layer(qwen):
    model = load(qwen, "off")
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.k_proj.*cpu_linear"):
        pack_linears(model, kt_sft.KTConfig(cpu_linear="int8"))
