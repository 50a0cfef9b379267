"""Experts from GGUF files: the model is the one whose checkpoint holds the dequantised numbers."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from safetensors.torch import load_file

import kt_sft
from kt_sft import KTConfig
from kt_sft.errors import ConfigError, FormatError, NotEnoughMemory, UnsupportedModel
from kt_sft.integrations.transformers.loading import check_model
from kt_sft.integrations.transformers.opened import open_model
from kt_sft.models.spec import iter_routed_experts
from kt_sft.native import native
from tests.helpers import gguf_files, tiny_models

# Rows must be whole blocks: of 32 (Q8_0), of 256 (Q4_K, Q6_K) only along hidden.
SIZES = {"hidden_size": 256, "moe_intermediate_size": 96, "intermediate_size": 80}
LAYERS, EXPERTS = (1, 2), 6


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return tiny_models.build("deepseek_v2", tmp_path_factory.mktemp("gguf") / "plain", **SIZES)


def expert_tensors(directory: Path, kinds: dict[str, str]) -> dict[str, gguf_files.Encoded]:
    """GGUF tensors of all experts; kinds: projection -> type, or (projection, layer) -> type."""
    stored = load_file(directory / "model.safetensors")
    tensors = {}
    for layer in LAYERS:
        for projection in ("gate", "up", "down"):
            keys = [f"model.layers.{layer}.mlp.experts.{e}.{projection}_proj.weight" for e in range(EXPERTS)]
            values = torch.stack([stored[key] for key in keys]).float().numpy()
            kind = kinds.get(f"{projection}{layer}", kinds.get(projection, "Q8_0"))
            tensors[f"blk.{layer}.ffn_{projection}_exps.weight"] = gguf_files.encode(values, kind)
    return tensors


def numbers(encoded: gguf_files.Encoded) -> torch.Tensor:
    """By PyPI's gguf, rounded to bf16."""
    kind, shape, data = encoded
    rows = data.reshape(int(np.prod(shape[:-1])), -1)
    return torch.from_numpy(quants.dequantize(rows, GGMLQuantizationType[kind]).reshape(shape)).bfloat16()


def twin(plain: Path, tensors: dict[str, gguf_files.Encoded], directory: Path) -> Path:
    """The checkpoint with the GGUF's numbers in its experts."""
    tiny_models.build("deepseek_v2", directory, **SIZES)

    def change(stored):
        for name, encoded in tensors.items():
            _, layer, projection, _ = name.replace("ffn_", "").split(".")
            for expert, value in enumerate(numbers(encoded)):
                key = f"model.layers.{layer}.mlp.experts.{expert}.{projection.removesuffix('_exps')}_proj.weight"
                assert key in stored
                stored[key] = value
        return stored

    tiny_models.rewrite(directory, change)
    return directory


MIXED = {"gate": "Q4_K", "up": "Q6_K", "down": "Q8_0", "down2": "Q4_0", "gate2": "F16", "up2": "BF16"}


def test_every_part_of_a_split_file_is_looked_at_before_what_was_opened_is_loaded(plain, tmp_path):
    tensors = expert_tensors(plain, MIXED)
    parts = gguf_files.write_split(tmp_path, "m", {"general.architecture": "deepseek2"}, tensors, 3)
    opened = open_model(plain, KTConfig(weight_path=str(parts[0])))
    assert opened.source is not None and opened.is_current()
    parts[2].write_bytes(parts[2].read_bytes())
    assert not opened.is_current()


@pytest.mark.parametrize("form", ["one file", "split", "directory", "per expert"])
@pytest.mark.parametrize("method", ["BF16", "INT8"])
def test_same_model_as_the_checkpoint_with_these_numbers(plain, tmp_path, form, method, caplog):
    tensors = expert_tensors(plain, MIXED)
    like = twin(plain, tensors, tmp_path / "twin")
    if form == "split":
        path = gguf_files.write_split(tmp_path, "m", {"general.architecture": "deepseek2"}, tensors, 3)[1]
    elif form == "per expert":
        single = {
            name.replace("_exps", f".{e}"): (kind, shape[1:], data.reshape(EXPERTS, -1)[e])
            for name, (kind, shape, data) in tensors.items()
            for e in range(EXPERTS)
        }
        path = gguf_files.write(tmp_path / "m.gguf", {}, single)
    else:
        path = gguf_files.write(tmp_path / "m.gguf", {}, tensors)
    path = tmp_path if form == "directory" else path
    with caplog.at_level(logging.INFO, logger="kt_sft"):
        ours = kt_sft.load_model(plain, KTConfig(method=method, weight_path=str(path)))
    said = [r.message for r in caplog.records if "experts from" in r.message]
    assert len(said) == 1 and "1 x Q4_K" in said[0] and f"packed as {method.lower()}" in said[0]
    wanted = kt_sft.load_model(like, KTConfig(method=method))
    for (_, experts), (_, others) in zip(iter_routed_experts(ours), iter_routed_experts(wanted), strict=True):
        for index in range(EXPERTS):
            for mine, other in zip(experts.unpack_expert(index), others.unpack_expert(index), strict=True):
                assert torch.equal(mine, other)
            for mine, other in zip(experts.origin(index)(), others.origin(index)(), strict=True):
                assert torch.equal(mine, other)
    ids = tiny_models.token_ids()
    assert torch.equal(ours(ids).logits, wanted(ids).logits)


def refused(plain, path, match, error=FormatError):
    with pytest.raises(error, match=match) as caught:
        kt_sft.load_model(plain, KTConfig(weight_path=str(path)))
    assert "\n" not in str(caught.value)


def test_faults(plain, tmp_path):
    tensors = expert_tensors(plain, MIXED)
    file = tmp_path / "m.gguf"
    name = "blk.2.ffn_up_exps.weight"
    gguf_files.write(file, {}, {k: v for k, v in tensors.items() if k != name})
    refused(plain, file, f"m.gguf: tensor {name}: expected present, found missing")
    kind, shape, data = tensors[name]
    gguf_files.write(file, {}, tensors | {name: (kind, (shape[0], shape[2], shape[1]), data)})
    refused(plain, file, rf"tensor {name}: expected shape \[6, 96, 256\], found \[6, 256, 96\]")
    gguf_files.write(file, {}, tensors | {name: gguf_files.random_blocks("I8", shape)})
    refused(plain, file, f"tensor {name}: expected a floating point or quantised type, found I8")
    gguf_files.write(file, {}, tensors | {"blk.1.ffn_gate_exps.bias": gguf_files.random_blocks("F32", (6, 96))})
    refused(plain, file, "expected experts without bias in a GGUF file", UnsupportedModel)
    file.write_bytes(file.read_bytes()[:-4000])
    refused(plain, file, "truncated file")
    refused(plain, tmp_path / "none.gguf", "GGUF file: expected a file, found nothing")


def test_scales_that_are_no_numbers(plain, tmp_path):
    """A damaged block with an infinite scale cannot be packed into integers."""
    tensors = expert_tensors(plain, {})
    data = tensors["blk.1.ffn_up_exps.weight"][2]
    data[34 * 7 : 34 * 7 + 2] = np.array([np.inf], dtype=np.float16).view(np.uint8)
    path = gguf_files.write(tmp_path / "m.gguf", {}, tensors)
    with pytest.raises(FormatError, match=r"ffn_up_exps.weight \(expert 0 of model.layers.1.*: expected finite"):
        kt_sft.load_model(plain, KTConfig(method="INT8", weight_path=str(path)))


def test_file_that_changes_after_loading(plain, tmp_path):
    path = gguf_files.write(tmp_path / "m.gguf", {}, expert_tensors(plain, {}))
    model = kt_sft.load_model(plain, KTConfig(method="INT4", weight_path=str(path)))
    _, experts = next(iter(iter_routed_experts(model)))
    path.unlink()
    with pytest.raises(FormatError, match="expected as it was when the model was loaded, found missing"):
        experts.origin(0)()


NATIVE = {"gate": "Q4_K", "up": "Q6_K", "down": "Q4_0", "gate2": "F16", "up2": "BF16", "down2": "Q8_0"}


@pytest.mark.parametrize("method", ["GGUF", "llamafile"])
def test_types_of_the_file_as_they_are_stored(plain, tmp_path, method, caplog):
    tensors = expert_tensors(plain, NATIVE)
    path = gguf_files.write(tmp_path / "m.gguf", {}, tensors)
    with caplog.at_level(logging.INFO, logger="kt_sft"):
        model = kt_sft.load_model(plain, KTConfig(method=method, weight_path=str(path)), dtype=torch.float32)
    (said,) = [r.message for r in caplog.records if "experts from" in r.message]
    assert "1 x Q4_K as stored" in said and "1 x F16 as stored" in said and "dequantised" not in said
    layers = dict(zip(LAYERS, (experts for _, experts in iter_routed_experts(model)), strict=True))
    assert layers[1].formats == ("q4_k", "q6_k", "q4_0") and layers[2].formats == ("f16", "bf16", "q8_0")
    for layer, experts in layers.items():
        names = [f"blk.{layer}.ffn_{projection}_exps.weight" for projection in ("gate", "up", "down")]
        for index in range(EXPERTS):
            for mine, name in zip(experts.unpack_expert(index), names, strict=True):
                assert torch.equal(mine, numbers(tensors[name])[index])
    like = kt_sft.load_model(twin(plain, tensors, tmp_path / "twin"), dtype=torch.float32)
    ids = tiny_models.token_ids()
    ours, theirs = model(ids).logits.double(), like(ids).logits.double()  # whose weights are rounded to bf16
    assert (ours - theirs).norm() <= 2**-7 * theirs.norm()
    model.eval()
    with torch.no_grad():
        assert (model(ids).logits.double() - ours).norm() <= 1e-3 * ours.norm()  # block floating point
    path.unlink()
    model.save_pretrained(tmp_path / "saved")  # nothing but the packed weights is needed
    saved = {k: v for f in (tmp_path / "saved").glob("model*.safetensors") for k, v in load_file(f).items()}
    stored = {k: v for f in (tmp_path / "twin").glob("*.safetensors") for k, v in load_file(f).items()}
    assert saved.keys() == stored.keys()
    assert all(torch.equal(saved[key].bfloat16(), stored[key].bfloat16()) for key in stored)


def test_types_without_kernels_become_int8(plain, tmp_path, caplog):
    tensors = expert_tensors(plain, {"gate": "Q4_K", "up": "Q4_K", "down": "Q8_0"})
    for layer in LAYERS:
        kind, shape, data = gguf_files.random_blocks("Q3_K", (EXPERTS, 96, 256))
        data.reshape(-1, 110)[:, 108:] = np.array([0.01], dtype=np.float16).view(np.uint8)  # its scale
        tensors[f"blk.{layer}.ffn_up_exps.weight"] = kind, shape, data
    path = gguf_files.write(tmp_path / "m.gguf", {}, tensors)
    with caplog.at_level(logging.INFO, logger="kt_sft"):
        model = kt_sft.load_model(plain, KTConfig(method="GGUF", weight_path=str(path)))
    assert any("2 x Q3_K dequantised to int8" in r.message for r in caplog.records)
    _, experts = next(iter(iter_routed_experts(model)))
    assert experts.formats == ("q4_k", "int8", "q8_0")
    want = numbers(tensors["blk.1.ffn_up_exps.weight"])[2]
    up = experts.unpack_expert(2)[1]
    assert (up.double() - want.double()).norm() <= 2e-2 * want.double().norm()
    assert torch.equal(experts.origin(2)()[1], want)


def test_method_gguf_needs_a_gguf_file(plain):
    with pytest.raises(ConfigError, match="method GGUF: expected the experts in a GGUF file, found safetensors"):
        kt_sft.load_model(plain, KTConfig(method="GGUF"))
    with pytest.raises(ConfigError, match="int8 has no kernels for the types of GGUF files"):
        KTConfig(method="GGUF", expert_activations="int8")
    with pytest.raises(ConfigError, match="found method GGUF"):
        KTConfig(method="LLAMAFILE", weight_cache="somewhere")


def test_lora_trains_on_block_types(plain, tmp_path):
    path = gguf_files.write(tmp_path / "m.gguf", {}, expert_tensors(plain, NATIVE))
    model = kt_sft.load_model(plain, KTConfig(method="GGUF", weight_path=str(path)))
    from peft import LoraConfig

    model = kt_sft.get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.train()
    ids = tiny_models.token_ids()
    losses = []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    expert_grads = [p.grad for n, p in model.named_parameters() if "experts" in n and p.requires_grad]
    assert expert_grads and all(g is not None and g.abs().sum() > 0 for g in expert_grads)
    assert losses[-1] < losses[0]


@pytest.fixture
def hub(plain, tmp_path):
    """Arguments of a model on the hub of which only config.json is here."""
    snapshot = tmp_path / "models--kt-sft-tests--tiny" / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)
    shutil.copy(plain / "config.json", snapshot)
    return {"path": "kt-sft-tests/tiny", "cache_dir": tmp_path, "local_files_only": True, "device_map": {"": "cuda"}}


def test_check_of_a_model_on_the_hub_takes_types_and_sizes_from_the_gguf_file(plain, tmp_path, hub, monkeypatch):
    tensors = expert_tensors(plain, {})
    path = gguf_files.write(tmp_path / "m.gguf", {}, tensors)
    sizes = (EXPERTS, SIZES["hidden_size"], SIZES["moe_intermediate_size"])
    bf16_bytes = len(LAYERS) * native().ExpertStore.packed_bytes_for(*sizes, "bf16")
    machine = kt_sft.memory.AvailableMemory(bf16_bytes, "the machine")
    monkeypatch.setattr("kt_sft.memory.available_memory", lambda: machine)
    with pytest.raises(NotEnoughMemory):
        check_model(config=KTConfig(weight_path=str(path)), **hub)
    model = check_model(config=KTConfig(method="GGUF", weight_path=str(path)), **hub).model
    assert [experts.formats for _, experts in iter_routed_experts(model)] == [("q8_0",) * 3] * len(LAYERS)
    gguf_files.write(path, {}, {k: v for k, v in tensors.items() if "blk.2.ffn_up" not in k})
    with pytest.raises(FormatError, match=r"m.gguf: tensor blk.2.ffn_up_exps.weight: expected present, found missing"):
        check_model(config=KTConfig(method="GGUF", weight_path=str(path)), **hub)


def test_method_gguf_for_a_model_on_the_hub_needs_a_file(hub):
    with pytest.raises(ConfigError, match="method GGUF: expected weight_path, .* of kt-sft-tests/tiny, found nothing"):
        check_model(config=KTConfig(method="GGUF"), **hub)
