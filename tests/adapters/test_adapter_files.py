"""What lies in an adapter directory is read or named; numbers are numbers; experts may be left out; names are found."""

from __future__ import annotations

import json
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import kt_sft
from kt_sft.adapters import forms
from kt_sft.adapters.folder import local_adapter
from kt_sft.cli import app
from kt_sft.errors import ConfigError, FormatError
from kt_sft.integrations.merge.inspecting import open_with_base
from kt_sft.integrations.peft.adapter_dir import check_adapter, in_running_form
from kt_sft.integrations.transformers.base_model import describe
from tests.helpers import adapters, parity, tiny_models
from tests.helpers.adapters import convert, damaged, edit, opened


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Directory with `base` and `adapter`."""
    root = tmp_path_factory.mktemp("qwen3_moe")
    adapters.make("qwen3_moe", root)
    return root


@pytest.fixture(scope="module")
def model(root):
    return parity.load_ours(root / "base")


@pytest.fixture
def adapter(root, tmp_path):
    return shutil.copytree(root / "adapter", tmp_path / "adapter")


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, " ".join(result.output.split())


UNREAD = [
    "lora_experts.safetensors", "adapter_model-00001-of-00002.safetensors", "experts.bin", "moe_lora.pt", "more.pth",
    "extra.GGUF", "vectors.npz", "adapter_model.bin", "model.safetensors", "x.ckpt",
]  # fmt: skip


@pytest.mark.parametrize("name", UNREAD)
def test_tensors_that_nobody_reads_are_named(root, model, adapter, tmp_path, name):
    (adapter / name).write_bytes(b"x")
    for door in (lambda: opened(adapter, root), lambda: check_adapter(model, adapter)):
        with pytest.raises(FormatError, match=re.escape(name)) as caught:
            door()
        assert "\n" not in str(caught.value)
    with pytest.raises(FormatError, match=re.escape(name)):
        kt_sft.load_adapter(model, adapter)
    for words in (
        ["adapter", "inspect"],
        ["adapter", "convert", "--to", "vllm"],
        ["merge", "--output", tmp_path / "o"],
    ):
        last = [adapter] if words[1] == "inspect" else [adapter, tmp_path / "o"]
        code, text = run(*words, *(last if words[0] == "adapter" else ["--adapter", adapter]))
        assert code == 2 and name in text, text
    assert not (tmp_path / "o").exists()


def test_gguf_beside_other_tensors(root, tmp_path):
    file = convert(root, "gguf", tmp_path / "folder")
    assert forms.adapter_file(file.parent) == file
    (file.parent / "fused_expert_lora.safetensors").write_bytes(b"x")
    with pytest.raises(FormatError, match="fused_expert_lora.safetensors, which nothing here reads"):
        forms.adapter_file(file.parent)
    assert opened(file, root).form == "gguf"


STATE = [
    "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_3.pth",
    "training_args.bin", "optimizer_rank_0.pt",
    "random_states_0.pkl", "pytorch_model_fsdp.bin", "trainer_state.json", "tokenizer.model",
]  # fmt: skip


def test_what_training_leaves_beside_an_adapter_is_fine(root, model, adapter, caplog):
    for name in STATE:
        (adapter / name).write_bytes(b"x")
    for name in ("global_step4/mp_rank_00_model_states.pt", "checkpoint-4/adapter_model.safetensors"):
        (adapter / name).parent.mkdir()
        (adapter / name).write_bytes(b"x")
    assert opened(adapter, root).form == "peft-0.18"
    check_adapter(model, adapter)
    assert not caplog.records
    (adapter / "value_head.safetensors").write_bytes(b"x")
    for _ in range(2):  # as a run does it
        opened(adapter, root)
    assert ["value_head.safetensors is not read" in record.getMessage() for record in caplog.records] == [True]
    code, text = run("adapter", "inspect", adapter)
    assert code == 0 and "value_head.safetensors is not read" in text


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("form", forms.FORMS)
def test_numbers_that_are_none_are_refused_by_name(root, model, tmp_path, form, value):
    folder = convert(root, form, tmp_path / "adapter")
    if form == "gguf":
        raw = bytearray(folder.read_bytes())
        raw[-4:] = torch.tensor([value]).numpy().tobytes()  # the last tensor's last number
        folder.write_bytes(raw)
        name = ".lora_b"
    else:
        tensors = load_file(folder / "adapter_model.safetensors")
        name = next(key for key in tensors if ".experts." in key)
        tensors[name][1, 1] = value
        save_file(tensors, folder / "adapter_model.safetensors")
    for words in (["adapter", "convert", "--to", "peft-0.19", "--base-model", root / "base", folder, tmp_path / "o"],
                  ["merge", "--model", root / "base", "--adapter", folder, "--output", tmp_path / "o"]):  # fmt: skip
        code, text = run(*words)
        assert code == 2 and name in text and "expected finite numbers, found NaN or infinity" in text, text
    assert not (tmp_path / "o").exists()
    with pytest.raises(FormatError, match=re.escape(name)):
        kt_sft.load_adapter(model, folder, is_trainable=True)
    opened_headers = forms.open_adapter(folder, describe(model), reads_headers_only=True)
    assert opened_headers.experts


@pytest.mark.parametrize("form", ["peft-0.18", "peft-0.19"])
def test_dropout_goes_beside_target_parameters(root, tmp_path, form):
    folder = convert(root, "vllm", tmp_path / "per_expert")
    edit(folder, lora_dropout=0.05)
    written = forms.convert(opened(folder, root), form, tmp_path / "back")
    assert json.loads((written / "adapter_config.json").read_text())["lora_dropout"] == 0.0
    assert json.loads((written / "kt_sft.json").read_text())["lora_dropout"] == 0.05
    if form == "peft-0.18":
        PeftModel.from_pretrained(tiny_models.load_stock(root / "base"), str(written))
    for source in (folder, written):
        loaded = kt_sft.load_adapter(parity.load_ours(root / "base"), source, is_trainable=True)
        assert loaded.peft_config["default"].adapter_dropout == 0.05
    again = forms.convert(opened(written, root), "vllm", tmp_path / "again")
    assert json.loads((again / "adapter_config.json").read_text())["lora_dropout"] == 0.05


def test_dropout_of_an_adapter_without_experts_stays(tmp_path):
    adapters.make("qwen3_moe", tmp_path, targets=["q_proj"])
    edit(tmp_path / "adapter", lora_dropout=0.1)
    written = forms.convert(opened(tmp_path / "adapter", tmp_path), "peft-0.18", tmp_path / "out")
    assert json.loads((written / "adapter_config.json").read_text())["lora_dropout"] == 0.1


@pytest.mark.parametrize("parameters", [["gate_up_proj"], ["down_proj"], ["gate_up_proj", "down_proj"]])
def test_fused_experts_that_the_config_does_not_name(tmp_path, parameters):
    """As trainers of their own write them; on one layer of the two."""
    targets = [f"model.layers.1.mlp.experts.{parameter}" for parameter in parameters]
    adapters.make("qwen3_moe", tmp_path, targets=[*targets, "q_proj"])
    wanted = adapters.peft_deltas(tmp_path)
    edit(tmp_path / "adapter", target_parameters=None)
    adapters.assert_same(adapters.deltas(opened(tmp_path / "adapter", tmp_path)), wanted)


def test_hub_adapters_bring_all_their_tensors(adapter, tmp_path, monkeypatch):
    """What is read is downloaded; of the rest the names are enough to say that it is not."""
    import huggingface_hub

    names = ["adapter_config.json", "adapter_model.safetensors", "kt_sft.json", "fused_expert_lora.safetensors"]
    asked = {}

    def snapshot_download(name, *, allow_patterns, **_):
        asked[name] = [n for n in names if any(fnmatch(n, pattern) for pattern in allow_patterns)]
        return str(adapter)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: names)
    assert local_adapter("someone/adapter") == adapter and asked["someone/adapter"] == names
    names.append("more.safetensors")
    names.append("checkpoint-2/else.safetensors")
    with pytest.raises(FormatError, match="found more.safetensors, which nothing here reads"):
        local_adapter("someone/adapter")


class Expert(nn.Module):
    """One expert as transformers 4 has it, so that PEFT can wrap its matrices one by one."""

    def __init__(self, gate_up, down):
        super().__init__()
        gate, up = gate_up.chunk(2)
        for name, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
            linear.weight.data.copy_(weight)
            setattr(self, name, linear)


def per_expert_adapter(root: Path, folder: Path, targets: str, **patterns) -> dict[str, torch.Tensor]:
    """Saved by stock PEFT of a model with a module per expert; and what it adds to each matrix, float64."""
    stock = tiny_models.load_stock(root / "base", dtype=torch.float64)
    for name, module in list(stock.named_modules()):
        if name.endswith("mlp.experts"):
            experts = nn.ModuleList(map(Expert, module.gate_up_proj.detach(), module.down_proj.detach()))
            stock.get_submodule(name.removesuffix(".experts")).experts = experts
    config = LoraConfig(r=3, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM", lora_dropout=0.1, **patterns)
    model = parity.fill_lora(get_peft_model(stock, config))
    model.save_pretrained(folder)
    edit(folder, base_model_name_or_path=str(root / "base"))
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


SUBSETS = {
    "experts": r".*layers\.\d\.mlp\.experts\.[025]\.(gate|up|down)_proj",
    "a layer": r".*layers\.1\.mlp\.experts\.\d\.(gate|up|down)_proj",
    "projections": r".*experts\.([01]\.gate|[2-6]\.down)_proj|.*q_proj",
}
PATTERNS = {
    "rank_pattern": {r"experts\.2\.gate_proj": 5, "down_proj": 2, r"layers\.1\.mlp\.experts\.0\.up_proj": 1},
    "alpha_pattern": {r"experts\.5\.(gate|down)_proj": 9, r"experts\.0\.up_proj": 2},
}


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("patterns", [{}, PATTERNS, {**PATTERNS, "use_rslora": True}])
def test_subsets_of_experts_and_ranks_of_their_own(root, tmp_path, subset, patterns):
    """Against PEFT's own product of every expert; experts that it left alone get zeros."""
    truth = per_expert_adapter(root, tmp_path / "a", SUBSETS[subset], **patterns)
    base = opened(root / "adapter", root).base
    sources = [tmp_path / "a"]
    sources += [forms.convert(opened(tmp_path / "a", root), form, tmp_path / form) for form in forms.FORMS]
    for source in sources:
        there, used = opened(source, root), set()
        for module in there.experts:
            for part, lora in there.read_experts(module).items():
                products = lora.scale * (lora.b.double() @ lora.a.double())
                for expert in range(base.specs[module].num_experts):
                    name = f"{module}.{expert}.{part}_proj"
                    wanted = truth.get(name, torch.zeros_like(products[expert]))
                    used.add(name)
                    assert (products[expert] - wanted).abs().max() <= 1e-6 * max(1, wanted.abs().max()), (source, name)
        assert used >= {name for name in truth if ".experts." in name}


def test_loaded_subset_computes_as_stock_code(root, model, tmp_path):
    truth = per_expert_adapter(root, tmp_path / "a", SUBSETS["experts"], **PATTERNS)
    stock = tiny_models.load_stock(root / "base", dtype=torch.float64)
    for name, delta in truth.items():
        path, expert, child = name.rsplit(".", 2)
        experts, inter = stock.get_submodule(path), stock.get_submodule(path).down_proj.shape[2]
        rows = {"gate_proj": slice(0, inter), "up_proj": slice(inter, None)}.get(child)
        matrix = experts.down_proj[int(expert)] if rows is None else experts.gate_up_proj[int(expert), rows]
        matrix.data += delta
    ids = tiny_models.token_ids()
    wanted = stock(ids).logits
    loaded = kt_sft.load_adapter(parity.load_ours(root / "base"), tmp_path / "a")
    assert (loaded(ids).logits.double() - wanted).norm() < 0.02 * wanted.norm()


def test_rank_that_the_config_does_not_say(root, tmp_path):
    per_expert_adapter(root, tmp_path / "a", SUBSETS["experts"], rank_pattern={r"experts\.2\.gate_proj": 5})
    edit(tmp_path / "a", rank_pattern={})
    with pytest.raises(
        FormatError, match=r"experts\.2\.gate_proj\.lora_A\.weight: expected \[3, 48\], found \[5, 48\]"
    ):
        opened(tmp_path / "a", root)


@pytest.mark.parametrize("name", ["models/m", "./models/m", "../m"])
def test_base_model_is_found_outside_of_the_training_directory(root, tmp_path, monkeypatch, name):
    place = tmp_path / "models" / "m" if "models" in name else tmp_path / "saves" / "m"
    shutil.copytree(root / "base", place)
    folder = shutil.copytree(root / "adapter", tmp_path / "saves" / "run" / "adapter")
    edit(folder, base_model_name_or_path=name)
    monkeypatch.chdir("/")
    code, text = run("adapter", "inspect", "--json", folder)
    assert code == 0 and json.loads(text)["layers"] == 2 and not json.loads(text)["notes"]
    assert Path(open_with_base(folder).base.path).samefile(place)
    edit(folder, base_model_name_or_path="no/such/model")
    code, text = run("adapter", "inspect", "--json", folder)
    note = json.loads(text)["notes"][0]
    assert code == 0 and "no/such/model" in note and "looked for in /, in the directories above the adapter" in note
    with pytest.raises(
        ConfigError, match="no/such/model: .* above the adapter, and on the hub; name its directory with"
    ):
        open_with_base(folder)


@pytest.mark.parametrize("form", ["peft-0.18", "peft-0.19", "vllm", "gguf"])
def test_a_model_that_carries_an_adapter_is_checked_below_it(root, tmp_path, form):
    """As resuming does, which reads a checkpoint into a model that PEFT has wrapped."""
    source = convert(root, form, tmp_path / "a")
    bare = parity.load_ours(root / "base")
    plain = describe(bare)
    wrapped = kt_sft.load_adapter(bare, root / "adapter", is_trainable=True)
    for model in (wrapped, wrapped.get_base_model()):
        found = describe(model)
        assert (found.linears, found.specs, found.hub_names) == (plain.linears, plain.specs, plain.hub_names)
        experts = ("experts.gate_up_proj", "experts.down_proj")  # hidden once LoRA is bound
        assert found.parameters == {n: s for n, s in plain.parameters.items() if not n.endswith(experts)}
        check_adapter(model, source)
        with in_running_form(model, source) as folder:
            before, after = (load_file(d / "adapter_model.safetensors") for d in (root / "adapter", folder))
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    if form != "gguf":
        damaged(lambda t: {n: v for n, v in t.items() if "layers.1.self_attn.q_proj.lora_B" not in n})(source)
        with pytest.raises(FormatError, match=r"q_proj\.lora_B\.weight"):
            check_adapter(wrapped, source)
