"""An adapter that PEFT does not count among the active ones computes nothing, in experts as in linear layers."""

from __future__ import annotations

import torch

from kt_sft.integrations import peft as kt_peft
from tests.helpers import parity, tiny_models


def test_adapter_that_is_not_active_does_nothing(tmp_path):
    directory, ids = tiny_models.build("qwen3_moe", tmp_path), tiny_models.token_ids()

    @torch.no_grad()
    def logits(model):
        return model(input_ids=ids).logits

    base = logits(parity.load_ours(directory))
    model = parity.fill_lora(kt_peft.get_peft_model(parity.load_ours(directory), parity.all_linear())).eval()
    adapted = logits(model)
    assert (adapted - base).norm() > 0.05 * base.norm()
    model.base_model.set_adapter([])
    assert torch.equal(logits(model), base)
    model.base_model.set_adapter("default")
    assert torch.equal(logits(model), adapted)
