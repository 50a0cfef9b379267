"""What compat/ says of transformers and PEFT is so in the releases that are installed."""

from __future__ import annotations

from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from kt_sft.compat import peft as of_peft
from kt_sft.compat import transformers as of_transformers
from kt_sft.compat.releases import release_of

TINY = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 1,
    "vocab_size": 16,
}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**TINY))


@pytest.mark.parametrize(
    ("owner", "names"),
    [
        (Trainer, [of_transformers.SAVE, of_transformers.SAVE_CHECKPOINT, of_transformers.LOAD_OPTIMIZER]),
        (Trainer, [of_transformers.OUTPUT_FOLDER, of_transformers.PUSH]),
        (PreTrainedModel, ["_keys_to_ignore_on_load_unexpected", "_is_stateful"]),
        (_BaseAutoModelClass, ["_model_mapping"]),
        (of_peft.BaseTunerLayer, ["_disable_adapters", "disable_adapters"]),
        (of_peft.LoraLayer, ["_check_forward_args"]),
        (LoraConfig(), ["_custom_modules"]),
    ],
)
def test_names_that_are_read_or_replaced_are_there(owner, names):
    """One that is gone would be written to, or missed, in silence."""
    assert [name for name in names if not hasattr(owner, name)] == []


def test_releases_are_those_that_are_installed():
    assert release_of("peft") == of_peft.RELEASE == version("peft") and release_of("no-such-distribution") is None


def test_gate_of_a_decorated_experts_module(model):
    experts = model.model.layers[0].mlp.experts
    assert of_transformers.has_gate_function(experts) and of_transformers.has_plain_gate(experts)
    assert not of_transformers.has_gate_function(model.lm_head)
    own = type("Own", (type(experts),), {"_apply_gate": lambda self, x: x})
    assert not of_transformers.has_plain_gate(own.__new__(own))


def test_attention_that_is_chosen_is_built():
    config = Qwen3MoeConfig(**TINY)
    of_transformers.use_attention(config, "eager")
    assert AutoModelForCausalLM.from_config(config).config._attn_implementation == "eager"


def test_keys_left_unread_are_those_of_one_model(model):
    class_has = type(model)._keys_to_ignore_on_load_unexpected
    of_transformers.leave_unread(model, ["first"])
    of_transformers.leave_unread(model, ["second"])
    assert model._keys_to_ignore_on_load_unexpected[-2:] == ["first", "second"]
    for _ in range(2):
        of_transformers.read_all_again(model)
        assert model._keys_to_ignore_on_load_unexpected == class_has


def test_conversions_are_taken_off_where_there_are_any(model):
    bare = nn.Linear(2, 2)
    of_transformers.drop_conversions(bare, lambda entry: True)
    assert not hasattr(bare, "_weight_conversions")
    model._weight_conversions = ["ours", "theirs"]
    of_transformers.drop_conversions(model, lambda entry: entry == "ours")
    assert model._weight_conversions == ["theirs"]


def test_auto_class_serves_its_models():
    assert of_transformers.serves(AutoModelForCausalLM, Qwen3MoeConfig)
    assert not of_transformers.serves(AutoModelForCausalLM, LoraConfig)


def test_quantizer_is_forgotten():
    AUTO_QUANTIZER_MAPPING["of_a_test"] = object
    of_transformers.forget_quantizer("of_a_test")
    of_transformers.forget_quantizer("of_a_test")
    assert "of_a_test" not in AUTO_QUANTIZER_MAPPING


def test_trainer_is_diverted_and_comes_back(model, tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path / "run"), report_to=[], use_cpu=True)
    of_transformers.use_one_gpu(arguments)
    assert arguments.n_gpu == 1
    trainer = Trainer(model=model, args=arguments)
    with pytest.raises(KeyError), of_transformers.diverted(trainer, tmp_path / "aside"):
        assert of_transformers.run_folder(trainer, None) == tmp_path / "aside"
        raise KeyError
    assert of_transformers.run_folder(trainer, None) == tmp_path / "run"


def test_newest_and_best_checkpoints_stay(tmp_path):
    for step in (1, 2, 3, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    of_transformers.delete_older_checkpoints(tmp_path, most=2, best=str(tmp_path / "checkpoint-1"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-4"]


def test_services_that_are_installed_are_known():
    there, known = of_transformers.reporters()
    assert set(there) <= set(known) and "tensorboard" in known


def test_layers_are_disabled_and_come_back_as_they_were():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), LoraConfig(target_modules=["0", "1"]))
    layers = [module for module in model.modules() if isinstance(module, of_peft.LoraLayer)]
    layers[0].enable_adapters(False)
    for layer in layers:
        nn.init.ones_(layer.lora_B["default"].weight)
    x = torch.ones(1, 4)
    before = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(KeyError), of_peft.disabled(layers):
        assert torch.equal(layers[1](x), layers[1].get_base_layer()(x))
        raise KeyError
    assert [layer.disable_adapters for layer in layers] == [True, False]
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert not torch.equal(layers[1](x), layers[1].get_base_layer()(x))


def test_every_linear_is_all_linear(model):
    found = of_peft.every_linear(LoraConfig(target_modules="all-linear"), model)
    assert "model.layers.0.self_attn.q_proj" in found and "lm_head" not in found


def test_widths_exchanged_by_transformers_or_peft_are_seen():
    assert not of_peft.has_exchanged_widths(SimpleNamespace())
    assert of_peft.has_exchanged_widths(SimpleNamespace(_did_swap_in_out_features=True))
