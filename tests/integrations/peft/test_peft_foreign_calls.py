"""Adapters that anybody's code puts on our model: PEFT's own calls and TRL's trainer, beside kt_sft.get_peft_model."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer

from kt_sft.errors import ConfigError
from kt_sft.integrations import peft as kt_peft
from kt_sft.models.spec import iter_routed_experts
from tests.helpers import parity, tiny_models
from tests.helpers.tiny_tokenizer import VOCAB_SIZE, save_tiny_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoint") / "model"
    model = tiny_models.build("qwen3_moe", root, vocab_size=VOCAB_SIZE + 5)
    save_tiny_tokenizer(model)
    return model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, VOCAB_SIZE, (2, 11), generator=torch.Generator().manual_seed(3))


def config(**changes):
    return parity.all_linear(lora_dropout=0.1, **changes)


def inject(model, lora_config):
    return peft.inject_adapter_in_model(lora_config, model)


def wrap(model, lora_config):
    return PeftModel(model, lora_config)


def trainable(model):
    return {n.removeprefix("base_model.model."): p for n, p in model.named_parameters() if p.requires_grad}


def logits_and_grads(model, ids):
    """In train mode, with the same masks of dropout."""
    torch.manual_seed(5)
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in trainable(model).items()}


@pytest.mark.parametrize("call", [peft.get_peft_model, wrap, inject], ids=["get_peft_model", "PeftModel", "inject"])
def test_pefts_own_calls_bind_the_experts_as_ours_does(checkpoint, ids, call):
    ours = parity.fill_lora(kt_peft.get_peft_model(parity.load_ours(checkpoint), config()))
    theirs = call(parity.load_ours(checkpoint), config())
    with torch.no_grad():
        for name, parameter in trainable(theirs).items():
            parameter.copy_(trainable(ours)[name])
    assert {n: p.shape for n, p in trainable(theirs).items()} == {n: p.shape for n, p in trainable(ours).items()}
    expected, found = (logits_and_grads(model, ids) for model in (ours, theirs))
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())
    of_experts = [grad for name, grad in expected.items() if "experts" in name]
    assert of_experts and all(grad.abs().max() > 0 for grad in of_experts)


def test_saved_by_pefts_own_way_it_loads_with_its_dropout(checkpoint, tmp_path, ids):
    theirs = parity.fill_lora(peft.get_peft_model(parity.load_ours(checkpoint), config()))
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0.0
    assert json.loads((tmp_path / "kt_sft.json").read_text())["lora_dropout"] == 0.1
    loaded = PeftModel.from_pretrained(parity.load_ours(checkpoint), str(tmp_path), is_trainable=True)
    assert {experts.lora.dropout for _, experts in iter_routed_experts(loaded)} == {0.1}
    theirs.eval(), loaded.eval()
    with torch.no_grad():
        assert torch.equal(theirs(input_ids=ids).logits, loaded(input_ids=ids).logits)
    again = LoraConfig.from_pretrained(str(tmp_path))
    PeftModel.from_pretrained(parity.load_ours(checkpoint), str(tmp_path), config=again)
    again.r = 5
    with pytest.raises(ConfigError, match="another r; leave config out"):
        PeftModel.from_pretrained(parity.load_ours(checkpoint), str(tmp_path), config=again)


def test_expert_lora_of_the_models_settings_is_honoured(checkpoint):
    model = peft.get_peft_model(parity.load_ours(checkpoint, expert_lora=False), config())
    assert not [name for name in trainable(model) if "experts" in name]
    model = peft.get_peft_model(parity.load_ours(checkpoint, expert_lora=True), config(target_modules=["q_proj"]))
    assert [name for name in trainable(model) if "experts" in name]


def test_other_kinds_are_refused_in_one_line(checkpoint):
    model = parity.load_ours(checkpoint)
    for call in (
        lambda: peft.get_peft_model(model, IA3Config(target_modules=["q_proj"], feedforward_modules=[])),
        lambda: peft.get_peft_model(model, config(), mixed=True),
    ):
        with pytest.raises(ConfigError, match="only LoRA is supported"):
            call()
    with pytest.raises(ConfigError, match="use kt_sft.load_adapter"):
        model.load_adapter("somewhere")


def test_second_adapter_with_the_same_config_object_is_refused(checkpoint, ids):
    model = parity.fill_lora(peft.get_peft_model(parity.load_ours(checkpoint), config())).eval()
    with torch.no_grad():
        before = model(input_ids=ids).logits
    with pytest.raises(ConfigError, match="holds one adapter at a time and has 'default'"):
        model.add_adapter("ref", model.peft_config["default"])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)


def test_adapters_without_experts_may_be_several(checkpoint):
    model = peft.get_peft_model(parity.load_ours(checkpoint), LoraConfig(target_modules=["q_proj"]))
    model.add_adapter("b", LoraConfig(target_modules=["q_proj", "v_proj"]))
    with pytest.raises(ConfigError, match="holds one adapter at a time"):
        model.add_adapter("c", config())
    assert set(model.peft_config) == {"default", "b"}


def test_a_stock_model_is_pefts_business(checkpoint):
    model = peft.get_peft_model(tiny_models.load_stock(checkpoint), LoraConfig(target_modules=["q_proj", "nonsense"]))
    assert type(model.peft_config["default"]) is LoraConfig


def sft(model, lora_config, tokenizer, output):
    """Losses of two steps of TRL's trainer."""
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([{"text": f"add {i} and 1: {i + 1}"} for i in range(8)])
    arguments = SFTConfig(
        output_dir=str(output), max_steps=2, per_device_train_batch_size=2, logging_steps=1, learning_rate=1e-2,
        report_to="none", use_cpu=True, seed=7, save_strategy="no", bf16=False, max_length=32,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, peft_config=lora_config
    )
    trainer.train()
    trainer.save_model(str(output))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trl_trains_what_our_call_trains(checkpoint, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    torch.manual_seed(1)
    ours = kt_peft.get_peft_model(parity.load_ours(checkpoint), config())
    expected = sft(ours, None, tokenizer, tmp_path / "ours")
    torch.manual_seed(1)
    found = sft(parity.load_ours(checkpoint), config(), tokenizer, tmp_path / "trl")
    assert found == expected
    assert len(found) == 2
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "trl"))
    assert set(first) == set(second)
    assert sum("experts" in name for name in second) == 8
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(tensor.abs().max() > 0 for tensor in second.values())
