"""Every mixture-of-experts family: a tiny model from disk, its logits and all gradients against stock code in float64.

`docs/models.md` is written from the results (`python -m tests.helpers.models_page`).
"""

from __future__ import annotations

import functools

import pytest
import torch

from kt_sft.integrations import peft as kt_peft
from kt_sft.models.spec import find_experts, iter_routed_experts
from tests.helpers import families, parity, tiny_models


def _run(peft_model, ids):
    parity.unfreeze_inputs_and_routers(peft_model)
    return parity.logits_and_grads(peft_model, ids)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_logits_and_lora_gradients_match_plain_peft(family, tmp_path):
    directory, adapter = tiny_models.build(family, tmp_path / "model"), tmp_path / "adapter"
    made = kt_peft.get_peft_model(parity.load_ours(directory), parity.all_linear())
    parity.fill_lora(made).save_pretrained(adapter)
    ids = parity.decided_ids(directory, adapter)
    plain = parity.plain_peft(directory, adapter)
    truth = _run(plain, ids)
    bounds = parity.bounds(directory, adapter, truth, functools.partial(_run, ids=ids))

    ours = kt_peft.load_adapter(parity.load_ours(directory), adapter, is_trainable=True).eval()
    assert parity.same_routing(parity.routing(ours, ids), parity.routing(plain, ids))
    found = _run(ours, ids)
    layers = sum("vision" not in name for name, _ in iter_routed_experts(ours))
    routers = [
        name for name in parity.router_weights(ours) if name in truth and (truth[name].any() or family == "phimoe")
    ]
    assert layers and len(routers) >= layers, "no gradient reaches the routers"
    experts = [name for name in truth if ".experts." in name and "lora_" in name and "shared" not in name]
    assert len(experts) == 4 * layers and all(truth[name].any() for name in experts)
    parity.check_close(found, truth, bounds)


def _unpacked(model):
    """gate and up `[experts, 2 * inter, hidden]`, down `[experts, hidden, inter]`, as packed, by module."""
    found = {}
    for name, module in iter_routed_experts(model):
        parts = zip(*map(module.unpack_expert, range(module.num_experts)), strict=True)
        gate, up, down = (torch.stack(part) for part in parts)
        found[name] = torch.cat([gate, up], dim=1).float(), down.float()
    return found


def _weights(experts, spec):
    """The same of a stock module."""
    gate_up, down = (w.mT if spec.is_transposed else w for w in (experts.gate_up_proj, experts.down_proj))
    return torch.cat([gate_up[:, spec.gate_rows], gate_up[:, spec.up_rows]], dim=1), down


@pytest.mark.parametrize("fused", [False, True], ids=["checkpoint_keys", "fused"])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_experts_of_both_layouts_are_those_of_the_stock_model(family, fused, tmp_path):
    directory = tiny_models.build(family, tmp_path / "model", fused=fused)
    stock, ours = tiny_models.load_stock(directory), parity.load_ours(directory)
    specs, found = find_experts(stock), _unpacked(ours)
    assert list(found) == list(specs)
    for name, spec in specs.items():
        experts = stock.get_submodule(name)
        for packed, wanted in zip(found[name], _weights(experts, spec), strict=True):
            assert torch.equal(packed, wanted)
        for bias in spec.bias_shapes:
            assert torch.equal(getattr(ours.get_submodule(name), bias).float(), getattr(experts, bias))


@pytest.mark.parametrize("original", [True, False], ids=["checkpoint_keys", "fused"])
@pytest.mark.parametrize(
    "family", ["gpt_oss", "llama4_text", "qwen3_vl_moe", "ernie4_5_vl_moe", "gemma4", "lfm2_moe", "phimoe"]
)
def test_stock_code_reads_what_we_save(family, original, tmp_path):
    directory = tiny_models.build(family, tmp_path / "model")
    ours = parity.load_ours(directory, dtype=torch.bfloat16)
    ours.save_pretrained(tmp_path / "saved", save_original_format=original)
    wanted = tiny_models.load_stock(directory).state_dict()
    found = tiny_models.load_stock(tmp_path / "saved").state_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text", "gemma4_text"])
def test_merged_weights_are_those_that_plain_peft_merges(family, tmp_path):
    directory, adapter = tiny_models.build(family, tmp_path / "model"), tmp_path / "adapter"
    model = kt_peft.get_peft_model(parity.load_ours(directory), parity.all_linear())
    parity.fill_lora(model).save_pretrained(adapter)
    merged = _unpacked(model.merge_and_unload())
    stock = parity.plain_peft(directory, adapter).merge_and_unload()
    for name, spec in find_experts(stock).items():
        for found, wanted in zip(merged[name], _weights(stock.get_submodule(name), spec), strict=True):
            assert (found - wanted).abs().max() <= wanted.abs().max() * 2.0**-8  # one rounding to bf16
            assert not torch.equal(found, wanted.float())
