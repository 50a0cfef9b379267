"""Experts in a ModuleList of remote code: SmallThinker's ReLU-gated ones.

Plain PEFT wraps each expert's linear layers, ours the fused matrices, so the truth is in two steps: the model with the
experts in float64 torch is the remote code without LoRA, and ours is that model with LoRA.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import kt_sft
from kt_sft.errors import UnsupportedModel
from kt_sft.integrations import peft as kt_peft
from kt_sft.integrations.llamafactory import exporting
from kt_sft.models.families import adapt_block
from kt_sft.models.layout import ExpertsSpec
from kt_sft.models.spec import find_experts, iter_routed_experts
from tests.helpers import parity, small_thinker, tiny_models


@pytest.fixture(scope="module", params=[True, False], ids=["softmax", "sigmoid"])
def directory(request, tmp_path_factory):
    return small_thinker.build(tmp_path_factory.mktemp("small_thinker") / "model", apply_softmax=request.param)


def remote(directory, dtype=torch.float64):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, trust_remote_code=True).eval()


def ours(directory):
    config = kt_sft.KTConfig(threads=1)
    return kt_sft.load_model(directory, config, dtype=torch.float32, trust_remote_code=True).eval()


def exact(directory, roundoff=0.0, seed=0):
    """The remote code's model with the experts in float64 torch."""
    model = remote(directory)
    for name, spec in find_experts(model).items():
        parent, _, attribute = name.rpartition(".")
        block = model.get_submodule(parent)
        noisy = parity.NoisyExperts(spec, getattr(block, attribute), parity.Rounding(roundoff, seed))
        adapt_block(block, getattr(block, attribute))
        setattr(block, attribute, noisy)
    return model


def test_spec_is_read_off_the_module_list(directory):
    spec = ExpertsSpec(5, 56, 36, "relu", expert_keys=("gate", "up", "down"))
    assert find_experts(remote(directory)) == {f"model.layers.{i}.mlp.block.experts": spec for i in range(2)}


def test_logits_are_those_of_the_remote_code(directory):
    ids = tiny_models.token_ids()
    with torch.no_grad():
        wanted, found = remote(directory)(input_ids=ids).logits, exact(directory)(input_ids=ids).logits
    assert parity.norm(found - wanted) <= 2.0**-20 * parity.norm(wanted)  # the router's softmax is in f32


def test_logits_and_all_gradients_match_float64(directory, tmp_path):
    made = kt_peft.get_peft_model(ours(directory), parity.all_linear())
    parity.fill_lora(made).save_pretrained(tmp_path / "adapter")

    def with_adapter(model):
        return kt_peft.load_adapter(model, tmp_path / "adapter", is_trainable=True).eval()

    plain = with_adapter(exact(directory))
    noisy = [with_adapter(exact(directory, 2 * parity.BF16_ROUNDOFF, seed)) for seed in range(parity.NUM_RUNS)]
    batches = (tiny_models.token_ids(seed=seed) for seed in range(200))
    ids = next(
        ids
        for ids in batches
        if all(parity.same_routing(parity.routing(plain, ids), parity.routing(model, ids)) for model in noisy)
    )

    def run(model):
        peft_model = with_adapter(model)
        parity.unfreeze_inputs_and_routers(peft_model)
        return parity.logits_and_grads(peft_model, ids)

    truth = run(exact(directory))
    spread = dict.fromkeys(truth, 0.0)
    for seed in range(1, 5):
        noisy = run(exact(directory, parity.BF16_ROUNDOFF, seed))
        spread = {name: max(spread[name], parity.norm(noisy[name] - truth[name])) for name in truth}
    bounds = {name: parity.SLACK * spread[name] + parity.F32_FLOOR * parity.norm(truth[name]) for name in truth}
    assert sum(".experts." in name for name in truth) == 8
    assert sum("primary_router" in name for name in truth) == 2
    parity.check_close(run(ours(directory)), truth, bounds)


def test_remote_code_reads_what_we_save(directory, tmp_path):
    ours(directory).save_pretrained(tmp_path / "saved")
    for file in directory.glob("*.py"):
        (tmp_path / "saved" / file.name).write_text(file.read_text())
    wanted, found = remote(directory).state_dict(), remote(tmp_path / "saved").state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert len(dict(iter_routed_experts(ours(tmp_path / "saved")))) == 2


def test_llamafactory_exports_it_where_remote_code_is_trusted(directory, tmp_path):
    keys = {"model_name_or_path": str(directory), "adapter_name_or_path": None, "adapter_folder": None}
    with pytest.raises(UnsupportedModel, match="trust"):
        exporting.open_merged(SimpleNamespace(**keys))
    merged = exporting.open_merged(SimpleNamespace(**keys, trust_remote_code=True))
    exporting.merging_model(merged).save_pretrained(str(tmp_path / "exported"))
    for file in directory.glob("*.py"):
        (tmp_path / "exported" / file.name).write_text(file.read_text())
    wanted, found = remote(directory).state_dict(), remote(tmp_path / "exported").state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
