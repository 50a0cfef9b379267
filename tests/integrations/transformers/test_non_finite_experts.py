"""NaN and infinity in experts are refused by the name of their tensor, from every kind of file and in every format."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import kt_sft
from kt_sft import KTConfig
from kt_sft.cli.console import progress_bar
from kt_sft.errors import FormatError
from kt_sft.formats.finite import check_finite
from kt_sft.integrations.transformers.converting import convert_checkpoint
from kt_sft.models.spec import ExpertsSpec
from kt_sft.nn.routed_experts import RoutedExperts
from kt_sft.operator.moe import KTMoEWrapper
from tests.helpers import gguf_files, quantized_checkpoints, tiny_models

KEY = "model.layers.1.mlp.experts.2.up_proj.weight"
METHODS = ["BF16", "INT8", "INT4"]


def silent(what, total):
    from rich.console import Console

    return progress_bar(Console(quiet=True), what, total)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    sizes = {"hidden_size": 64, "moe_intermediate_size": 96, "head_dim": 16}
    return tiny_models.build("qwen3_moe", tmp_path_factory.mktemp("finite") / "plain", **sizes)


def refused(folder, name, config, found):
    """By loading and by converting, which leaves nothing behind."""
    match = rf"tensor {name} \(expert 2 of model.layers.1.mlp.experts\): expected finite numbers, found {found} at row"
    with pytest.raises(FormatError, match=match) as caught:
        kt_sft.load_model(folder, config)
    assert "\n" not in str(caught.value)
    if config.method in METHODS and config.weight_path is None:
        with pytest.raises(FormatError, match=match):
            convert_checkpoint(folder, folder.parent / "packed", config, bar=silent)
        assert not (folder.parent / "packed").exists()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_floating_point_checkpoints(plain, tmp_path, dtype, value, method):
    folder = shutil.copytree(plain, tmp_path / "m")

    def change(tensors):
        tensors = {k: t.to(dtype) if "experts" in k else t for k, t in tensors.items()}
        tensors[KEY][5, 7] = value
        return tensors

    tiny_models.rewrite(folder, change)
    refused(folder, KEY, KTConfig(threads=1, method=method), str(value))


def test_numbers_that_bf16_has_not_are_infinite(plain, tmp_path):
    folder = shutil.copytree(plain, tmp_path / "m")

    def change(tensors):
        tensors[KEY] = tensors[KEY].float()
        tensors[KEY][0, 0] = torch.finfo(torch.float32).max
        return tensors

    tiny_models.rewrite(folder, change)
    refused(folder, KEY, KTConfig(threads=1), "inf")


@pytest.mark.parametrize(("form", "part", "methods"), [
    ("fp8", "", METHODS),
    ("fp8", "_scale_inv", ["BF16"]),
    ("int4", "_scale", [*METHODS, "RAWINT4"]),
    ("mxfp4", "_scales", METHODS),
])  # fmt: skip
def test_quantised_checkpoints(plain, tmp_path, form, part, methods):
    source, name = plain, KEY
    if form == "mxfp4":
        source = tiny_models.build("gpt_oss", tmp_path / "gpt_oss", hidden_size=64, intermediate_size=96)
        name = "model.layers.1.mlp.experts.down_proj"
    folder, _ = getattr(quantized_checkpoints, f"{form}_checkpoint")(source, tmp_path)
    held = name.removesuffix("_packed") + part

    def change(tensors):
        target = tensors[held]
        if form == "mxfp4":
            target[2, 0, 0] = 255
        elif target.dtype == torch.float8_e4m3fn:
            target.view(torch.uint8)[3, 4] = 0x7F
        else:
            target[0, 0] = math.nan
        return tensors

    tiny_models.rewrite(folder, change)
    for method in methods:
        refused(folder, name, KTConfig(threads=1, method=method), "(nan|inf|-inf)")


@pytest.mark.parametrize("method", [*METHODS, "GGUF"])
@pytest.mark.parametrize("kind", ["BF16", "F16", "F32", "Q8_0", "Q4_0"])
def test_gguf_files(plain, tmp_path, kind, method):
    stored, tensors = load_file(plain / "model.safetensors"), {}
    experts = max(int(key.split(".experts.")[1].split(".")[0]) for key in stored if ".experts." in key) + 1
    for layer in (0, 1):
        for side in ("gate", "up", "down"):
            keys = [f"model.layers.{layer}.mlp.experts.{e}.{side}_proj.weight" for e in range(experts)]
            if keys[0] in stored:
                values = torch.stack([stored[key] for key in keys]).float()
                tensors[f"blk.{layer}.ffn_{side}_exps.weight"] = gguf_files.encode(values.numpy(), kind)
    name = "blk.1.ffn_up_exps.weight"
    raw = tensors[name][2].reshape(experts, -1)
    bad = {"F32": np.float32(np.nan).tobytes(), "BF16": b"\xc0\x7f"}.get(kind, np.float16(np.inf).tobytes())
    raw[2, : len(bad)] = np.frombuffer(bad, dtype=np.uint8)
    file = gguf_files.write(tmp_path / "m.gguf", {}, tensors)
    refused(plain, name, KTConfig(threads=1, method=method, weight_path=str(file)), "(nan|inf|-inf)")
    sizes = {"num_experts": experts, "hidden_size": 64, "moe_intermediate_size": 96, "num_experts_per_tok": 2}
    moe = KTMoEWrapper(1, **sizes, cpuinfer_threads=1, weight_path=str(file), method=method)
    with pytest.raises(FormatError, match=rf"tensor {name} \(expert 2 of blk.1\): expected finite numbers"):
        moe.load_weights()


@pytest.mark.parametrize("bias", ["gate_up_proj_bias", "down_proj_bias"])
def test_biases_of_experts(tmp_path, bias):
    """transformers loads them; they are looked at before the weights are packed."""
    folder = tiny_models.build("gpt_oss", tmp_path / "m", hidden_size=64, intermediate_size=96)
    name = f"model.layers.1.mlp.experts.{bias}"
    tiny_models.rewrite(folder, lambda tensors: {**tensors, name: tensors[name].fill_(math.nan)})
    with pytest.raises(FormatError, match=rf"tensor {name}: expected finite numbers, found NaN or infinity"):
        kt_sft.load_model(folder, KTConfig(threads=1))


@pytest.mark.parametrize("method", METHODS)
def test_checkpoints_of_other_programs(plain, tmp_path, method):
    folder = shutil.copytree(plain, tmp_path / "m")
    tiny_models.rewrite(folder, lambda tensors: {**tensors, KEY: tensors[KEY].fill_(math.inf)})
    sizes = {"num_experts": 7, "hidden_size": 64, "moe_intermediate_size": 96, "num_experts_per_tok": 2}
    moe = KTMoEWrapper(1, **sizes, cpuinfer_threads=1, weight_path=str(folder), method=method)
    with pytest.raises(FormatError, match=rf"tensor {KEY} \(expert 2 of .*\): expected finite numbers, found inf"):
        moe.load_weights()


def test_a_cache_of_weights_is_left_without_them(plain, tmp_path):
    folder = shutil.copytree(plain, tmp_path / "m")
    tiny_models.rewrite(folder, lambda tensors: {**tensors, KEY: tensors[KEY].fill_(math.nan)})
    with pytest.raises(FormatError, match=rf"tensor {KEY} "):
        kt_sft.load_model(folder, KTConfig(threads=1, weight_cache=str(tmp_path / "cache")))
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.name == "manifest.json"]


@pytest.mark.parametrize("cpu_save", [False, True])
def test_tensors_of_a_caller(tmp_path, cpu_save):
    sizes = {"num_experts": 3, "hidden_size": 64, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
    path = {"weight_path": str(tmp_path / "packed"), "cpu_save": True} if cpu_save else {}
    moe = KTMoEWrapper(0, **sizes, cpuinfer_threads=1, method="BF16", **path)
    gate, up, down = torch.randn(3, 32, 64), torch.randn(3, 32, 64), torch.randn(3, 64, 32)
    down[1, 9, 3] = math.inf
    with pytest.raises(FormatError, match=r"tensor down_proj \(expert 1 of layer 0\): expected .* inf at row 9, col"):
        moe.load_weights_from_tensors(gate, up, down)
    assert not (tmp_path / "packed").exists()


def test_large_finite_numbers_are_taken():
    """Their sum is no bf16 number; it only makes the check look again."""
    experts = RoutedExperts(ExpertsSpec(1, 64, 32))
    gate, down = torch.full((32, 64), 3e38).bfloat16(), torch.full((64, 32), -3e38).bfloat16()
    experts.load_expert(0, gate, gate, down)
    assert torch.equal(experts.unpack_expert(0)[0], gate)
    check_finite(gate, gate.mT, down)
