"""The demo: its MoE checkpoints equal the dense model, its examples are valid, its verdict is honest."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

# the demo's modules import each other as scripts do
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "demo"))

import build_moe
import run_demo
from chat_answers import Question, read_questions
from tiny_moe import checkpoint, slicing
from tiny_moe.families import FAMILIES
from tiny_moe.gguf_source import SourceError, dense_reference, unpermute_rotary_rows

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
TRAIN_YAMLS = sorted((EXAMPLES / "train_lora").glob("*.yaml"))
ALL_YAMLS = sorted(EXAMPLES.glob("*/*.yaml"))
TEXT = "The capital of France is Paris, and 17 + 25 = 42. Sparse models send every token to a few of many experts."
# f32 rounding through 30 layers, logits up to 33: the order of the sums differs. Measured: 9e-5 and 7e-5.
MAX_LOGIT_DIFFERENCE = 2.5e-4


@pytest.fixture(scope="module")
def source():
    try:
        return build_moe.read_source()
    except SourceError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def dense_output(source):
    ids = source.tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        return ids, dense_reference(source.dense)(ids, labels=ids)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def moe_folder(request, source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe") / request.param
    assert build_moe.build(folder, family=request.param, dtype="float32", source=source)
    yield folder
    shutil.rmtree(folder)  # nearly 1 GB


@torch.no_grad()
def test_moe_equals_dense_model_and_uses_every_expert(moe_folder, dense_output):
    from transformers import AutoModelForCausalLM

    ids, dense = dense_output
    model = AutoModelForCausalLM.from_pretrained(moe_folder, dtype=torch.float32).eval()
    chosen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, args, output: chosen.append(output[2]))  # topk_ids [tokens, k]
    moe = model(ids, labels=ids)

    assert (moe.logits - dense.logits).abs().max() < MAX_LOGIT_DIFFERENCE
    assert moe.loss.item() == pytest.approx(dense.loss.item(), abs=1e-5)
    assert len(chosen) == len(model.model.layers)
    every_slice = torch.arange(slicing.TOP_K)
    for topk_ids in chosen:
        assert len(topk_ids.unique()) == slicing.NUM_EXPERTS  # both groups are in use
        assert ((topk_ids % slicing.TOP_K).sort(dim=-1).values == every_slice).all()  # each slice exactly once


def test_finished_checkpoint_is_not_written_again(moe_folder, source):
    marks = {file.name: file.stat().st_mtime_ns for file in moe_folder.iterdir()}
    assert not build_moe.build(moe_folder, family=moe_folder.name, dtype="float32", source=source)
    assert {file.name: file.stat().st_mtime_ns for file in moe_folder.iterdir()} == marks
    assert not checkpoint.is_complete(moe_folder, build_moe.recipe(moe_folder.name, "bfloat16"))


def test_tokenizer_reads_back_what_it_wrote(moe_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(moe_folder)
    text = "Zürich, 1234 — naïve  spaces\n\ttabs <|im_end|>"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]  # digits stand alone
    assert tokenizer.eos_token == "<|im_end|>"


def test_chat_format_is_that_of_the_training_template(source):
    from llamafactory.data.template import TEMPLATES

    ours = source.tokenizer.apply_chat_template(
        [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}],
        add_generation_prompt=True,
        return_dict=True,
    )
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    prompt, _ = TEMPLATES["smollm2"].encode_oneturn(source.tokenizer, messages, system="S")
    assert ours["input_ids"] == prompt


def test_slices_of_either_group_partition_the_ffn():
    inter = 48
    for group in (range(slicing.TOP_K), range(slicing.TOP_K, slicing.NUM_EXPERTS)):
        columns = [c for expert in group for c in range(inter)[slicing.expert_columns(expert, inter)]]
        assert sorted(columns) == list(range(inter))


def test_unpermute_inverts_the_order_of_llama_cpp():
    heads, head_dim, hidden = 3, 8, 5
    weight = torch.randn(heads * head_dim, hidden)
    permuted = weight.view(heads, 2, head_dim // 2, hidden).swapaxes(1, 2).reshape(heads * head_dim, hidden)
    assert torch.equal(unpermute_rotary_rows(permuted, heads), weight)


def test_failed_write_leaves_the_old_checkpoint(tmp_path):
    folder = tmp_path / "model"
    with checkpoint.whole_folder(folder) as aside:
        (aside / "a").write_text("old")
    with pytest.raises(OSError, match="disk full"), checkpoint.whole_folder(folder) as aside:
        (aside / "a").write_text("new")
        raise OSError("disk full")
    assert (folder / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [folder]


def test_foreign_folder_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(build_moe, "recipe", lambda family, dtype: {"family": family})
    (tmp_path / "thesis.txt").write_text("do not delete")
    with pytest.raises(SourceError, match="not written by this script"):
        build_moe.build(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def rows(name: str) -> list[dict[str, str]]:
    return json.loads((EXAMPLES / "data" / f"{name}.json").read_text(encoding="utf-8"))


def test_data_sets_are_valid_and_disjoint():
    info = json.loads((EXAMPLES / "data" / "dataset_info.json").read_text(encoding="utf-8"))
    for name, entry in info.items():
        assert (EXAMPLES / "data" / entry["file_name"]).is_file()
        for row in rows(name):
            assert row["instruction"] and row["output"] and row["input"] == ""
            assert all(isinstance(value, str) for value in row.values())
    questions = [row["instruction"] for row in rows("kt_sft_identity")]
    assert len(questions) == len(set(questions)) >= 100
    heldout = read_questions(EXAMPLES / "data" / "kt_sft_identity_heldout.json")
    assert not {question.text for question in heldout} & set(questions)
    assert sum(question.is_general for question in heldout) == 1
    for row, question in zip(rows("kt_sft_identity_heldout"), heldout, strict=True):
        assert question.is_met_by(row["output"])


def known_keys() -> set[str]:
    from llamafactory.hparams.data_args import DataArguments
    from llamafactory.hparams.finetuning_args import FinetuningArguments
    from llamafactory.hparams.generating_args import GeneratingArguments
    from llamafactory.hparams.model_args import ModelArguments
    from llamafactory.hparams.training_args import TrainingArguments

    from kt_sft.integrations.llamafactory.args import KEYS

    kinds = (ModelArguments, DataArguments, TrainingArguments, FinetuningArguments, GeneratingArguments)
    return {field.name for kind in kinds for field in dataclasses.fields(kind) if field.init} | set(KEYS)


@pytest.mark.parametrize("path", ALL_YAMLS, ids=lambda path: path.name)
def test_example_has_known_keys_only(path):
    keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(keys) <= known_keys()
    assert keys["use_kt"] is True
    assert str(path.relative_to(ROOT)) in path.read_text(encoding="utf-8")  # the header's command names this very file
    assert path.relative_to(EXAMPLES).as_posix() in (EXAMPLES / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", TRAIN_YAMLS, ids=lambda path: path.name)
def test_training_example_names_existing_data_and_template(path):
    from llamafactory.data.template import TEMPLATES

    keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    info = json.loads((ROOT / keys["dataset_dir"] / "dataset_info.json").read_text(encoding="utf-8"))
    assert keys["dataset"] in info
    assert keys["template"] in TEMPLATES
    assert keys["finetuning_type"] == "lora" and keys["lora_target"] == "all"
    assert isinstance(keys["learning_rate"], float)  # YAML reads 1e-4 as a string


IDENTITY = Question("Who are you?", "Kiti", is_general=False)
GENERAL = Question("Capital of France?", "Paris", is_general=True)


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        (["I am Tom.", "Paris."], ["I am Kiti.", "Paris."], None),
        (["I am Tom.", "Paris."], ["I am Tom.", "Paris."], "no answer changed"),
        (["I am Tom.", "Paris."], ["I am Tim.", "Paris."], "0 of 1 facts"),
        (["I am Tom.", "Paris."], ["I am Kiti.", "I am Kiti."], "general knowledge wrong after"),
        (["I am Tom.", "Rome."], ["I am Kiti.", "Paris."], "general knowledge wrong before"),
    ],
)
def test_demo_judges_its_outcome(before, after, fault):
    faults = run_demo.Outcome([IDENTITY, GENERAL], before, after).faults()
    assert faults == [] if fault is None else fault in " ".join(faults)


def test_command_names_what_differs_from_the_yaml():
    plain = ["llamafactory-cli", "train", "examples/train_lora/tiny_moe.yaml"]
    assert run_demo.Run.from_yaml("mixtral").command() == plain
    other = run_demo.Run.from_yaml("qwen3_moe", "int4")
    assert other.command()[3:] == [
        "model_name_or_path=outputs/models/tiny_moe_qwen3_moe",
        "kt_method=INT4",
        "output_dir=outputs/tiny_moe_lora_qwen3_moe_int4",
    ]


def test_failed_training_ends_the_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(run_demo, "find_llamafactory", lambda: shutil.which("false"))
    run = run_demo.Run("mixtral", "bf16", model=tmp_path, output=tmp_path, system="")
    with pytest.raises(run_demo.DemoError, match="exit status 1"):
        run_demo.train(run, run_demo.Console(quiet=True))
    assert (tmp_path / "train.log").exists()


@pytest.mark.parametrize("made", ["adapter_model.safetensors", "checkpoint-70/trainer_state.json", "notes.txt"])
def test_what_an_earlier_run_made_is_kept(tmp_path, monkeypatch, made):
    monkeypatch.setattr(run_demo, "ROOT", tmp_path)
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    (tmp_path / "outputs" / "tiny_moe_lora").mkdir(parents=True)
    earlier, failed = (tmp_path / "outputs" / name for name in ("tiny_moe_lora", "tiny_moe_lora_2"))
    assert run_demo.Run.from_yaml("mixtral").into_free_folder().output == earlier.relative_to(tmp_path)
    (earlier / made).parent.mkdir(exist_ok=True)
    (earlier / made).write_text("mine")
    failed.mkdir()
    (failed / "train.log").write_text("of a training that failed")
    run = run_demo.Run.from_yaml("mixtral").into_free_folder()
    assert run.output == failed.relative_to(tmp_path)
    assert run.command()[3:] == ["output_dir=outputs/tiny_moe_lora_2"]
    with pytest.raises(run_demo.DemoError):
        monkeypatch.setattr(run_demo, "find_llamafactory", lambda: shutil.which("false"))
        run_demo.train(run, run_demo.Console(quiet=True))
    assert (earlier / made).read_text() == "mine"
    assert [path.name for path in earlier.iterdir()] == [made.partition("/")[0]]


def test_answers_fit_into_80_columns():
    with_long_words = [Question("Why?", "mixture-of-experts-and-more", is_general=False)]
    answer = "kt_sft fine-tunes large mixture-of-experts-and-more models"
    console = run_demo.Console(width=80, file=io.StringIO())
    console.print(run_demo.answers_table(run_demo.Outcome(with_long_words, ["[b]no idea[/b]"], [answer])))
    shown = console.file.getvalue()
    assert answer in shown and "✓ mixture-of-experts-and-more" in shown and "[b]no idea[/b]" in shown


@pytest.mark.slow
def test_whole_demo_succeeds():
    output = run_demo.Run.from_yaml("mixtral").into_free_folder().output
    done = subprocess.run([sys.executable, "scripts/demo/run_demo.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "learned" in done.stdout
    assert (ROOT / output / "loss_curve.png").stat().st_size > 10_000


@pytest.mark.slow
def test_profile_accounts_for_the_whole_step(tmp_path, source):
    build_moe.build(ROOT / run_demo.Run.from_yaml("mixtral").model, source=source)
    command = [
        "scripts/demo/profile_training.py",
        "--method",
        "int8",
        "--steps",
        "2",
        "--out",
        str(tmp_path / "p.json"),
    ]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "p.json").read_text())
    shares = [
        result[name] for name in ("kernels forward", "kernels backward", "experts, rest", "optimizer", "model, rest")
    ]
    assert min(shares) > 0 and sum(shares) == pytest.approx(1.0)
    assert "median step" in done.stdout
