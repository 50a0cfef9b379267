"""Logits and every gradient against stock transformers and PEFT in float64, for each family and instruction set."""

from __future__ import annotations

import functools

import pytest
import torch

from kt_sft.integrations import peft as kt_peft
from tests.helpers import parity, tiny_models


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """family -> (checkpoint, adapter directory, token ids, truth, bounds), made once."""

    @functools.cache
    def make(family: str):
        directory = tiny_models.build(family, tmp_path_factory.mktemp(family) / "model")
        adapter = tmp_path_factory.mktemp(family) / "adapter"
        ours = kt_peft.get_peft_model(parity.load_ours(directory), parity.all_linear())
        parity.fill_lora(ours).save_pretrained(adapter)
        ids = parity.decided_ids(directory, adapter)
        truth = _run(parity.plain_peft(directory, adapter), ids)
        bounds = parity.bounds(directory, adapter, truth, functools.partial(_run, ids=ids))
        return directory, adapter, ids, truth, bounds

    return make


def _run(peft_model, ids):
    parity.unfreeze_inputs_and_routers(peft_model)
    return parity.logits_and_grads(peft_model, ids)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_reference_without_noise_is_plain_peft(case, family):
    directory, adapter, ids, truth, _ = case(family)
    exact = _run(parity.noisy_peft(directory, adapter, roundoff=0.0), ids)
    for name, value in truth.items():
        torch.testing.assert_close(exact[name], value, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize("isa", parity.ISAS)
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_logits_and_all_gradients_match_plain_peft(case, family, isa):
    with parity.isa(isa):
        directory, adapter, ids, truth, bounds = case(family)
        ours = kt_peft.load_adapter(parity.load_ours(directory), adapter, is_trainable=True).eval()
        assert parity.same_routing(
            parity.routing(ours, ids), parity.routing(parity.plain_peft(directory, adapter), ids)
        )
        found = _run(ours, ids)
        routers = [name for name in truth if name.endswith("mlp.gate.weight")]
        experts = [name for name in truth if ".experts." in name and "lora_" in name]
        assert routers and len(experts) == 4 * len(routers)
        parity.check_close(found, truth, bounds)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_recompute_equals_retain_bitwise(case, family):
    directory, adapter, ids, _, _ = case(family)
    kept, computed_again = (
        _run(
            kt_peft.load_adapter(parity.load_ours(directory, cpu_activation=mode), adapter, is_trainable=True).eval(),
            ids,
        )
        for mode in ("retain", "recompute")
    )
    for name, value in kept.items():
        assert torch.equal(value, computed_again[name]), name


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_left_padding_changes_nothing_for_the_other_tokens(case, family):
    directory, adapter, ids, _, bounds = case(family)
    model = kt_peft.load_adapter(parity.load_ours(directory), adapter).eval()
    with torch.no_grad():
        alone = model(input_ids=ids).logits
        padded = torch.cat([torch.zeros(len(ids), 4, dtype=ids.dtype), ids], dim=1)
        mask = (torch.arange(padded.shape[1]) >= 4).long().expand(len(ids), -1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        beside = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits[:, 4:]
    assert parity.norm((beside - alone).double()) <= bounds["logits"]
