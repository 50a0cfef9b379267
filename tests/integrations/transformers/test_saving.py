"""save_pretrained of a loaded model writes a complete checkpoint that stock transformers reads."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import kt_sft
from kt_sft.errors import ConfigError
from kt_sft.integrations.transformers import saving
from kt_sft.models.spec import iter_routed_experts
from tests.helpers import tiny_models


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    directory = tiny_models.build("mixtral", tmp_path_factory.mktemp("mixtral"))
    return directory, kt_sft.load_model(directory)


def tensors_of(directory):
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            found.update({name: handle.get_tensor(name) for name in handle.keys()})  # noqa: SIM118
    return found


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_saved_checkpoint_equals_the_loaded_one(tmp_path, family, fused):
    source = tiny_models.build(family, tmp_path / "source", fused=fused)
    kt_sft.load_model(source).save_pretrained(tmp_path / "saved", max_shard_size="30KB")
    expected, found = tensors_of(source), tensors_of(tmp_path / "saved")
    assert expected.keys() == found.keys()
    assert all(
        torch.equal(expected[name], found[name]) and expected[name].dtype == found[name].dtype for name in expected
    )
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert files == {file.name for file in (tmp_path / "saved").glob("*.safetensors")} and len(files) > 3
    stock = tiny_models.load_stock(tmp_path / "saved")
    ids = tiny_models.token_ids()
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, tiny_models.load_stock(source)(ids).logits)


def test_changed_experts_are_what_is_saved(tmp_path):
    source = tiny_models.build("qwen3_moe", tmp_path / "source")
    model = kt_sft.load_model(source)
    name, experts = next(iter_routed_experts(model))
    gate, up, down = (matrix * 2 for matrix in experts.unpack_expert(3))
    experts.load_expert(3, gate, up, down)
    model.save_pretrained(tmp_path / "saved")
    saved = tensors_of(tmp_path / "saved")
    assert torch.equal(saved[f"{name}.3.up_proj.weight"], up)
    assert torch.equal(saved[f"{name}.3.up_proj.weight"], 2 * tensors_of(source)[f"{name}.3.up_proj.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_experts_are_saved_in_the_models_dtype(tmp_path, loaded, dtype):
    model = kt_sft.load_model(loaded[0], dtype=dtype)
    model.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in tensors_of(tmp_path).values()} == {dtype}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
def test_experts_that_loading_rounds_are_said(tmp_path, caplog, kind):
    source = tiny_models.build("mixtral", tmp_path / "source")
    file = source / "model.safetensors"
    save_file({name: tensor.to(kind) for name, tensor in tensors_of(source).items()}, file, {"format": "pt"})
    kt_sft.load_model(source)
    said = [record.message for record in caplog.records if "rounded to bf16" in record.message]
    assert len(said) == (kind is torch.float32) and all("stored as F32" in text for text in said)


def test_fused_form_on_request(tmp_path, loaded):
    loaded[1].save_pretrained(tmp_path, save_original_format=False)
    stock = tiny_models.model("mixtral")
    saved = tensors_of(tmp_path)
    assert saved.keys() == stock.state_dict().keys()
    assert all(torch.equal(saved[name], tensor.to(torch.bfloat16)) for name, tensor in stock.state_dict().items())


def test_second_save_replaces_the_first_and_keeps_other_files(tmp_path, loaded):
    (tmp_path / "tokenizer.json").write_text("{}")
    loaded[1].save_pretrained(tmp_path, max_shard_size="20KB")
    many = len(list(tmp_path.glob("*.safetensors")))
    loaded[1].save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2 < many
    assert (tmp_path / "tokenizer.json").exists()
    assert tensors_of(tmp_path).keys() == tensors_of(loaded[0]).keys()


def test_failed_save_leaves_the_earlier_one_untouched(tmp_path, loaded, monkeypatch):
    loaded[1].save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(path, plan, pieces):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(saving, "write", fail)
    with pytest.raises(OSError, match="disk full"):
        loaded[1].save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_a_killed_save_has_left_is_no_obstacle(tmp_path, loaded):
    (tmp_path / f".saving-{os.getpid()}").mkdir()
    loaded[1].save_pretrained(tmp_path)
    assert tensors_of(tmp_path).keys() == tensors_of(loaded[0]).keys()


def test_other_processes_write_nothing(tmp_path, loaded):
    loaded[1].save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()


def test_model_with_adapters_is_refused(tmp_path, loaded):
    peft = pytest.importorskip("peft")
    model = kt_sft.load_model(loaded[0])
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(
        ConfigError, match=r"expected a model without adapters, found one at .*q_proj.*; call merge_and_unload"
    ):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("argument", [{"push_to_hub": True}, {"variant": "fp8"}, {"max_shard_size": "5 apples"}])
def test_arguments_that_it_lacks_are_refused(tmp_path, loaded, argument):
    with pytest.raises(ConfigError, match=next(iter(argument))):
        loaded[1].save_pretrained(tmp_path, **argument)


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("2 MiB", 2 * 2**20), ("1.5kb", 1500), (7, 7), ("12B", 12)]
)
def test_sizes(text, size):
    assert saving.parse_size(text) == size
