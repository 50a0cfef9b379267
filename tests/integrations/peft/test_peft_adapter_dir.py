"""An adapter that does not fit is refused in one line, before the model changes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from kt_sft.errors import FormatError
from kt_sft.integrations import peft as kt_peft
from tests.helpers import parity, tiny_models


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def ours(root):
    return parity.load_ours(tiny_models.build("qwen3_moe", root / "qwen3_moe"))


@pytest.fixture(scope="module")
def good(root):
    model = parity.load_ours(tiny_models.build("qwen3_moe", root / "qwen3_moe"))
    parity.fill_lora(kt_peft.get_peft_model(model, parity.all_linear(lora_dropout=0.1))).save_pretrained(root / "good")
    return root / "good"


@pytest.fixture
def adapter(good, tmp_path):
    return shutil.copytree(good, tmp_path / "adapter")


def rewrite(adapter, change):
    file = adapter / "adapter_model.safetensors"
    save_file({k: v.contiguous() for k, v in change(load_file(file)).items()}, file, metadata={"format": "pt"})


def edit_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refuse(model, adapter, message):
    ids = tiny_models.token_ids()
    before = model(input_ids=ids).logits
    with pytest.raises(FormatError, match=message) as caught:
        kt_peft.load_adapter(model, adapter)
    assert "\n" not in str(caught.value)
    assert str(adapter) in str(caught.value)
    assert not [name for name, _ in model.named_modules() if "lora" in name]
    assert torch.equal(model(input_ids=ids).logits, before)


def test_missing_directory(ours, root):
    refuse(ours, root / "nowhere" / "at all", "no such adapter directory; check the path")


def test_directory_without_config(ours, tmp_path):
    refuse(ours, tmp_path, "no adapter_config.json in it; name the directory that save_pretrained wrote")


def test_directory_without_weights(ours, adapter):
    (adapter / "adapter_model.safetensors").unlink()
    refuse(ours, adapter, "no adapter weights")


def test_truncated_weights(ours, adapter):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refuse(ours, adapter, "truncated file")


def test_config_that_is_not_json(ours, adapter):
    (adapter / "adapter_config.json").write_text("{")
    refuse(ours, adapter, "expected a JSON object")


def test_another_kind_of_adapter(ours, adapter):
    edit_json(adapter / "adapter_config.json", peft_type="IA3")
    refuse(ours, adapter, "peft_type: expected LORA, found IA3")


@pytest.mark.parametrize("family", [f for f in tiny_models.FAMILIES if f != "qwen3_moe"])
def test_another_model_type(root, good, family):
    model = parity.load_ours(tiny_models.build(family, root / family))
    refuse(model, good, f"trained on another model type: expected {family}, found qwen3_moe")


def test_another_model_type_of_a_plain_adapter(root, adapter):
    (adapter / "kt_sft.json").unlink()
    model = parity.load_ours(tiny_models.build("mixtral", root / "mixtral"))
    refuse(model, adapter, "trained on another model type: expected mixtral, found qwen3_moe")
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=None)
    refuse(model, adapter, r"lora_A\.weight: expected \[3, 56\], found \[3, 48\]")


def test_another_size_of_the_same_family(root, good):
    model = parity.load_ours(tiny_models.build("qwen3_moe", root / "other_size", moe_intermediate_size=28))
    refuse(model, good, r"experts\.lora_A\.weight and B\.weight: widths: expected \(48, 28\), found \(48, 20\)")


def test_more_layers_than_the_model(root, good):
    model = parity.load_ours(tiny_models.build("qwen3_moe", root / "one_layer", num_hidden_layers=1))
    refuse(model, good, r"layers\.1\..*: expected a LoRA target of the model, found none")


def test_missing_tensor_of_a_linear_layer(ours, adapter):
    rewrite(adapter, lambda tensors: {k: v for k, v in tensors.items() if "layers.1.self_attn.q_proj" not in k})
    refuse(ours, adapter, r"layers\.1\.self_attn\.q_proj\.lora_A\.weight: expected present, found missing")


def test_factors_of_the_other_peft_layout_load(ours, good, adapter):
    def exchange(tensors):
        experts = {k: v for k, v in tensors.items() if ".experts." in k}
        for key, value in experts.items():
            other = key.replace("lora_A", "lora_?").replace("lora_B", "lora_A").replace("lora_?", "lora_B")
            num, rank = 7, 3
            if "lora_A" in key:  # [experts * rank, width] -> [width, rank * experts]
                tensors[other] = value.view(num, rank, -1).permute(2, 1, 0).reshape(-1, rank * num)
            else:
                tensors[other] = value.view(-1, rank, num).permute(2, 1, 0).reshape(num * rank, -1)
        return tensors

    rewrite(adapter, exchange)
    what = r"width of lora_A: expected \d+, as peft_version 0.18.1 in .* has it, found \d+, as in the layout peft-0.19"
    refuse(ours, adapter, what)
    edit_json(adapter / "adapter_config.json", peft_version="0.19.1")
    ids = tiny_models.token_ids()
    logits = []
    for folder in (good, adapter):
        model = kt_peft.load_adapter(ours, folder)
        logits.append(model(ids).logits)
        model.unload()
    assert torch.equal(*logits)


def test_one_factor_of_the_other_peft_layout(ours, adapter):
    """Neither layout: the tensor that does not fit is named."""

    def exchange(tensors):
        key = next(k for k in tensors if ".experts.base_layer.lora_A" in k)
        other = key.replace("lora_A", "lora_B")
        tensors[key], tensors[other] = tensors[other].mT, tensors[key].mT
        return tensors

    rewrite(adapter, exchange)
    refuse(ours, adapter, r"base_layer\.lora_A\.weight and B\.weight: widths: expected")


def test_per_expert_tensors(ours, adapter):
    def split(tensors):
        kept = {k: v for k, v in tensors.items() if ".experts." not in k}
        kept["base_model.model.model.layers.0.mlp.experts.0.gate_proj.lora_A.weight"] = torch.zeros(3, 48)
        return kept

    rewrite(adapter, split)
    refuse(ours, adapter, r"experts\.0\.gate_proj\.lora_B\.weight: expected present, found missing")


@pytest.mark.parametrize("text", ["[]", "{", '{"lora_dropout": 2}', '{"lora_dropout": "x"}'])
def test_damaged_side_file(ours, adapter, text):
    (adapter / "kt_sft.json").write_text(text)
    refuse(ours, adapter, "kt_sft.json: .*restore the file or delete it")


def test_subfolder_and_deleted_side_file(ours, adapter):
    (adapter / "kt_sft.json").unlink()
    model = kt_peft.load_adapter(ours, adapter.parent, subfolder="adapter")
    config = model.peft_config["default"]
    model.unload()
    assert config.adapter_dropout == 0.0
