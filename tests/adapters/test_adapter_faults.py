"""Adapters that are damaged, or of another model: one clear error, or a problem that `inspect` names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from typer.testing import CliRunner

import kt_sft
from kt_sft.adapters import forms
from kt_sft.cli import app
from kt_sft.errors import FormatError
from kt_sft.formats.gguf_writer import PlannedGguf, write
from kt_sft.integrations.merge.inspecting import open_with_base
from tests.helpers import adapters, parity, tiny_models
from tests.helpers.adapters import convert, damaged, edit, opened

PREFIX = "base_model.model.model.layers"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Directory with `base` and `adapter`."""
    root = tmp_path_factory.mktemp("qwen3_moe")
    adapters.make("qwen3_moe", root)
    return root


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.output


def drop(part: str):
    return damaged(lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name})


DAMAGE = [
    ("vllm", drop("experts.3.up_proj.lora_B"), r"experts\.3\.up_proj\.lora_B\.weight: expected present, found missing"),
    ("peft-0.19", drop("base_layer.lora_A"), r"base_layer\.lora_A\.weight: expected present, found missing"),
    *(
        (
            form,
            drop("layers.1.self_attn."),
            r"layers\.1\.self_attn\.\w+\.lora_A\.weight: expected present, found missing; copy the whole adapter",
        )
        for form in ("peft-0.18", "peft-0.19")
    ),
    (
        "peft-0.19",
        damaged(lambda t: {n: v[:-1] if ".experts." in n else v for n, v in t.items()}),
        r"expected 21 \(experts times rank\)",
    ),
    (
        "vllm",
        damaged(lambda t: {n: v[:, :-1] for n, v in t.items()}),
        r"lora_A\.weight: expected \[3, 48\], found \[3, 47\]",
    ),
    ("vllm", damaged(lambda t: {**t, "base_model.model.x.lora_A.weight": torch.ones(1)}), "expected a LoRA target"),
    (
        "vllm",
        damaged(lambda t: {**t, "base_model.model.x.lora_magnitude_vector": torch.ones(1)}),
        "a matrix of the model",
    ),
    ("vllm", lambda folder: edit(folder, peft_type="IA3"), "peft_type: expected LORA, found IA3"),
    ("vllm", lambda folder: edit(folder, use_dora=True), r"lora_magnitude_vector: expected present, found missing"),
    (
        "vllm",
        lambda folder: edit(folder, init_lora_weights="pissa_niter_4"),
        "base model's own weights, found 'pissa_n",
    ),
    ("vllm", lambda folder: edit(folder, init_lora_weights="OLoRA"), "init_lora_weights: .* found 'OLoRA'"),
    ("vllm", lambda folder: edit(folder, lora_alpha=0), "lora_alpha: expected a positive number, found 0"),
    ("vllm", lambda folder: edit(folder, rank_pattern={"q_proj": None}), "rank_pattern, 'q_proj': .* found None"),
    ("vllm", lambda folder: edit(folder, rank_pattern={"(": 3}), r"rank_pattern, key '\(': expected a regular expr"),
    ("vllm", lambda folder: edit(folder, alpha_pattern={"q_proj": 0}), "alpha_pattern, 'q_proj': .* found 0"),
    ("vllm", lambda folder: edit(folder, alpha_pattern={"q_proj": "x"}), "alpha_pattern, 'q_proj': .* found 'x'"),
    ("vllm", lambda folder: edit(folder, target_parameters=5), "target_parameters: expected a list of names, found 5"),
    ("vllm", lambda folder: edit(folder, r=0), "r: expected a positive number, found 0"),
    ("vllm", lambda folder: (folder / "adapter_config.json").write_text("{"), "expected a JSON object"),
    ("vllm", lambda folder: (folder / "adapter_config.json").unlink(), "no adapter_config.json in it"),
    ("vllm", lambda folder: (folder / "adapter_model.safetensors").unlink(), "no adapter weights"),
    ("vllm", lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 99), "safetensors file"),
]


@pytest.mark.parametrize(("form", "change", "match"), DAMAGE)
def test_damaged_adapters_give_one_clear_error(root, tmp_path, form, change, match):
    folder = convert(root, form, tmp_path / "adapter")
    change(folder)
    with pytest.raises(FormatError, match=match) as caught:
        open_with_base(folder, str(root / "base"))
    assert "\n" not in str(caught.value)


def with_whole(root: Path, folder: Path, **tensors: torch.Tensor) -> Path:
    """A copy of the adapter with modules that were trained as a whole; `__` stands for a dot in their names."""
    shutil.copytree(root / "adapter", folder)
    damaged(lambda t: {**t, **{f"base_model.model.{n.replace('__', '.')}": v for n, v in tensors.items()}})(folder)
    return folder


def test_modules_trained_as_a_whole_are_compared_with_the_model(root, tmp_path):
    rows, hidden = load_file(root / "base" / "model.safetensors")["lm_head.weight"].shape
    cases = [
        ("lm_head__weight", rf"lm_head\.weight: expected \[{rows}, {hidden}\], found \[{rows + 8}, {hidden}\]"),
        ("nonsense__weight", r"nonsense\.weight: expected a parameter of the model, found none"),
    ]
    for name, match in cases:
        folder = with_whole(root, tmp_path / name, **{name: torch.ones(rows + 8, hidden)})
        with pytest.raises(FormatError, match=match):
            opened(folder, root)
        with pytest.raises(FormatError, match=match):
            kt_sft.load_adapter(parity.load_ours(root / "base"), folder)
        code, text = run("merge", "--adapter", folder, "--output", tmp_path / "merged")
        assert code == 2 and "Traceback" not in text and not (tmp_path / "merged").exists()


def test_names_that_peft_stores_once_a_vocabulary_has_grown(root, tmp_path):
    """The trained copy under three names, one of which is the frozen module's."""
    head = load_file(root / "base" / "model.safetensors")["lm_head.weight"]
    names = {"lm_head__weight": 2 * head, "lm_head__modules_to_save__weight": 2 * head}
    folder = with_whole(root, tmp_path / "head", **names, lm_head__original_module__weight=head)
    edit(folder, modules_to_save=["lm_head"])
    adapter = opened(folder, root)
    assert list(adapter.whole) == ["lm_head.weight"]
    assert torch.equal(adapter.whole["lm_head.weight"](), 2 * head)
    loaded = kt_sft.load_adapter(parity.load_ours(root / "base"), folder)
    assert torch.equal(loaded.get_output_embeddings().weight, 2 * head)


@pytest.mark.parametrize("saved", ["experts", "mlp"])
def test_routed_experts_trained_as_a_whole_are_refused_at_every_door(root, tmp_path, saved):
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[saved], task_type="CAUSAL_LM")
    peft.get_peft_model(tiny_models.load_stock(root / "base"), config).save_pretrained(tmp_path / "a")
    match = r"mlp\.experts\.\w+: expected LoRA on the routed experts, found .* \(modules_to_save\)"
    with pytest.raises(FormatError, match=match):
        opened(tmp_path / "a", root)
    with pytest.raises(FormatError, match=match):
        kt_sft.load_adapter(parity.load_ours(root / "base"), tmp_path / "a")


@pytest.mark.parametrize("change", [{"modules_to_save": ["lm_head"]}, {"use_dora": True}])
def test_what_the_config_names_and_the_file_lacks_is_missing_at_every_door(root, tmp_path, change):
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(tiny_models.load_stock(root / "base"), config).save_pretrained(tmp_path / "a")
    edit(tmp_path / "a", **change)
    with pytest.raises(FormatError, match="expected present, found missing"):
        opened(tmp_path / "a", root)
    with pytest.raises(FormatError, match="expected present, found missing"):
        kt_sft.load_adapter(parity.load_ours(root / "base"), tmp_path / "a")


def test_stored_base_layer_of_a_module_with_lora(root, tmp_path):
    """What PEFT writes for LoRA on a head: the factors, and the head itself."""
    head = load_file(root / "base" / "model.safetensors")["lm_head.weight"]
    names = {"lm_head__lora_A__weight": torch.ones(3, head.shape[1]), "lm_head__base_layer__weight": 2 * head}
    folder = with_whole(root, tmp_path / "head", **names, lm_head__lora_B__weight=torch.ones(head.shape[0], 3))
    with pytest.raises(FormatError, match=r"lm_head\.lora_A\.weight: expected one of a module that adapter_config"):
        opened(folder, root)
    targets = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    edit(folder, target_modules=[*targets, "lm_head"])
    assert torch.equal(opened(folder, root).whole["lm_head.weight"](), 2 * head)
    assert "lm_head" in opened(folder, root).ranks
    written = load_file(
        forms.convert(opened(folder, root), "peft-0.18", tmp_path / "out") / "adapter_model.safetensors"
    )
    assert torch.equal(written["base_model.model.lm_head.base_layer.weight"], 2 * head)


def test_inspect_names_problems(root, tmp_path):
    folder = convert(root, "vllm", tmp_path / "adapter")

    def spoil(tensors):
        del tensors[f"{PREFIX}.1.mlp.experts.2.down_proj.lora_B.weight"]
        tensors[f"{PREFIX}.0.mlp.experts.0.gate_proj.lora_A.weight"][0, 0] = float("nan")
        return tensors

    damaged(spoil)(folder)
    code, text = run("adapter", "inspect", "--json", folder)
    problems = json.loads(text)["problems"]
    assert code == 1 and len(problems) == 2
    assert "1 tensors with NaN or infinity, first model.layers.0.mlp.experts.0.gate_proj.lora_A.weight" in problems[0]
    assert "experts.2.down_proj.lora_B.weight: expected present, found missing" in problems[1]
    edit(folder, base_model_name_or_path="gone/away")
    code, text = run("adapter", "inspect", "--json", folder)
    assert "were not compared with the model" in json.loads(text)["notes"][0]
    code, text = run("adapter", "inspect", folder)
    assert code == 1 and "problem" in text
    assert run("adapter", "inspect", tmp_path / "nothing")[0] == 2


def test_inspect_reads_fp8_and_refuses_integers(root, tmp_path):
    name = f"{PREFIX}.0.self_attn.q_proj.lora_A.weight"
    folder = convert(root, "vllm", tmp_path / "adapter")
    damaged(lambda tensors: {**tensors, name: tensors[name].to(torch.float8_e4m3fn)})(folder)
    code, text = run("adapter", "inspect", "--json", folder)
    assert code == 0 and "F8_E4M3" in json.loads(text)["dtypes"], text
    values = {"general.architecture": "qwen3moe", "general.type": "adapter", "adapter.type": "lora"}
    plan = [PlannedGguf("blk.0.attn_q.weight.lora_a", "I32", (4, 8))]
    blocks = [[torch.zeros(4 * 8 * 4, dtype=torch.uint8)]]
    write(tmp_path / "a.gguf", values | {"adapter.lora.alpha": 1.0}, plan, blocks)
    code, text = run("adapter", "inspect", tmp_path / "a.gguf")
    assert code == 2 and "expected a floating point or quantised type, found I32" in text
