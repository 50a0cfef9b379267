"""Chat through stock LLaMA-Factory: one adapter after another in one process, as its page loads and unloads them."""

from __future__ import annotations

import peft
import pytest
import torch

import kt_sft
from tests.helpers import adapters, tiny_models
from tests.helpers.llamafactory_runs import drive, infer_config, workspace

ONE_AFTER_ANOTHER = """
import contextlib, torch
from llamafactory.chat import ChatModel
configs, ids = given

def logits(model):
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].float().tolist()

found = []
for config in configs:
    chat = ChatModel(config)
    model = chat.engine.model
    answer = chat.chat([{"role": "user", "content": "add 3 and 1"}])[0].response_text
    off = None
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            off = logits(model)
    found.append({"on": logits(model), "off": off, "answer": answer})
    del chat, model
give(found)
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return workspace(tmp_path_factory.mktemp("chat"))


def make_adapter(work, name: str, seed: int):
    """A folder with an adapter whose factors are random and large."""
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", task_type="CAUSAL_LM")
    model = kt_sft.get_peft_model(kt_sft.load_model(work / "model"), config)
    adapters.randomise(model, seed)
    model.save_pretrained(work / name)
    return work / name


def direct(work, adapter, ids) -> torch.Tensor:
    """Logits of the model without LLaMA-Factory."""
    model = kt_sft.load_model(work / "model", dtype=torch.bfloat16).eval()
    if adapter is not None:
        model = kt_sft.load_adapter(model, adapter).eval()
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].float()


def test_base_alone_and_adapters_one_after_another(work):
    first, second = make_adapter(work, "first", 1), make_adapter(work, "second", 2)
    order = [None, first, second, first, None]
    ids = tiny_models.token_ids()[0].tolist()
    configs = [infer_config(work, adapter_name_or_path=None if one is None else str(one)) for one in order]
    found = drive(ONE_AFTER_ANOTHER, configs, ids)
    wanted = {one: direct(work, one, ids) for one in (None, first, second)}
    assert not torch.allclose(wanted[first], wanted[second]) and not torch.allclose(wanted[first], wanted[None])
    for one, got in zip(order, found, strict=True):
        assert torch.equal(torch.tensor(got["on"]), wanted[one]), one
        if one is not None:
            assert torch.equal(torch.tensor(got["off"]), wanted[None]), f"{one} switched off"
    assert [got["answer"] for got in found[:2]] == [got["answer"] for got in reversed(found[3:])]
