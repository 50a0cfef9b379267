"""Deferred experts inside a transformers model: the setting, adapters, generation, and the refusal in training."""

from __future__ import annotations

import types

import pytest
import torch
from peft import LoraConfig

import kt_sft
from kt_sft.models.spec import iter_routed_experts
from kt_sft.schedule.deferred import split_deferred
from tests.helpers import tiny_models


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_models.build("qwen3_moe", tmp_path_factory.mktemp("deferred") / "model", num_hidden_layers=3)


def load(checkpoint, deferred: int, **config):
    settings = kt_sft.KTConfig(max_deferred_experts_per_token=deferred, **config)
    return kt_sft.load_model(checkpoint, settings, dtype=torch.float32).eval()


def defer_by_hand(model, count: int):
    """A model without the setting whose experts modules do what it says, in plain steps."""
    modules = [module for _, module in iter_routed_experts(model)]
    left: list[torch.Tensor] = []

    def forward(self, x, ids, weights):
        layer = modules.index(self)
        now, later = split_deferred(ids, weights, count if self is not modules[-1] else 0, self.num_experts)
        out = type(self).forward(self, x, now, weights)
        if layer > 0:
            out = out + left.pop()
        if self is not modules[-1]:
            left.append(type(self).forward(self, x, later, weights))
        return out

    for module in modules:
        module.forward = types.MethodType(forward, module)
    return model


def logits(model, ids):
    with torch.inference_mode():
        return model(ids).logits


def with_lora(model):
    """Factors that change every logit, the same for each model that this is called with."""
    torch.manual_seed(5)
    model = kt_sft.get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.1)
    return model


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "lora"])
@pytest.mark.parametrize("count", [1, 2])
def test_logits_are_those_of_the_rule_in_plain_steps(checkpoint, count, adapted):
    ours, plain = load(checkpoint, count), defer_by_hand(load(checkpoint, 0), count)
    if adapted:
        ours, plain = with_lora(ours), with_lora(plain)
    for seed in (2, 3):
        ids = tiny_models.token_ids(seed=seed)
        assert torch.allclose(logits(ours, ids), logits(plain, ids), rtol=1e-5, atol=1e-5)


def test_deferring_changes_the_logits_and_zero_does_not(checkpoint):
    ids = tiny_models.token_ids()
    exact = logits(load(checkpoint, 0), ids)
    assert torch.equal(logits(load(checkpoint, 0), ids), exact)
    assert not torch.allclose(logits(load(checkpoint, 1), ids), exact, atol=1e-3)


def test_generation_repeats_bitwise(checkpoint):
    """Prefill, decode, prefill again: nothing of one pass reaches another."""
    model = load(checkpoint, 1)
    ids = tiny_models.token_ids(batch=1)
    arguments = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    first, second = (model.generate(ids, **arguments) for _ in range(2))
    assert all(map(torch.equal, first.logits, second.logits))


def test_training_is_refused(checkpoint):
    model = load(checkpoint, 1).train()
    with pytest.raises(RuntimeError, match="max_deferred_experts_per_token: deferred experts are for inference"):
        model(tiny_models.token_ids())
    with pytest.raises(RuntimeError, match="eval"):
        model.eval()(tiny_models.token_ids())  # gradients are recorded
    ids = tiny_models.token_ids()
    assert torch.equal(logits(model, ids), logits(load(checkpoint, 1), ids)), "nothing is left of what was refused"
