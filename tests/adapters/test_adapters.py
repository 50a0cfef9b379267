"""Adapters in the forms of other engines: the same weights, the names and shapes that their loaders ask for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import kt_sft
from kt_sft.adapters import forms
from kt_sft.cli import app
from kt_sft.errors import ConfigError, FormatError, OutputError, UnsupportedModel
from kt_sft.formats.gguf import GgufIndex
from kt_sft.integrations.merge.inspecting import open_with_base
from kt_sft.integrations.transformers.base_model import find_base_model
from tests.helpers import adapters, tiny_models
from tests.helpers.adapters import convert, edit, opened

FAMILIES = (*tiny_models.FAMILIES, "gpt_oss")
PREFIX = "base_model.model.model.layers"


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Directory with `base` and `adapter`, by family."""
    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            adapters.make(family, made[family])
        return made[family]

    return of


def refuses(family: str, form: str) -> bool:
    """Fused checkpoints have no names for SGLang; llama.cpp computes without LoRA on DeepSeek's attention."""
    return (form == "gguf" and family.startswith("deepseek")) or (family == "gpt_oss" and form in ("sglang", "gguf"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_form_adds_the_same_to_every_weight(roots, tmp_path, family):
    """float64 products against those of plain PEFT; and every form converts back to the file it came from."""
    root = roots(family)
    wanted = adapters.peft_deltas(root)
    adapters.assert_same(adapters.deltas(opened(root / "adapter", root)), wanted)
    for form in forms.FORMS:
        if refuses(family, form):
            with pytest.raises(UnsupportedModel, match="expected .* found"):
                convert(root, form, tmp_path / form)
            continue
        written = convert(root, form, tmp_path / form)
        there = opened(written, root)
        adapters.assert_same(adapters.deltas(there), wanted)
        back = forms.convert(there, "peft-0.18", tmp_path / f"{form}-back")
        before, after = (load_file(d / "adapter_model.safetensors") for d in (root / "adapter", back))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before), form
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_reading_converted_forms_gives_their_names(roots, tmp_path):
    root = roots("mixtral")
    found = {form: opened(convert(root, form, tmp_path / form), root).form for form in forms.FORMS}
    assert found == {
        "peft-0.18": "peft-0.18",
        "peft-0.19": "peft-0.19",
        "vllm": "per-expert",
        "sglang": "per-expert",
        "gguf": "gguf",
    }


NAMES = {
    "mixtral": ("block_sparse_moe.experts", ("w1", "w3", "w2")),
    "qwen3_moe": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "deepseek_v2": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "deepseek_v3": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
}


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("family", NAMES)
def test_keys_and_shapes_that_vllm_and_sglang_ask_for(roots, tmp_path, family, engine):
    """vLLM stacks experts.<E>.<checkpoint name>, SGLang renames w1, w3 and w2; both want every expert at rank r."""
    root = roots(family)
    folder = convert(root, engine, tmp_path / engine)
    base = find_base_model(root / "base")
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    rank, (block, children) = config["r"], NAMES[family]
    expected = {}
    for module, spec in base.specs.items():
        for expert in range(spec.num_experts):
            for child, (out, into) in zip(children, [(spec.inter, spec.hidden)] * 2 + [(spec.hidden, spec.inter)]):
                stem = f"{PREFIX}.{module.split('.')[2]}.{block}.{expert}.{child}"
                expected[f"{stem}.lora_A.weight"] = (rank, into)
                expected[f"{stem}.lora_B.weight"] = (out, rank)
    for name, (out, into) in base.linears.items():
        if f"base_model.model.{name}.lora_A.weight" in tensors:
            expected[f"base_model.model.{name}.lora_A.weight"] = (rank, into)
            expected[f"base_model.model.{name}.lora_B.weight"] = (out, rank)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    named = set(config["target_modules"])
    assert named >= ({"gate_proj", "up_proj", "down_proj"} if engine == "sglang" else set(children))
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["target_parameters"]
    assert config["lora_alpha"] / rank == pytest.approx(5 / 3)


def test_stacked_form_that_vllm_reads_for_fused_families(roots, tmp_path):
    """As its FusedMoE3DWithLoRA unstacks it: `[experts, rank, in]`, `[out, rank, experts]`, gate and up alternating."""
    root = roots("gpt_oss")
    folder = convert(root, "vllm", tmp_path / "out")
    tensors, config = (
        load_file(folder / "adapter_model.safetensors"),
        json.loads((folder / "adapter_config.json").read_text()),
    )
    wanted = adapters.peft_deltas(root)
    base = find_base_model(root / "base")
    for module, spec in base.specs.items():
        for stem, parameter in ((f"{module}.base_layer", "gate_up_proj"), (module, "down_proj")):
            a, b = (tensors[f"base_model.model.{stem}.lora_{role}.weight"].double() for role in "AB")
            a = a.reshape(spec.num_experts, -1, a.shape[-1])
            b = b.reshape(b.shape[0], -1, spec.num_experts).permute(2, 0, 1)
            assert a.shape[1] == b.shape[2] == config["r"]
            product = config["lora_alpha"] / config["r"] * (b @ a)
            assert torch.allclose(product.mT, wanted[f"{module}.{parameter}"], atol=1e-7)


def test_gguf_tensors_as_llama_cpp_reads_them(roots, tmp_path):
    root = roots("mixtral")
    file = convert(root, "gguf", tmp_path / "out")
    assert file.parent == tmp_path / "out"
    index, spec = GgufIndex.from_path(file), next(iter(find_base_model(root / "base").specs.values()))
    keys = ("general.type", "general.architecture", "adapter.type")
    assert [index.metadata[key] for key in keys] == ["adapter", "llama", "lora"]
    assert index.metadata["adapter.lora.alpha"] == 5.0
    assert index.info("blk.1.ffn_gate_exps.weight.lora_a").shape == (spec.num_experts, 3, spec.hidden)
    assert index.info("blk.1.ffn_down_exps.weight.lora_b").shape == (spec.num_experts, spec.hidden, 3)
    tensors = load_file(root / "adapter" / "adapter_model.safetensors")
    config = json.loads((root / "base" / "config.json").read_text())
    q = tensors[f"{PREFIX}.0.self_attn.q_proj.lora_B.weight"]
    heads = config["num_attention_heads"]
    neighbours = q.view(heads, 2, -1, 3).transpose(1, 2).reshape(q.shape)  # rotary partners beside each other
    found = index.blocks("blk.0.attn_q.weight.lora_b").view(torch.float32)
    assert torch.equal(found, neighbours) and not torch.equal(found, q)


def separate(root: Path, tmp_path: Path, **changes) -> Path:
    """A per-expert adapter in which gate and up have factors a of their own; `changes` go into its config."""
    folder = convert(root, "vllm", tmp_path / "separate")
    tensors = load_file(folder / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if ".experts." in name:
            tensor.normal_(0.0, 0.2, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    edit(folder, **changes)
    return folder


@pytest.mark.parametrize("form", ["peft-0.18", "peft-0.19"])
def test_separate_gate_and_up_need_twice_the_rank(roots, tmp_path, form):
    root = roots("qwen3_moe")
    source = opened(separate(root, tmp_path), root)
    wanted = adapters.deltas(source)
    folder = forms.convert(source, form, tmp_path / "fused")
    there = opened(folder, root)
    adapters.assert_same(adapters.deltas(there), wanted)
    module = there.experts[0]
    assert [there.ranks[f"{module}.{p}"] for p in ("gate", "up", "down")] == [6, 6, 3]


@pytest.mark.parametrize("form", ["peft-0.19", "vllm", "sglang", "gguf"])
def test_model_loads_every_form(roots, tmp_path, form):
    root = roots("mixtral")
    ids = tiny_models.token_ids()
    wanted = kt_sft.load_adapter(kt_sft.load_model(root / "base"), root / "adapter")(ids).logits
    source = convert(root, form, tmp_path / form)
    model = kt_sft.load_adapter(kt_sft.load_model(root / "base"), source, is_trainable=True).eval()
    assert torch.equal(model(ids).logits, wanted)
    assert any(p.requires_grad for p in model.parameters())


def test_separate_gate_and_up_compute_as_plain_matrices(roots, tmp_path):
    """A per-expert adapter in the kernels against the stock model with its products added to the weights."""
    root = roots("qwen3_moe")
    folder = separate(root, tmp_path)
    model = kt_sft.load_adapter(kt_sft.load_model(root / "base", dtype=torch.float32), folder)
    stock = tiny_models.load_stock(root / "base")
    parameters = dict(stock.named_parameters())
    for name, delta in adapters.deltas(opened(folder, root)).items():
        parameters[name].data += delta.float()
    ids = tiny_models.token_ids()
    wanted, found = stock(ids).logits, model(ids).logits
    assert (found - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_deepseek_leaves_for_llama_cpp_without_its_attention(tmp_path):
    adapters.make("deepseek_v3", tmp_path, targets=["mlp.experts", "o_proj", "gate_proj", "up_proj"])
    file = convert(tmp_path, "gguf", tmp_path / "a.gguf")
    adapters.assert_same(adapters.deltas(opened(file, tmp_path)), adapters.peft_deltas(tmp_path))
    assert GgufIndex.from_path(file).info("blk.1.ffn_up_shexp.weight.lora_a").shape[0] == 3


def test_partial_adapters(tmp_path):
    """LoRA on down_proj of the experts only: vLLM and SGLang get zeros for the others."""
    adapters.make("qwen3_moe", tmp_path, targets=["mlp.experts.down_proj", "q_proj"])
    wanted = adapters.peft_deltas(tmp_path)
    for form in forms.FORMS:
        there = opened(convert(tmp_path, form, tmp_path / form), tmp_path)
        found = adapters.deltas(there)
        zeros = [found.pop(name) for name in list(found) if name.endswith("gate_up_proj")]
        assert bool(zeros) == (form in ("vllm", "sglang")) and not any(zero.any() for zero in zeros)
        adapters.assert_same(found, wanted)


def test_scales_and_ranks_that_differ(roots, tmp_path):
    """rank_pattern, alpha_pattern and rsLoRA leave with an adapter although vLLM and llama.cpp know none of them."""
    root = roots("qwen3_moe")
    source = tmp_path / "source"
    shutil.copytree(root / "adapter", source)
    edit(source, use_rslora=True, alpha_pattern={"mlp.experts.down_proj": 7, "q_proj": 2.5})
    wanted = adapters.deltas(opened(source, root))
    original = adapters.deltas(opened(root / "adapter", root))
    assert any(not torch.allclose(wanted[name], original[name]) for name in wanted)
    for form in forms.FORMS:
        written = forms.convert(opened(source, root), form, tmp_path / form)
        adapters.assert_same(adapters.deltas(opened(written, root)), wanted)


def test_adapters_of_other_models(roots, tmp_path):
    file = convert(roots("mixtral"), "gguf", tmp_path / "m.gguf")
    with pytest.raises(FormatError, match="general.architecture: expected qwen3moe, found 'llama'"):
        opened(file, roots("qwen3_moe"))
    with pytest.raises(FormatError, match="expected deepseek_v2, found mixtral"):
        opened(roots("mixtral") / "adapter", roots("deepseek_v2"))
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(FormatError, match="truncated file"):
        opened(file, roots("mixtral"))
    with pytest.raises(ConfigError, match="base model: .*nowhere.*--base-model"):
        open_with_base(roots("mixtral") / "adapter", "nowhere/at all")


def test_failed_conversion_leaves_nothing(roots, tmp_path, monkeypatch):
    root = roots("mixtral")
    adapter = opened(root / "adapter", root)
    output = tmp_path / "a" / "b"

    def fail(path, *_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(forms, "write_tensors", fail)
    monkeypatch.setattr(forms.gguf_writer, "write", fail)
    for form in ("vllm", "gguf"):
        with pytest.raises(OutputError, match="No space left"):
            forms.convert(adapter, form, output)
        assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="did you mean 'vllm'"):
        forms.convert(adapter, "vlm", output)
    with pytest.raises(OutputError, match="expected a new path, found something there"):
        forms.convert(adapter, "vllm", root / "base")
    with pytest.raises(ConfigError, match="is the adapter that is read"):
        forms.convert(adapter, "vllm", root / "adapter")


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.output


def test_command_line(roots, tmp_path):
    root = roots("mixtral")
    code, text = run("adapter", "convert", "--to", "gguf", root / "adapter", tmp_path / "a.gguf")
    assert code == 0 and "peft-0.18 -> gguf, 2 layers of experts" in text, text
    code, text = run("adapter", "inspect", "--json", tmp_path / "a.gguf")
    report = json.loads(text)
    assert code == 0 and report["form"] == "gguf" and report["model_type"] == "mixtral"
    assert (report["layers"], report["experts"], report["problems"]) == (2, 5, [])
    targets = {target["name"]: target for target in report["targets"]}
    wanted = adapters.peft_deltas(root)
    norms = [wanted[name].norm().item() for name in wanted if name.endswith("q_proj.weight")]
    assert targets["q_proj"]["max_norm"] == pytest.approx(max(norms), rel=1e-5)
    assert targets["experts.down"]["matrices"] == 10 and targets["experts.down"]["ranks"] == [3]
    code, text = run("adapter", "convert", "--to", "sglan", root / "adapter", tmp_path / "x")
    assert code == 2 and "did you mean 'sglang'" in text and not (tmp_path / "x").exists()
