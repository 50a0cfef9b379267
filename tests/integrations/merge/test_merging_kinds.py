"""Merging of what is no LoRA on a Linear or an expert: routers, tied heads, several adapters, broken numbers."""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import kt_sft
from kt_sft.errors import ConfigError, FormatError, KTError
from kt_sft.formats.finite import is_finite
from kt_sft.formats.gguf import GgufIndex
from kt_sft.integrations.merge.command import merge as merge_checkpoint
from kt_sft.integrations.peft.limits import check_merge
from kt_sft.integrations.transformers.base_model import describe
from kt_sft.integrations.transformers.opened import OpenedModel
from tests.helpers import adapter_kinds, parity, quantized_checkpoints, tiny_models
from tests.helpers.tolerance import rel_l2

IDS = tiny_models.token_ids(2, 10)
# Tensors of a router as adapters of transformers 4 name them, where that is another name.
OLD_NAMES = {"mixtral": "block_sparse_moe.gate", "phimoe": "block_sparse_moe.gate"}
ROUTERS = (
    *("qwen3_moe", "mixtral", "glm4_moe", "deepseek_v3", "deepseek_v2", "qwen2_moe", "olmoe", "gpt_oss", "phimoe"),
    *("llama4_text", "hunyuan_v1_moe", "gemma4_text", "ernie4_5_vl_moe", "qwen3_vl_moe"),
)


@contextlib.contextmanager
def quiet(*_):
    yield lambda *_: None


def merge(folder: Path, adapters: list[Path], out: Path, to: str = "hf") -> Path:
    return merge_checkpoint(folder, adapters, out, to, quiet)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def logits(folder: Path) -> torch.Tensor:
    return tiny_models.load_stock(folder)(IDS).logits.detach()


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    folder.mkdir()
    named = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})
    values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(values | config))
    return folder


@pytest.mark.parametrize("family", ROUTERS)
def test_routers_of_every_family_get_w_plus_delta(tmp_path, family):
    """By parameter, by module and by the names of older checkpoints: merged and loaded alike."""
    folder = tiny_models.build(family, tmp_path / "base", dtype=torch.float32)
    base, stock = describe(OpenedModel(folder).model), tiny_models.load_stock(folder)
    modules = [n.removesuffix(".weight") for n in base.bare if n.split(".")[-2] in ("gate", "router")]
    modules = modules or sorted(base.routers)
    before, generator, tensors = logits(folder), torch.Generator().manual_seed(4), {}
    for name in modules:
        weight = stock.get_submodule(name).weight
        a = 0.1 * torch.randn(2, weight.shape[1], generator=generator)
        b = 0.5 * torch.randn(weight.shape[0], 2, generator=generator)
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        weight.data += 2 * b @ a
    wanted = stock(IDS).logits.detach()
    effect = (wanted - before).norm()
    assert effect > 0.03 * wanted.norm()
    tail, last = ".".join(modules[0].split(".")[-2:]), modules[0].rpartition(".")[2]
    parameters = sorted({f"{'.'.join(name.split('.')[-2:])}.weight" for name in modules})
    ways = {
        "parameter": write_adapter(
            tmp_path / "p", tensors, target_modules=[], target_parameters=parameters, peft_version="0.18.1"
        ),
        "module": write_adapter(tmp_path / "m", tensors, target_modules=[last]),
    }
    if family in OLD_NAMES:
        old = {name.replace(tail, OLD_NAMES[family]): tensor for name, tensor in tensors.items()}
        ways["old"] = write_adapter(tmp_path / "o", old, target_modules=[last])
    for way, adapter in ways.items():
        merged = logits(merge(folder, [adapter], tmp_path / f"{way}-merged"))
        assert (merged - wanted).norm() < 1e-4 * effect, way
        with torch.no_grad():
            loaded = kt_sft.load_adapter(parity.load_ours(folder), adapter)(IDS).logits
        assert (loaded - wanted).norm() < 0.08 * effect, way


def test_router_that_is_read_as_a_weight_trains(tmp_path):
    """DeepSeek-V2: gradients of the factors against those of W + scale * B A in stock code, and none while disabled."""
    folder = tiny_models.build("deepseek_v2", tmp_path / "base", dtype=torch.float32)
    names = sorted(describe(OpenedModel(folder).model).routers)
    stock = tiny_models.load_stock(folder)
    generator, tensors = torch.Generator().manual_seed(4), {}
    for name in names:
        shape = stock.get_submodule(name).weight.shape
        tensors[f"{name}.lora_A.weight"] = 0.1 * torch.randn(2, shape[1], generator=generator)
        tensors[f"{name}.lora_B.weight"] = 0.5 * torch.randn(shape[0], 2, generator=generator)
    adapter = write_adapter(tmp_path / "a", tensors, target_modules=["gate"])
    model = kt_sft.load_adapter(parity.load_ours(folder), adapter, is_trainable=True).eval()
    model(IDS).logits.square().mean().backward()
    for name in names:
        weight = stock.get_submodule(name).weight
        weight.requires_grad_(True).data += 2 * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
    stock(IDS).logits.square().mean().backward()
    for name in names:
        a, b = (tensors[f"{name}.lora_{role}.weight"] for role in "AB")
        layer, dw = model.get_submodule(f"base_model.model.{name}"), stock.get_submodule(name).weight.grad
        for found, wanted in ((layer.lora_A, 2 * b.T @ dw), (layer.lora_B, 2 * dw @ a.T)):
            grad = found["default"].weight.grad
            assert wanted.norm() > 0 and (grad - wanted).norm() < 0.1 * wanted.norm(), name
    with torch.no_grad(), model.disable_adapter():
        off = model(IDS).logits
    before = logits(folder)
    assert (off - before).norm() < 0.02 * before.norm()
    assert torch.equal(model.merge_and_unload().get_submodule(names[0]).weight, stock.get_submodule(names[0]).weight)


@pytest.mark.parametrize("is_stored", [False, True], ids=["one-matrix", "stored-twice"])
@pytest.mark.parametrize("sharded", [False, True])
def test_tied_head_keeps_the_old_embedding(tmp_path, sharded, is_stored):
    folder = tiny_models.build("qwen3_moe", tmp_path / "base", sharded=sharded, tie_word_embeddings=True)
    name = "model.embed_tokens.weight"
    before = weights(folder)[name]
    if is_stored:
        for file in folder.glob("*.safetensors"):
            tensors = load_file(file)
            if name in tensors:
                save_file({**tensors, "lm_head.weight": before.clone()}, file, {"format": "pt"})
        index = folder / "model.safetensors.index.json"
        if index.exists():
            values = json.loads(index.read_text())
            values["weight_map"]["lm_head.weight"] = values["weight_map"][name]
            index.write_text(json.dumps(values))
    adapter = write_adapter(tmp_path / "a", {**_attention(folder), name: before + 1}, modules_to_save=["embed_tokens"])
    out = merge(folder, [adapter], tmp_path / "out")
    after = weights(out)
    assert torch.equal(after["lm_head.weight"], before) and torch.equal(after[name], before + 1)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    unchanged = write_adapter(tmp_path / "b", _attention(folder))
    out = merge(folder, [unchanged], tmp_path / "tied")
    assert ("lm_head.weight" in weights(out)) is is_stored
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True


def test_config_of_a_vision_model_is_untied_inside_as_well(tmp_path):
    folder = tiny_models.build("qwen3_vl_moe", tmp_path / "base", tie_word_embeddings=True)
    base = describe(OpenedModel(folder).model)
    assert base.tied, "the family has tied heads"
    ((head, embedding),) = base.tied.items()
    wanted = torch.full(base.parameters[head], 0.5, dtype=torch.bfloat16)
    adapter = write_adapter(tmp_path / "a", {**_attention(folder), head: wanted}, modules_to_save=["lm_head"])
    out = merge(folder, [adapter], tmp_path / "out")
    values = json.loads((out / "config.json").read_text())
    assert values["tie_word_embeddings"] is False and values["text_config"]["tie_word_embeddings"] is False
    stock = tiny_models.load_stock(out)
    assert torch.equal(stock.get_parameter(head), wanted.float())
    assert torch.equal(stock.get_parameter(embedding), tiny_models.load_stock(folder).get_parameter(embedding))


def _attention(folder: Path, seed: int = 1) -> dict[str, torch.Tensor]:
    linears = {n: s for n, s in describe(OpenedModel(folder).model).linears.items() if n.endswith("q_proj")}
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, (out, into) in linears.items():
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, into, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(out, 2, generator=generator)
    return tensors


def test_adapters_of_different_kinds_are_added(tmp_path):
    folder = tiny_models.build("qwen3_moe", tmp_path / "base", dtype=torch.float32)
    before, name = weights(folder), "model.layers.0.self_attn.q_proj"
    first, second = _attention(folder, 1), _attention(folder, 2)
    head = {"lm_head.weight": before["lm_head.weight"] + 1}
    one = write_adapter(tmp_path / "one", first | head, modules_to_save=["lm_head"])
    two = write_adapter(tmp_path / "two", second)
    deltas = [2 * t[f"{name}.lora_B.weight"] @ t[f"{name}.lora_A.weight"] for t in (first, second)]
    for order in ([one, two], [two, one]):
        after = weights(merge(folder, order, tmp_path / f"out-{order[0].name}"))
        assert torch.equal(after["lm_head.weight"], head["lm_head.weight"])
        wanted = before[f"{name}.weight"] + sum(deltas)
        assert (after[f"{name}.weight"] - wanted).abs().max() < 1e-5 * wanted.abs().max()
    third = write_adapter(tmp_path / "three", second | head, modules_to_save=["lm_head"])
    with pytest.raises(FormatError, match=r"changes lm_head\.weight: expected one adapter.*which changes it as well"):
        merge(folder, [one, third], tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_stored_base_layers_of_two_adapters_are_no_change(tmp_path):
    """PEFT stores the head beside its LoRA: two such adapters have a sum."""
    folder = tiny_models.build("qwen3_moe", tmp_path / "base", dtype=torch.float32)
    head = weights(folder)["lm_head.weight"]
    a, b = torch.randn(2, head.shape[1]), torch.randn(head.shape[0], 2)
    tensors = {"lm_head.lora_A.weight": a, "lm_head.lora_B.weight": b, "lm_head.base_layer.weight": head}
    both = [write_adapter(tmp_path / name, tensors, target_modules=["lm_head"]) for name in ("one", "two")]
    after = weights(merge(folder, both, tmp_path / "out"))["lm_head.weight"]
    assert (after - (head + 4 * b @ a)).abs().max() < 1e-5 * after.abs().max()


def test_router_of_a_quantised_checkpoint(tmp_path):
    source = tiny_models.build("deepseek_v3", tmp_path / "base")
    fp8, plain = quantized_checkpoints.fp8_checkpoint(source, tmp_path / "fp8")
    name = "model.layers.1.mlp.gate.weight"
    rows, columns = weights(plain)[name].shape
    a, b = torch.randn(2, columns), torch.randn(rows, 2)
    tensors = {name.replace("weight", "lora_A.weight"): a, name.replace("weight", "lora_B.weight"): b}
    adapter = write_adapter(tmp_path / "a", tensors, target_modules=["gate"])
    after = weights(merge(fp8, [adapter], tmp_path / "out"))[name]
    wanted = (weights(plain)[name].float() + 2 * b @ a).to(after.dtype)
    assert torch.equal(after, wanted)


def _broken(root: Path, name: str, value: float, **build: object) -> Path:
    folder = tiny_models.build("qwen3_moe", root / "base", **adapter_kinds.SIZES["qwen3_moe"], **build)
    tiny_models.rewrite(folder, lambda t: {n: v.flatten().index_fill(0, torch.tensor(3), value).view_as(v)
                                           if n == name else v for n, v in t.items()})  # fmt: skip
    return folder


@pytest.mark.parametrize("to", ["hf", "gguf-bf16", "gguf-q8_0"])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.experts.2.down_proj.weight", "model.embed_tokens.weight", "model.norm.weight"]
)
def test_broken_checkpoints_are_not_merged(tmp_path, name, to):
    folder = _broken(tmp_path, name, float("nan"))
    tokenizer = adapter_kinds.base(adapter_kinds.CASES["attention"], tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((tokenizer / file).read_bytes())
    adapter = write_adapter(tmp_path / "a", _attention(folder))
    with pytest.raises(FormatError, match=rf"tensor {name.replace('.', '[.]')}: expected finite numbers, found NaN"):
        merge(folder, [adapter], tmp_path / "out" / "m.gguf", to)
    assert not (tmp_path / "out").exists()


def test_sums_that_a_type_cannot_hold_are_not_written(tmp_path):
    """Finite in f32, and too large for f16; and a sum that is not even finite in f32."""
    folder = tiny_models.build("qwen3_moe", tmp_path / "base", dtype=torch.float16)
    tensors = {key: 200 * tensor if "lora_B" in key else 200 * tensor for key, tensor in _attention(folder).items()}
    adapter = write_adapter(tmp_path / "large", tensors)
    with pytest.raises(FormatError, match=r"q_proj\.weight: .* too large for float16; merge into bfloat16"):
        merge(folder, [adapter], tmp_path / "out")
    huge = {key: 1e20 * tensor for key, tensor in tensors.items()}
    adapter = write_adapter(tmp_path / "huge", huge)
    with pytest.raises(FormatError, match=r"huge: merged tensor .*q_proj\.weight: expected finite numbers"):
        merge(folder, [adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_with_broken_numbers_are_not_saved(tmp_path):
    folder = tiny_models.build("qwen3_moe", tmp_path / "base")
    model = kt_sft.load_model(folder)
    model.model.norm.weight.data[3] = float("inf")
    with pytest.raises(FormatError, match=r"tensor model\.norm\.weight: expected finite numbers"):
        model.save_pretrained(tmp_path / "out")
    model = kt_sft.load_model(folder, dtype=torch.float16)
    experts = model.model.layers[1].mlp.experts
    gate, up, down = experts.unpack_expert(2)
    experts.load_expert(2, gate, up, down * 1e6)  # more than float16 holds
    with pytest.raises(FormatError, match=r"layers\.1\.mlp\.experts.*down.*: expected finite numbers"):
        model.save_pretrained(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


def test_finite():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2):
        values = torch.tensor([1.0, -2.0, 3.0]).to(dtype)
        assert is_finite(values)
        for bad in (float("nan"), float("inf"), -float("inf")):
            broken = torch.tensor([1.0, bad, 3.0]).to(dtype)
            assert not is_finite(broken)
    assert is_finite(torch.arange(3)) and is_finite(torch.empty(0))
    assert not is_finite(torch.tensor([1e5]), torch.float16)
    assert is_finite(torch.tensor([1e6]), torch.float16, steps=127)
    assert not is_finite(torch.tensor([1e7]), torch.float16, steps=127)


LIMITS = {
    "router": ({"target_parameters": ["mlp.gate.weight"]}, {}, "LoRA on the router: can be merged, but not written"),
    "saved": ({"modules_to_save": ["lm_head"]}, {}, "modules trained as a whole"),
    "tokens": ({"trainable_token_indices": [1, 2]}, {}, "single rows of an embedding"),
    "dora": ({"use_dora": True}, {}, "DoRA: can be merged"),
    "lora_bias": ({"lora_bias": True}, {}, "cannot be merged, since layers such as model.layers.0.self_attn.q_proj"),
    "pissa": ({"init_lora_weights": "pissa"}, {}, "can neither be merged nor converted"),
    "aLoRA": ({"alora_invocation_tokens": [1]}, {}, "alora_invocation_tokens: with it, the adapter can be neither"),
    "bias": ({"bias": "all"}, {"attention_bias": True}, "biases of the base model"),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, {}, "LoRA on an embedding"),
    "plain": ({}, {}, None),
}


@pytest.mark.parametrize("name", LIMITS)
def test_what_cannot_be_done_later_is_said_when_training_starts(tmp_path, caplog, name):
    lora, overrides, words = LIMITS[name]
    model = kt_sft.load_model(tiny_models.build("qwen3_moe", tmp_path / "base", **overrides))
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **lora})
    with caplog.at_level(logging.WARNING, "kt_sft"):
        kt_sft.get_peft_model(model, config, expert_lora=False)
    said = [r.getMessage() for r in caplog.records if "merged" in r.getMessage()]
    assert [words in text for text in said] == [True] if words else not said, said


def test_biases_that_peft_would_not_save_are_refused(tmp_path):
    model = kt_sft.load_model(tiny_models.build("qwen3_moe", tmp_path / "base", attention_bias=True))
    config = LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only", task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match="bias: 'lora_only' would train biases .* PEFT does not save them"):
        kt_sft.get_peft_model(model, config, expert_lora=False)


def test_biases_that_peft_has_not_saved_are_said_when_it_is_loaded(tmp_path, caplog):
    """What stock PEFT computes with such a file, and what merging writes: the base model's biases."""
    folder = tiny_models.build("qwen3_moe", tmp_path / "base", attention_bias=True)
    config = LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only", task_type="CAUSAL_LM")
    stock = parity.fill_lora(get_peft_model(tiny_models.load_stock(folder), config)).eval()
    stock.save_pretrained(tmp_path / "a")
    ids = tiny_models.token_ids(1, 8)
    with caplog.at_level(logging.WARNING, "kt_sft"):
        ours = kt_sft.load_adapter(parity.load_ours(folder), tmp_path / "a")
    assert "PEFT has not saved biases such as that of model.layers.0.self_attn.q_proj" in caplog.text
    with torch.no_grad():
        assert rel_l2(ours(ids).logits, stock(ids).logits) < 0.01


def test_dropout_that_a_router_does_not_get_is_said(tmp_path, caplog):
    model = kt_sft.load_model(tiny_models.build("deepseek_v2", tmp_path / "base"))
    router = ["mlp.gate.weight"]
    config = LoraConfig(
        r=2, target_modules=["o_proj"], target_parameters=router, lora_dropout=0.2, task_type="CAUSAL_LM"
    )
    with caplog.at_level(logging.WARNING, "kt_sft"):
        kt_sft.get_peft_model(model, config, expert_lora=False)
    assert "lora_dropout 0.2: without effect on LoRA of model.layers.1.mlp.gate and 1 more" in caplog.text
    assert "o_proj: without" not in caplog.text


def test_biases_without_a_place_are_refused_before_a_model_is_loaded_to_be_merged(tmp_path):
    folder, adapter = adapter_kinds.make("lora_bias_alone", tmp_path)
    with pytest.raises(FormatError, match=r"q_proj\.bias: expected a layer that has a bias"):
        check_merge(OpenedModel(folder).model, adapter)
    folder, adapter = adapter_kinds.make("lora_bias", tmp_path)
    check_merge(OpenedModel(folder).model, adapter)


def test_a_bias_of_a_router_is_refused_at_every_door(tmp_path):
    """DeepSeek-V2's block multiplies by the router's weight alone."""
    folder = tiny_models.build("deepseek_v2", tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["gate"], lora_bias=True, task_type="CAUSAL_LM")
    get_peft_model(tiny_models.load_stock(folder), config).save_pretrained(tmp_path / "adapter")
    refused = pytest.raises(FormatError, match=r"mlp\.gate\.lora_B\.bias: expected no bias on a router")
    with refused:
        kt_sft.load_adapter(kt_sft.load_model(folder), tmp_path / "adapter")
    with refused:
        merge(folder, [tmp_path / "adapter"], tmp_path / "out")


def test_a_base_model_that_is_not_found_is_named_with_where_it_was_looked_for(tmp_path):
    _, adapter = adapter_kinds.make("attention", tmp_path)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "models/none"}))
    with pytest.raises(ConfigError, match="base model models/none: .* above the adapter, found none; name .* --model"):
        merge(None, [adapter], tmp_path / "out")


def test_merge_and_unload_is_what_merge_writes(tmp_path):
    """All tensors of a bf16 checkpoint, bit by bit."""
    folder = tiny_models.build("qwen3_moe", tmp_path / "base", tie_word_embeddings=True)
    parameters = [*adapter_kinds.EXPERTS, "mlp.gate.weight"]
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], target_parameters=parameters, task_type="CAUSAL_LM")
    model = parity.fill_lora(get_peft_model(tiny_models.load_stock(folder), config))
    model.save_pretrained(tmp_path / "a")
    merged = weights(merge(folder, [tmp_path / "a"], tmp_path / "merged"))
    ours = kt_sft.load_adapter(kt_sft.load_model(folder), tmp_path / "a").merge_and_unload()
    ours.save_pretrained(tmp_path / "saved")
    saved = weights(tmp_path / "saved")
    assert merged.keys() == saved.keys() and "lm_head.weight" in merged
    for name, tensor in merged.items():
        assert (tensor.float() - saved[name].float()).abs().max() <= 2**-7 * tensor.float().abs().max(), name
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"] is False


def test_gguf_has_the_head_only_where_it_is_one(tmp_path):
    for name, is_there in (("saved_tied", True), ("tokens_tied", False), ("saved_as_one", False)):
        folder, adapter = adapter_kinds.make(name, tmp_path)
        file = merge(folder, [adapter], tmp_path / f"{name}.gguf", "gguf-bf16")
        assert ("output.weight" in GgufIndex.from_path(file)) is is_there, name


def test_an_adapter_without_what_its_config_names_is_refused(tmp_path):
    folder = tiny_models.build("qwen3_moe", tmp_path / "base")
    tensors = _attention(folder)
    for number, config in enumerate(
        ({"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1]})
    ):
        adapter = write_adapter(tmp_path / str(number), tensors, **config)
        with pytest.raises(KTError, match="expected present, found missing"):
            merge(folder, [adapter], tmp_path / "out")
