"""What load_model refuses: one line that names the thing and the remedy, before any weight is read."""

from __future__ import annotations

import json
import shutil
import types

import pytest
import torch
import transformers

import kt_sft
from kt_sft import KTConfig, memory, runtime
from kt_sft.errors import ConfigError, FormatError, NotEnoughMemory, UnsupportedHardware, UnsupportedModel
from kt_sft.integrations.transformers import loading, quantizer
from kt_sft.nn.routed_experts import RoutedExperts
from tests.helpers import tiny_models


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Checkpoints to be damaged: one file, and sharded."""
    root = tmp_path_factory.mktemp("good")
    return {
        "single": tiny_models.build("mixtral", root / "single"),
        "fused": tiny_models.build("qwen3_moe", root / "fused", fused=True),
        "sharded": tiny_models.build("mixtral", root / "sharded", sharded=True),
    }


@pytest.fixture
def copy_of(good, tmp_path):
    return lambda kind: shutil.copytree(good[kind], tmp_path / kind)


@pytest.fixture(autouse=True)
def no_long_work(monkeypatch):
    """Reading any weight, or packing any expert, fails the test."""

    def fail(*args, **kwargs):
        raise AssertionError("weights were read before the fault was reported")

    monkeypatch.setattr(transformers.core_model_loading, "_materialize_copy", fail)
    monkeypatch.setattr(RoutedExperts, "load_expert", fail)


def refused(error, match, path, config=None, **kwargs):
    with pytest.raises(error, match=match) as caught:
        kt_sft.load_model(path, config, **kwargs)
    assert "\n" not in str(caught.value)


def test_missing_directory(tmp_path):
    refused(
        FormatError,
        r"model directory: expected a directory, found nothing; correct the path",
        tmp_path / "no" / "model",
    )


def test_file_instead_of_a_directory(tmp_path):
    (tmp_path / "file").write_text("x")
    refused(FormatError, "model directory: expected a directory, found a file", tmp_path / "file")


def test_hub_id_that_cannot_be_reached(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(
        FormatError,
        "kt-sft-tests/none: model: expected a model directory, or a hub id",
        "kt-sft-tests/none",
        cache_dir=tmp_path,
    )


def test_missing_config(copy_of):
    directory = copy_of("single")
    (directory / "config.json").unlink()
    refused(FormatError, r"config\.json: model configuration: expected present, found missing", directory)


def test_damaged_config(copy_of):
    directory = copy_of("single")
    (directory / "config.json").write_text("{")
    refused(FormatError, r"config\.json: config: expected a JSON object", directory)


def test_quantised_checkpoint(copy_of):
    directory = copy_of("single")
    values = json.loads((directory / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (directory / "config.json").write_text(json.dumps(values))
    refused(UnsupportedModel, r"found weights quantised by gptq; use the bf16 version", directory)


def test_missing_shard(copy_of):
    directory = copy_of("sharded")
    victim = sorted(directory.glob("*.safetensors"))[1]
    victim.unlink()
    refused(FormatError, rf"missing: {victim.name}\); download", directory)


def test_truncated_shard(copy_of):
    directory = copy_of("sharded")
    victim = sorted(directory.glob("*.safetensors"))[-1]
    victim.write_bytes(victim.read_bytes()[:-10])
    refused(FormatError, rf"{victim.name}: truncated file: expected \d+ bytes, found \d+ bytes", directory)


def test_expert_tensor_of_a_wrong_shape(copy_of):
    directory = copy_of("single")
    key = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    tiny_models.rewrite(directory, lambda tensors: tensors | {key: tensors[key].T})
    refused(FormatError, r"experts\.3\.w2\.weight: expected shape \[56, 36\], found \[36, 56\]", directory)


def test_fused_tensor_of_a_wrong_shape(copy_of):
    directory = copy_of("fused")
    key = "model.layers.0.mlp.experts.gate_up_proj"
    tiny_models.rewrite(directory, lambda tensors: tensors | {key: tensors[key].transpose(1, 2)})
    refused(FormatError, r"gate_up_proj: expected shape \[7, 40, 48\], found \[7, 48, 40\]", directory)


def test_other_tensor_of_a_wrong_shape(copy_of):
    directory = copy_of("single")
    key = "model.layers.1.self_attn.o_proj.weight"
    tiny_models.rewrite(directory, lambda tensors: tensors | {key: tensors[key][:-1]})
    refused(FormatError, r"o_proj\.weight: expected shape \[56, 56\], found \[55, 56\]", directory)


def test_missing_expert_tensor(copy_of):
    directory = copy_of("single")
    key = "model.layers.0.block_sparse_moe.experts.4.w3.weight"
    tiny_models.rewrite(directory, lambda tensors: {k: v for k, v in tensors.items() if k != key})
    refused(FormatError, r"layers\.0\.mlp\.experts: .* found 1 missing, first expert 4 up", directory)


def test_integer_expert_tensor(copy_of):
    directory = copy_of("single")
    key = "model.layers.0.block_sparse_moe.experts.4.w3.weight"
    tiny_models.rewrite(directory, lambda tensors: tensors | {key: tensors[key].to(torch.int8)})
    refused(FormatError, r"w3\.weight: expected dtype BF16 or .*, found I8; convert the checkpoint", directory)


def test_weight_path_that_does_not_exist(good, tmp_path):
    refused(
        FormatError,
        "none: model directory: expected a directory",
        good["single"],
        KTConfig(weight_path=str(tmp_path / "none")),
    )


def test_weight_path_of_another_model(good):
    refused(
        FormatError,
        r"fused/model\.safetensors: tensor .*experts.*: expected shape",
        good["single"],
        KTConfig(weight_path=str(good["fused"])),
    )


def test_dense_model(tmp_path):
    refused(UnsupportedModel, "model type 'llama': expected a mixture-of-experts model", tiny_models.dense(tmp_path))


def test_unsupported_activation(tmp_path):
    directory = tiny_models.build("qwen3_moe", tmp_path, hidden_act="quick_gelu")
    refused(UnsupportedModel, "gate activation: expected .*, found QuickGELUActivation", directory)


def test_biases_that_the_checkpoint_lacks(tmp_path):
    directory = tiny_models.build("gpt_oss", tmp_path)
    lost = "model.layers.1.mlp.experts.down_proj_bias"
    tiny_models.rewrite(directory, lambda tensors: {name: t for name, t in tensors.items() if name != lost})
    refused(FormatError, r"biases of the experts: expected model\.layers\.1\.mlp\.experts\.down_proj_bias", directory)


def test_not_enough_memory(good, monkeypatch):
    available = memory.AvailableMemory(1000, "the cgroup's memory limit")
    monkeypatch.setattr(memory, "available_memory", lambda: available)
    refused(NotEnoughMemory, r"needed 0\.00 GiB, available 0\.00 GiB \(limited by the cgroup", good["single"])


def test_every_process_of_the_machine_needs_its_own_memory(good, monkeypatch):
    needed = []
    monkeypatch.setattr(memory, "check", lambda estimate, *_: needed.append(estimate) or 1 / 0)
    for ranks in ("1", "2"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        with pytest.raises(ZeroDivisionError):
            kt_sft.load_model(good["single"])
    assert needed[1].total_bytes == 2 * needed[0].total_bytes
    stock = tiny_models.model("mixtral")
    experts = sum(p.numel() for name, p in stock.named_parameters() if ".experts." in name)
    rest = sum(p.numel() for p in stock.parameters()) - experts
    assert 2 * rest <= needed[0].rest_bytes <= 2 * rest + 4096
    assert 2 * experts <= needed[0].experts_bytes


def test_arguments_that_do_not_combine(good):
    refused(
        ConfigError,
        r"2 faults .* quantization_config: .* tp_plan: ",
        good["single"],
        tp_plan="auto",
        quantization_config={"a": 1},
    )


def test_model_config_in_place_of_ours(good):
    config = transformers.AutoConfig.from_pretrained(good["single"])
    refused(ConfigError, "config: expected a KTConfig, found MixtralConfig", good["single"], config)


def test_zero3(good, monkeypatch):
    monkeypatch.setattr(quantizer, "is_deepspeed_zero3_enabled", lambda: True)
    refused(ConfigError, "deepspeed: expected ZeRO stage 0, 1 or 2, found 3", good["single"])


def cpu_with(monkeypatch, *levels):
    monkeypatch.setattr(runtime, "native", lambda: types.SimpleNamespace(isa_detected=lambda: list(levels)))


def test_cpu_without_avx2(good, monkeypatch):
    monkeypatch.delenv("KT_SFT_ISA", raising=False)
    cpu_with(monkeypatch, "scalar")
    refused(UnsupportedHardware, "CPU: needed AVX2, found scalar; use another machine", good["single"])


def test_level_that_the_cpu_lacks(good, monkeypatch):
    monkeypatch.delenv("KT_SFT_ISA", raising=False)
    cpu_with(monkeypatch, "scalar", "avx2")
    refused(
        UnsupportedHardware, "kernel level: needed avx512, found scalar, avx2", good["single"], KTConfig(isa="avx512")
    )


def test_unknown_level_in_the_environment(good, monkeypatch):
    monkeypatch.setenv("KT_SFT_ISA", "avx22")
    cpu_with(monkeypatch, "scalar", "avx2")
    refused(ConfigError, "KT_SFT_ISA: .* did you mean 'avx2'", good["single"])


@pytest.mark.parametrize("kind", ["single", "fused", "sharded"])
def test_check_model_accepts_a_good_checkpoint_without_reading_it(good, kind):
    model = loading.check_model(good[kind], KTConfig()).model
    assert all(p.is_meta for p in model.get_input_embeddings().parameters())


def test_check_model_refuses_what_load_model_refuses(good, tmp_path, copy_of):
    directory = copy_of("single")
    key = "model.layers.0.block_sparse_moe.experts.4.w3.weight"
    tiny_models.rewrite(directory, lambda tensors: {k: v for k, v in tensors.items() if k != key})
    with pytest.raises(FormatError, match="first expert 4 up"):
        loading.check_model(directory, KTConfig())
    with pytest.raises(UnsupportedModel, match="model type 'llama'"):
        loading.check_model(tiny_models.dense(tmp_path / "dense"), KTConfig())
