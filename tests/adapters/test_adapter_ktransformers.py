"""KTransformers' adapters, whose experts lie in a file of their own: the same at every door, or one clear error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import kt_sft
from kt_sft.adapters import forms
from kt_sft.cli import app
from kt_sft.errors import FormatError
from kt_sft.integrations.peft.adapter_dir import check_adapter
from kt_sft.integrations.transformers.base_model import find_base_model
from tests.helpers import adapters, parity, tiny_models
from tests.helpers import ktransformers_adapters as kt
from tests.helpers.adapters import edit, opened

BF16_LAYERS = 0.02  # rel-L2 of logits that bf16's rounding in a few layers explains; without the experts it is 0.7


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def wanted_deltas(root: Path, tensors: dict[str, Tensor], alpha: float = 4) -> dict[str, Tensor]:
    """alpha / rank * b a by experts module and projection, float64; zero projections left out."""
    found = {}
    for module in find_base_model(root / "base").specs:
        for part in kt.PARTS:
            keys = sorted(k for k in tensors if f"layers.{kt.number(module)}.experts.{part}_lora_" in k)
            if keys:
                a, b = (tensors[key].double() for key in keys)
                found[f"{module}.{part}"] = alpha / a.shape[1] * (b @ a)
    return found


def assert_experts(folder: Path, root: Path, wanted: dict[str, Tensor], *, with_zeros: bool = False) -> None:
    """Exact but for the rounding of f32 where a scale went into a factor."""
    adapter = opened(folder, root)
    found = {}
    for module in adapter.experts:
        for part, lora in adapter.read_experts(module).items():
            found[f"{module}.{part}"] = lora.scale * (lora.b.double() @ lora.a.double())
    zeros = [name for name in found if name not in wanted]
    assert not any(found[name].any() for name in zeros) and (with_zeros or not zeros)
    for name, value in wanted.items():
        assert (found[name] - value).abs().max() <= 1e-6 * value.abs().max(), name


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Root with `base` and `adapter`, and logits of stock code in float64."""
    root = tmp_path_factory.mktemp("qwen3_moe")
    _, stock = kt.make("qwen3_moe", root)
    return root, stock(tiny_models.token_ids()).logits.detach()


@pytest.fixture
def adapter(made, tmp_path):
    return shutil.copytree(made[0] / "adapter", tmp_path / "adapter")


def test_loads_computes_and_merges_as_stock_code_does(made, tmp_path):
    root, wanted = made
    ids = tiny_models.token_ids()
    model = kt_sft.load_adapter(parity.load_ours(root / "base"), root / "adapter", is_trainable=True).eval()
    assert relative(model(ids).logits, wanted) < BF16_LAYERS
    model.save_pretrained(tmp_path / "saved")
    again = kt_sft.load_adapter(parity.load_ours(root / "base"), tmp_path / "saved")
    assert torch.equal(again(ids).logits, model(ids).logits)
    result = CliRunner().invoke(app, ["merge", "--adapter", str(root / "adapter"), "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    merged = tiny_models.load_stock(tmp_path / "out", dtype=torch.float64)(ids).logits.detach()
    assert relative(merged, wanted) < BF16_LAYERS


@pytest.mark.parametrize("family", ["deepseek_v2", "gpt_oss", "jamba", "qwen3_vl_moe"])
def test_families(tmp_path, family):
    """Dense first layers, transposed and interleaved experts, experts in every second layer, another prefix."""
    _, stock = kt.make(family, tmp_path, rank=3)
    ids = tiny_models.token_ids()
    wanted = stock(ids).logits.detach()
    model = kt_sft.load_adapter(parity.load_ours(tmp_path / "base"), tmp_path / "adapter")
    assert relative(model(ids).logits, wanted) < BF16_LAYERS


@pytest.mark.parametrize("form", forms.FORMS)
def test_every_form_keeps_the_products(made, tmp_path, form):
    root, _ = made
    written = forms.convert(opened(root / "adapter", root), form, tmp_path / form)
    wanted = wanted_deltas(root, load_file(root / "adapter" / kt.NAME))
    assert_experts(written, root, wanted)
    there = opened(written, root)
    assert there.linears == opened(root / "adapter", root).linears
    check_adapter(parity.load_ours(root / "base"), written)


PREFIXES = ["model.", "base_model.model.model.", "model.language_model."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_and_types(made, adapter, prefix):
    tensors = kt.change(adapter, lambda t: {prefix + name: tensor.bfloat16() for name, tensor in t.items()})
    assert_experts(adapter, made[0], wanted_deltas(made[0], tensors))


def test_layers_and_projections_that_are_missing_are_left_alone(made, adapter, tmp_path):
    tensors = kt.change(adapter, lambda t: kt.without(t, ["layers.0.", "gate_lora", "up_lora"]))
    wanted = wanted_deltas(made[0], tensors)
    assert list(wanted) == ["model.layers.1.mlp.experts.down"]
    assert_experts(adapter, made[0], wanted)
    for form in forms.FORMS:
        written = forms.convert(opened(adapter, made[0]), form, tmp_path / form)
        assert_experts(written, made[0], wanted, with_zeros=form in ("vllm", "sglang"))


def test_scale_is_alpha_over_the_rank_of_the_tensors(made, adapter):
    """Rank 5 for gate, 2 for the others, r 2 in the config; rsLoRA there is about the Linear layers."""

    def widen(tensors):
        for name in [n for n in tensors if "gate_lora_a" in n]:
            tensors[name] = torch.randn(tensors[name].shape[0], 5, tensors[name].shape[2])
            other = name.replace("lora_a", "lora_b")
            tensors[other] = torch.randn(*tensors[other].shape[:2], 5)
        return tensors

    tensors = kt.change(adapter, widen)
    edit(adapter, use_rslora=True)
    assert_experts(adapter, made[0], wanted_deltas(made[0], tensors))


def take_attention_out(adapter, change):
    """The PEFT file absent, without a tensor, or as a pickle."""
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    if change == "empty":
        save_file({}, file)
    if change == "pickle":
        torch.save(tensors, adapter / "adapter_model.bin")


@pytest.mark.parametrize("change", ["absent", "empty", "pickle"])
def test_peft_file_without_attention(made, adapter, change):
    take_attention_out(adapter, change)
    if change != "pickle":
        edit(adapter, target_modules=["gate_proj", "up_proj", "down_proj"])  # of the experts
    assert_experts(adapter, made[0], wanted_deltas(made[0], load_file(adapter / kt.NAME)))
    assert bool(opened(adapter, made[0]).linears) == (change == "pickle")
    check_adapter(parity.load_ours(made[0] / "base"), adapter)


@pytest.mark.parametrize("change", ["absent", "empty"])
def test_attention_that_the_config_names_is_not_left_out(made, adapter, change):
    take_attention_out(adapter, change)
    for door in (lambda: opened(adapter, made[0]), lambda: check_adapter(parity.load_ours(made[0] / "base"), adapter)):
        with pytest.raises(FormatError, match="q_proj.lora_A.weight: expected present, found missing"):
            door()


FIRST = "layers.0.experts.gate_lora_a"
FAULTS = [
    (lambda t: {**t, "layers.0.experts.gate_lora_c": t[FIRST]}, "gate_lora_c: expected layers.<number>.experts"),
    (lambda t: {**t, "layers.7.experts.gate_lora_a": t[FIRST]}, "expected routed experts in layer 7, found none there"),
    (
        lambda t: {**t, f"model.{FIRST}": t[FIRST]},
        "expected one such factor of model.layers.0.mlp.experts, found layers.0",
    ),
    (lambda t: kt.without(t, ["0.experts.up_lora_b"]), "0.experts.up_lora_b: expected present, found missing"),
    (lambda t: {**t, FIRST: t[FIRST][:5]}, r"gate_lora_a: expected \[7, 2, 48\], found \[5, 2, 48\]"),
    (lambda t: {**t, FIRST: t[FIRST].mT}, r"gate_lora_a: expected \[7, 48, 48\], found \[7, 48, 2\]"),
    (lambda t: {**t, FIRST: t[FIRST][:, :1]}, r"gate_lora_b: expected \[7, 20, 1\], found \[7, 20, 2\]"),
    (lambda t: {**t, FIRST: t[FIRST][0]}, r"gate_lora_a: expected \[7, rank, 48\], found \[2, 48\]"),
]


@pytest.mark.parametrize(("change", "match"), FAULTS)
def test_what_does_not_fit_is_named(made, adapter, change, match):
    kt.change(adapter, change)
    with pytest.raises(FormatError, match=match) as caught:
        opened(adapter, made[0])
    assert kt.NAME in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(FormatError, match=match):
        kt_sft.load_adapter(parity.load_ours(made[0] / "base"), adapter)


def test_experts_in_both_files(made, adapter):
    name = "base_model.model.model.layers.0.mlp.experts.0.gate_proj.lora_{}.weight"
    more = {name.format("A"): torch.ones(2, 48), name.format("B"): torch.ones(20, 2)}
    adapters.damaged(lambda tensors: {**tensors, **more})(adapter)
    with pytest.raises(FormatError, match="expected LoRA of routed experts in one of .* found in both"):
        opened(adapter, made[0])


def test_contradictions(made, adapter):
    root = made[0]
    size = (adapter / kt.NAME).stat().st_size
    kt.manifest(adapter, status="ready", lora={"rank": 2, "alpha": 4.0}, artifacts={kt.NAME: {"size": size}})
    assert opened(adapter, root).scales["model.layers.0.mlp.experts.up"] == 2.0
    cases = [
        ({"lora": {"rank": 3, "alpha": 4}}, "rank: expected 3, as kt_adapter_manifest.json says, found 2"),
        ({"lora": {"rank": 2, "alpha": 5}}, "alpha: expected 4, as lora_alpha .*, found 5"),
        ({"status": "writing"}, "status: expected ready, found 'writing'"),
        ({"artifacts": {kt.NAME: {"size": size + 1}}}, "size in kt_adapter_manifest.json: expected"),
    ]
    for values, match in cases:
        kt.manifest(adapter, **values)
        with pytest.raises(FormatError, match=match):
            opened(adapter, root)
    (adapter / "kt_adapter_manifest.json").unlink()
    edit(adapter, alpha_pattern={"experts": 7})
    with pytest.raises(FormatError, match="alpha_pattern: expected nothing about routed experts"):
        opened(adapter, root)


def test_two_experts_modules_in_a_layer(tmp_path):
    """ERNIE with eyes has text and vision experts of different sizes: the shape says which are meant."""
    tiny_models.build("ernie4_5_vl_moe", tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["gate_proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(values))
    base = find_base_model(tmp_path / "base")
    text = next(name for name in base.specs if "text_moe" in name)
    out, into = base.expert_shape(text, "gate")
    num_experts, stem = base.specs[text].num_experts, f"layers.{kt.number(text)}.experts.gate_lora_"
    pair = {f"{stem}a": torch.ones(num_experts, 2, into), f"{stem}b": torch.ones(num_experts, out, 2)}
    save_file(pair, tmp_path / "adapter" / kt.NAME)
    assert opened(tmp_path / "adapter", tmp_path).projections(text) == ("gate",)
    vision = next(name for name in base.specs if "vision_moe" in name)
    down, into = base.expert_shape(vision, "gate")
    assert (down, into) != (out, into) and kt.number(vision) == kt.number(text)
    pair[f"{stem}b"] = torch.ones(num_experts, out + 1, 2)
    save_file(pair, tmp_path / "adapter" / kt.NAME)
    with pytest.raises(FormatError, match="expected routed experts in layer 1, found .*text_moe.* and .*vision_moe"):
        opened(tmp_path / "adapter", tmp_path)
    named = {key.replace("experts", "mlp.vision_moe.experts"): tensor for key, tensor in pair.items()}
    named = {key: tensor[:, :down] if key.endswith("b") else tensor for key, tensor in named.items()}
    save_file({key: tensor.contiguous() for key, tensor in named.items()}, tmp_path / "adapter" / kt.NAME)
    assert opened(tmp_path / "adapter", tmp_path).experts == [vision]


def test_inspect_and_numbers_that_are_none(made, adapter, tmp_path):
    run = CliRunner().invoke(app, ["adapter", "inspect", "--json", str(adapter)])
    report = json.loads(run.output)
    assert run.exit_code == 0 and report["form"] == "ktransformers" and report["layers"] == 2
    wanted = wanted_deltas(made[0], load_file(adapter / kt.NAME))
    largest = max(value.norm(dim=(-2, -1)).max() for name, value in wanted.items() if name.endswith(".down"))
    targets = {target["name"]: target for target in report["targets"]}
    assert targets["experts.down"]["max_norm"] == pytest.approx(float(largest), rel=1e-5)

    def spoil(tensors):
        tensors["layers.1.experts.up_lora_b"][3, 2, 1] = float("inf")
        return tensors

    kt.change(adapter, spoil)
    run = CliRunner().invoke(app, ["adapter", "inspect", "--json", str(adapter)])
    assert run.exit_code == 1 and "layers.1.experts.up_lora_b" in json.loads(run.output)["problems"][0]
    for words in (
        ["adapter", "convert", "--to", "vllm", str(adapter)],
        ["merge", "--adapter", str(adapter), "--output"],
    ):
        run = CliRunner().invoke(app, [*words, str(tmp_path / "out")])
        assert run.exit_code == 2 and "layers.1.experts.up_lora_b: expected finite" in run.output.replace("\n", " ")
        assert not (tmp_path / "out").exists()
