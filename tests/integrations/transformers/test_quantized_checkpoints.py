"""FP8, INT4 and MXFP4 checkpoints load as their bf16 twins do: the same numbers in every weight."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import kt_sft
from kt_sft import KTConfig
from kt_sft.errors import ConfigError, FormatError, UnsupportedModel
from kt_sft.integrations.transformers.converting import convert_checkpoint
from kt_sft.models.spec import iter_routed_experts
from kt_sft.native import native
from tests.helpers import quantized_checkpoints, tiny_models

# Sizes of which int32 words of eight make sense.
EVEN = {"hidden_size": 48, "moe_intermediate_size": 24}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("quantized")

    def make(kind):
        family, _, form = kind.partition(" ")
        if not (root / kind).exists():
            if form == "mxfp4":
                plain = tiny_models.build(family, root / "plain" / kind, hidden_size=64, intermediate_size=96)
                quantized_checkpoints.mxfp4_checkpoint(plain, root / kind)
            elif form == "int4":
                plain = tiny_models.build(family, root / "plain" / kind, sharded=True, **EVEN)
                quantized_checkpoints.int4_checkpoint(plain, root / kind)
            else:
                plain = tiny_models.build(family, root / "plain" / kind, extra_layer=family == "deepseek_v3")
                block = (128, 128) if form == "fp8 128" else (16, 32)
                quantized_checkpoints.fp8_checkpoint(plain, root / kind, block)
        return root / kind / "quantized", root / kind / "twin"

    return make


KINDS = ["deepseek_v3 fp8", "deepseek_v3 fp8 128", "qwen3_moe fp8", "mixtral fp8", "deepseek_v3 int4", "gpt_oss mxfp4"]


@pytest.mark.parametrize("method", ["BF16", "INT8"])
@pytest.mark.parametrize("kind", KINDS)
def test_same_model_as_the_bf16_twin(checkpoints, kind, method, caplog):
    quantized, twin = checkpoints(kind)
    with caplog.at_level(logging.WARNING):
        ours = kt_sft.load_model(quantized, KTConfig(method=method))
    assert not [r.message for r in caplog.records if "MISSING" in r.message or "UNEXPECTED" in r.message]
    plain = kt_sft.load_model(twin, KTConfig(method=method))
    assert not hasattr(ours.config, "quantization_config")
    wanted = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.dtype == wanted[name].dtype, name
        assert torch.equal(parameter, wanted[name]), name
    for (name, experts), (_, others) in zip(iter_routed_experts(ours), iter_routed_experts(plain), strict=True):
        for index in range(experts.num_experts):
            for mine, other in zip(experts.unpack_expert(index), others.unpack_expert(index), strict=True):
                assert torch.equal(mine, other), f"{name} {index}"
            for mine, other in zip(experts.origin(index)(), others.origin(index)(), strict=True):
                assert torch.equal(mine, other), f"{name} {index}"
    ids = tiny_models.token_ids()
    assert torch.equal(ours(ids).logits, plain(ids).logits)


def test_saved_model_is_plain_bf16(checkpoints, tmp_path):
    quantized, twin = checkpoints("deepseek_v3 fp8")
    kt_sft.load_model(quantized, KTConfig(method="INT4")).save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    saved = {k: v for f in (tmp_path / "saved").glob("*.safetensors") for k, v in load_file(f).items()}
    stored = {k: v for f in twin.glob("*.safetensors") for k, v in load_file(f).items()}
    in_model = [key for key in stored if ".layers.3." not in key]  # the prediction layer is no part of it
    assert saved.keys() == set(in_model)
    for key in in_model:
        assert torch.equal(saved[key], stored[key]), key


def test_experts_from_an_fp8_weight_path(checkpoints):
    quantized, twin = checkpoints("deepseek_v3 fp8")
    ours = kt_sft.load_model(twin, KTConfig(weight_path=str(quantized)))
    ids = tiny_models.token_ids()
    assert torch.equal(ours(ids).logits, kt_sft.load_model(twin)(ids).logits)


def test_scales_in_another_shard(checkpoints, tmp_path):
    quantized, twin = checkpoints("mixtral fp8")
    folder = shutil.copytree(quantized, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {"a.safetensors": "_scale_inv", "b.safetensors": ""}
    weight_map = {}
    for file, suffix in files.items():
        part = {k: v for k, v in tensors.items() if k.endswith("_scale_inv") == bool(suffix)}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    ids = tiny_models.token_ids()
    assert torch.equal(kt_sft.load_model(folder)(ids).logits, kt_sft.load_model(twin)(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_fp16_and_fp32_checkpoints(tmp_path, dtype):
    """The weights are exact in bf16 (and in fp16): nothing is lost."""
    plain = tiny_models.build("deepseek_v2", tmp_path / "bf16")
    other = tiny_models.build("deepseek_v2", tmp_path / "other", dtype=dtype)
    ids = tiny_models.token_ids()
    wanted = kt_sft.load_model(plain, dtype=torch.bfloat16)(ids).logits
    assert torch.equal(kt_sft.load_model(other, dtype=torch.bfloat16)(ids).logits, wanted)


def refused(path, match, error=FormatError):
    with pytest.raises(error, match=match) as caught:
        kt_sft.load_model(path)
    assert "\n" not in str(caught.value)


def test_faults_of_quantised_checkpoints(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints("mixtral fp8")[0], tmp_path / "m")
    good = load_file(folder / "model.safetensors")
    key = "model.layers.1.self_attn.q_proj.weight"
    tiny_models.rewrite(folder, lambda t: {k: v for k, v in t.items() if k != f"{key}_scale_inv"})
    refused(folder, rf"tensor {key}: expected its scales in {key}_scale_inv, found no such tensor")
    tiny_models.rewrite(folder, lambda t: good | {f"{key}_scale_inv": good[f"{key}_scale_inv"][:, :1]})
    refused(folder, r"q_proj.weight_scale_inv: expected BF16 .* \[4, 2\], for blocks of 16 x 32, found F32 \[4, 1\]")
    values = json.loads((folder / "config.json").read_text())
    for quantization, found in [
        ({"quant_method": "gptq"}, "weights quantised by gptq"),
        ({"quant_method": "fp8", "weight_block_size": [0, 2]}, r"fp8 with weight_block_size \[0, 2\]"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "in format 'float-quantized'"),
    ]:
        (folder / "config.json").write_text(json.dumps(values | {"quantization_config": quantization}))
        refused(folder, rf"quantization_config: expected .* found .*{found}", UnsupportedModel)
    (folder / "config.json").write_text(json.dumps(values | {"quantization_config": "awq"}))
    refused(folder, "quantization_config: expected an object or null, found 'awq'")


def test_faults_of_mxfp4(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints("gpt_oss mxfp4")[0], tmp_path / "m")
    good = load_file(folder / "model.safetensors")
    key = "model.layers.1.mlp.experts.down_proj"
    blocks, scales = good[f"{key}_blocks"], good[f"{key}_scales"]
    for name, value, match in [
        ("scales", None, f"tensor {key}_blocks: expected its scales in {key}_scales, found no such tensor"),
        ("scales", scales[..., :2], rf"{key}_scales: expected shape \[5, 64, 3\], found \[5, 64, 2\]"),
        ("scales", scales.float(), rf"{key}_scales: expected .*U8.* found F32"),
        (
            "blocks",
            blocks.flatten(2),
            rf"{key}_blocks: expected U8 \[experts, outputs, groups, 16\], found U8 \[.*, 48\]",
        ),
        ("blocks", blocks[:, :32], rf"{key}_scales: expected shape \[5, 32, 3\]"),
        ("blocks", None, "experts of model.layers.1.mlp.experts: expected .* found 1 missing, first down_proj"),
    ]:
        tensors = good | {f"{key}_{name}": value.contiguous() if value is not None else None}
        tiny_models.rewrite(folder, lambda _, t=tensors: {k: v for k, v in t.items() if v is not None})
        refused(folder, match)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mxfp4_numbers_are_those_of_transformers(dtype):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (1, 37, 5, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(60, 190, (1, 37, 5), generator=generator, dtype=torch.uint8)
    out = torch.empty(37, 160, dtype=dtype)
    native().dequantize_mxfp4(blocks[0].flatten(1), scales[0], out)
    assert torch.equal(out.mT, convert_moe_packed_tensors(blocks, scales, dtype=dtype)[0])


def test_scale_of_the_whole_tensor(tmp_path):
    """Some FP8 checkpoints have one scale per tensor and no blocks."""
    plain = tiny_models.build("mixtral", tmp_path / "plain")
    quantized, twin = quantized_checkpoints.fp8_checkpoint(plain, tmp_path / "q", (1000, 1000))
    values = json.loads((quantized / "config.json").read_text())
    values["quantization_config"]["weight_block_size"] = None
    (quantized / "config.json").write_text(json.dumps(values))
    tiny_models.rewrite(quantized, lambda t: {k: v.reshape(()) if v.numel() == 1 else v for k, v in t.items()})
    ids = tiny_models.token_ids()
    assert torch.equal(kt_sft.load_model(quantized)(ids).logits, kt_sft.load_model(twin)(ids).logits)


@pytest.fixture(scope="module")
def int4(checkpoints):
    return checkpoints("deepseek_v3 int4")


def test_rawint4_holds_the_stored_numbers(int4, tmp_path):
    """Integers and scales as they are: unpacking, saving and the logits are those of the numbers in the file."""
    quantized, twin = int4
    ours = kt_sft.load_model(quantized, KTConfig(method="RAWINT4"))
    plain = kt_sft.load_model(twin)
    for (_, experts), (_, others) in zip(iter_routed_experts(ours), iter_routed_experts(plain), strict=True):
        assert experts.packed_bytes < 0.7 * others.packed_bytes
        for index in range(experts.num_experts):
            for mine, stored in zip(experts.origin(index)(), others.unpack_expert(index), strict=True):
                assert torch.equal(mine, stored)
    ours.save_pretrained(tmp_path / "saved")
    saved = {k: v for f in (tmp_path / "saved").glob("*.safetensors") for k, v in load_file(f).items()}
    stored = {k: v for f in twin.glob("*.safetensors") for k, v in load_file(f).items()}
    assert saved.keys() == stored.keys()
    for key, value in stored.items():
        assert torch.equal(saved[key], value), key


def exact_matrices(experts, index):
    """gate, up, down as q * scale, float64."""
    gate, up = (torch.empty(experts.intermediate_dim, experts.hidden_dim) for _ in range(2))
    down = torch.empty(experts.hidden_dim, experts.intermediate_dim)
    experts.store.unpack_expert(index, gate, up, down, "f32")
    return gate.double(), up.double(), down.double()


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_rawint4_computes_with_the_stored_numbers(int4, mode, tokens):
    """Forward and input gradient of a layer against float64 on q * scale, which is no bf16 number."""
    model = getattr(kt_sft.load_model(int4[0], KTConfig(method="RAWINT4", expert_activations="bf16")), mode)()
    _, experts = next(iter(iter_routed_experts(model)))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, experts.hidden_dim, generator=generator).bfloat16().requires_grad_()
    ids = torch.randint(0, experts.num_experts, (tokens, 2), generator=generator)
    weights = torch.rand(tokens, 2, generator=generator)
    dout = torch.randn(tokens, experts.hidden_dim, generator=generator).bfloat16()
    out = experts(x, ids, weights)
    out.backward(dout)
    exact = x.detach().double().requires_grad_()
    rows = []
    for token in range(tokens):
        row = torch.zeros(experts.hidden_dim, dtype=torch.float64)
        for slot in range(2):
            gate, up, down = exact_matrices(experts, int(ids[token, slot]))
            hidden = torch.nn.functional.silu(gate @ exact[token]) * (up @ exact[token])
            row = row + weights[token, slot].double() * (down @ hidden)
        rows.append(row)
    want = torch.stack(rows)
    want.backward(dout.double())
    for got, wanted in ((out, want), (x.grad, exact.grad)):
        assert (got.double() - wanted).norm() / wanted.norm() < 4e-3


def test_rawint4_needs_such_a_checkpoint(int4, checkpoints):
    for path, group, match in [
        (int4[1], 32, r"method RAWINT4: expected a compressed-tensors INT4 checkpoint in groups of 32, found BF16 in"),
        (checkpoints("mixtral fp8")[0], 32, "found F8_E4M3 in"),
        (int4[0], 64, "in groups of 64, found groups of 32; set int4_group_size"),
    ]:
        with pytest.raises(ConfigError, match=match):
            kt_sft.load_model(path, KTConfig(method="RAWINT4", int4_group_size=group))
    with pytest.raises(ConfigError, match="weight_cache: containers hold bf16, int8 or int4, found method RAWINT4"):
        KTConfig(method="rawint4", weight_cache="x")
    with pytest.raises(ConfigError, match="quant-method: expected bf16, int8 or int4, found rawint4"):
        convert_checkpoint(int4[0], "x", KTConfig(method="RAWINT4"), bar=None)
