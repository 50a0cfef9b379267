"""Each file of a model is opened once for what its header says, whoever opens the model, and again where it changed."""

from __future__ import annotations

import shutil
from contextlib import contextmanager

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

import kt_sft
from kt_sft import KTConfig
from kt_sft.errors import FormatError
from kt_sft.integrations.merge.command import merge
from kt_sft.integrations.transformers.converting import convert_checkpoint
from kt_sft.integrations.transformers.loading import check_model
from kt_sft.integrations.transformers.opened import open_model
from kt_sft.integrations.transformers.quantizer import KTExpertsConfig
from kt_sft.models.auto_class import auto_class
from kt_sft.models.spec import iter_routed_experts
from tests.helpers import gguf_models, quantized_checkpoints, tiny_models
from tests.helpers.header_reads import counted

MADE_ONCE = {"meta models": 1, "preparations": 1}


@contextmanager
def no_bar(what, total):
    yield lambda *moved: None


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("opened")
    plain = tiny_models.build("qwen3_moe", root / "plain", sharded=True)
    (plain / "generation_config.json").write_text("{}")
    tiny_models.build("qwen3_moe", root / "other", seed=5)
    single = tiny_models.build("qwen3_moe", root / "single")
    fp8, _ = quantized_checkpoints.fp8_checkpoint(single, root / "quantised")
    fp8.rename(root / "fp8")
    convert_checkpoint(plain, root / "packed", KTConfig(method="INT8"), bar=no_bar)
    gguf_models.write_model(single, root / "model.gguf")
    rules = [
        {"match": {"class": "Qwen3MoeExperts"}, "replace": {"class": "RoutedExperts", "kwargs": {"method": "INT8"}}}
    ]
    (root / "rules.yaml").write_text(yaml.safe_dump(rules))
    return root


def headers(folder, *others):
    names = [file for file in folder.iterdir() if file.suffix in (".safetensors", ".json", ".bin", ".gguf")]
    return {f"{folder.name}/{file.name}": 1 for file in names if "token" not in file.name} | dict.fromkeys(others, 1)


CASES = {
    "plain": ("plain", {}, ()),
    "int8": ("plain", {"method": "INT8"}, ()),
    "quantized": ("fp8", {}, ()),
    "rules": ("plain", {"optimize_rule": "rules.yaml"}, ("rules.yaml",)),
    "weight_path": ("plain", {"weight_path": "other"}, ("other/config.json", "other/model.safetensors")),
    "weight_path is the model": ("plain", {"weight_path": "plain/../plain"}, ()),
    "gguf beside": ("plain", {"weight_path": "model.gguf", "method": "GGUF"}, ("model.gguf",)),
}


@pytest.mark.parametrize("case", CASES)
def test_load_opens_each_file_once(root, case):
    name, settings, others = CASES[case]
    settings = {
        key: str(root / value) if key in ("weight_path", "optimize_rule") else value for key, value in settings.items()
    }
    with counted(root) as counts:
        kt_sft.load_model(root / name, KTConfig(**settings))
    assert counts == headers(root / name, *others) | MADE_ONCE


def test_load_from_a_container_opens_each_file_once(root):
    with counted(root) as counts:
        kt_sft.load_model(root / "plain", KTConfig(method="INT8", weight_path=str(root / "packed")))
    assert counts == headers(root / "plain") | headers(root / "packed") | MADE_ONCE


def test_load_through_the_cache_opens_each_file_once(root):
    config = KTConfig(method="INT8", weight_cache=str(root / "packs"))
    kt_sft.load_model(root / "plain", config)
    (folder,) = (root / "packs").iterdir()
    with counted(root) as counts:
        kt_sft.load_model(root / "plain", config)
    packed = {f"packs/{name}": 1 for name in headers(folder)}
    assert {n: c for n, c in counts.items() if "lock" not in n} == headers(root / "plain") | packed | MADE_ONCE


def test_gguf_file_as_the_model_is_opened_once(root):
    config = KTConfig(method="GGUF", weight_cache=None)
    with counted(root) as counts, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(root / "home"))
        kt_sft.load_model(root / "model.gguf", config)
    assert counts["model.gguf"] == 1 and counts["meta models"] == 1 and counts["preparations"] == 1
    assert max(counts.values()) == 1


def test_check_and_load_share_what_is_opened(root):
    with counted(root) as counts:
        opened = check_model(root / "plain", KTConfig())
        hook = KTExpertsConfig(opened)
        model = auto_class(opened.config).from_pretrained(root / "plain", quantization_config=hook)
    assert counts == headers(root / "plain") | MADE_ONCE
    wanted = kt_sft.load_model(root / "plain")
    ids = tiny_models.token_ids()
    assert torch.equal(model(ids).logits, wanted(ids).logits)


def test_files_that_change_between_check_and_load_are_opened_again(root, tmp_path):
    folder = tiny_models.build("qwen3_moe", tmp_path / "model")
    opened = open_model(folder, KTConfig())
    assert opened.is_current()
    tensors = {name: tensor * 2 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(dict(reversed(tensors.items())), folder / "model.safetensors", metadata={"format": "pt"})
    assert not opened.is_current()
    hook = KTExpertsConfig(opened)
    model = auto_class(opened.config).from_pretrained(folder, quantization_config=hook)
    name, experts = next(iter_routed_experts(model))
    assert torch.equal(experts.unpack_expert(2)[2], tensors[f"{name}.2.down_proj.weight"])
    opened = open_model(folder, KTConfig())
    del tensors[f"{name}.2.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match="first expert 2 down"):
        auto_class(opened.config).from_pretrained(folder, quantization_config=KTExpertsConfig(opened))


def test_file_that_changes_after_its_header_was_read_is_not_read(root, tmp_path):
    folder = tiny_models.build("qwen3_moe", tmp_path / "model")
    source = open_model(folder, KTConfig()).source
    name = next(iter(source.formats))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(FormatError, match="as it was when the model was loaded, found changed"):
        source.read(name, 0)


def test_converting_opens_each_file_once(root, tmp_path):
    for name in ("plain", "fp8"):
        with counted(root) as counts:
            convert_checkpoint(root / name, tmp_path / name, KTConfig(method="INT8"), bar=no_bar)
        assert counts == headers(root / name) | MADE_ONCE
    with counted(root) as counts:
        convert_checkpoint(root / "model.gguf", tmp_path / "gguf", KTConfig(method="INT8"), bar=no_bar)
    assert counts == {"model.gguf": 1} | MADE_ONCE


def test_merging_opens_each_file_once(root, tmp_path):
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    peft.get_peft_model(tiny_models.load_stock(root / "plain"), config).save_pretrained(tmp_path / "adapter")
    with counted(root) as counts:
        merge(root / "plain", [tmp_path / "adapter"], tmp_path / "merged", "hf", no_bar)
    assert {n: c for n, c in counts.items() if n.endswith(".safetensors")} == {
        n: 1 for n in headers(root / "plain") if n.endswith(".safetensors")
    }
    assert counts["meta models"] == 1


def test_planning_reads_the_config_alone(root, tmp_path):
    from kt_sft.integrations.llamafactory.planning import plan_run

    run = {"model_name_or_path": str(root / "plain"), "use_kt": True, "use_cpu": True, "do_train": True}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    with counted(root) as counts:
        plan_run(tmp_path / "run.yaml")
    assert counts == {"plain/config.json": 1, "plain/generation_config.json": 1, "meta models": 1}
    run |= {"model_name_or_path": str(root / "model.gguf"), "kt_method": "GGUF"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    with counted(root) as counts:
        plan_run(tmp_path / "run.yaml")
    assert counts == {"model.gguf": 1, "meta models": 1}


def test_layers_of_an_operator_share_an_open_checkpoint(root):
    values = tiny_models.config("qwen3_moe")
    sizes = {"num_experts": values.num_experts, "num_experts_per_tok": 2, "hidden_size": values.hidden_size}
    with counted(root) as counts:
        for layer in (0, 1):
            wrapper = kt_sft.KTMoEWrapper(
                layer_idx=layer,
                **sizes,
                moe_intermediate_size=values.moe_intermediate_size,
                num_gpu_experts=0,
                weight_path=str(root / "plain"),
                method="BF16",
            )
            wrapper.load_weights()
    files = {name: count for name, count in counts.items() if "/" in name}
    assert files == headers(root / "plain") and counts["meta models"] == 1


@pytest.mark.parametrize("settings", [{}, {"weight_path": "model.gguf", "method": "GGUF"}])
def test_model_on_the_hub_is_opened_once(root, tmp_path, settings):
    settings = {key: str(root / value) if key == "weight_path" else value for key, value in settings.items()}
    snapshot = tmp_path / "models--kt-sft-tests--tiny" / "snapshots" / "0123456789abcdef"
    shutil.copytree(root / "single", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)
    with counted(root) as beside, counted(snapshot) as counts:
        model = kt_sft.load_model("kt-sft-tests/tiny", KTConfig(**settings), cache_dir=tmp_path, local_files_only=True)
    wanted = kt_sft.load_model(root / "single", KTConfig(**settings))
    ids = tiny_models.token_ids()
    assert torch.equal(model(ids).logits, wanted(ids).logits)
    assert counts["config.json"] == counts["model.safetensors"] == counts["meta models"] == counts["preparations"] == 1
    assert beside.get("model.gguf", 0) == len(settings) // 2


def test_another_class_of_the_config_reads_no_header_again(root):
    hook = KTExpertsConfig(open_model(root / "plain", KTConfig()))
    with counted(root) as counts:
        backbone = transformers.AutoModel.from_pretrained(root / "plain", quantization_config=hook)
    assert not counts
    wanted = kt_sft.load_model(root / "plain").model
    ids = tiny_models.token_ids()
    assert torch.equal(backbone(ids).last_hidden_state, wanted(ids).last_hidden_state)
