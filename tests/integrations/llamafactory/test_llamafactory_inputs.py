"""Data sets, templates, precision and files that a run names: one line before a model is loaded or data is read."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from tests.helpers.llamafactory_runs import cli, drive, environment, infer_config, train_config, workspace

SCRIPT = """
import logging, torch
from types import SimpleNamespace
from llamafactory.hparams import get_train_args, get_infer_args
from llamafactory.data import loader
from llamafactory.data.template import TEMPLATES
from kt_sft.integrations.llamafactory.data_checks import misfit
from kt_sft.errors import KTError
answers = []
for kind, config in given[0]:
    try:
        groups = (get_infer_args if kind == "chat" else get_train_args)(config)
        if kind.startswith("data "):
            loader._get_merged_dataset(groups[1].dataset, *groups[:3], kind.removeprefix("data "))
        answers.append(None)
    except KTError as error:
        answers.append(str(error))
fits = {}
for name, text, vocabulary, eos in given[1]:
    for template in ("qwen", "llama3", "default", "gemma", "chatml", "deepseek3", "mistral", "llama2", "gpt_oss"):
        tokenizer = SimpleNamespace(chat_template=text, get_vocab=lambda v=vocabulary: dict.fromkeys(v, 0),
                                    eos_token=eos, bos_token=None, pad_token=None, unk_token=None)
        fits[f"{name} {template}"] = misfit(template, TEMPLATES[template], tokenizer)
give([answers, fits])
"""
TOKENIZERS = [
    ("qwen", "<|im_start|>user {{x}}<|im_end|>", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], "<|im_end|>"),
    ("llama3", "<|start_header_id|>user<|end_header_id|> <|eot_id|>",
     ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"], "<|eot_id|>"),
    ("gemma", "<start_of_turn>user <end_of_turn>", ["<start_of_turn>", "<end_of_turn>"], "<eos>"),
    ("deepseek3", "<｜User｜>{{x}}<｜Assistant｜>", ["<｜User｜>", "<｜Assistant｜>"], "<｜end▁of▁sentence｜>"),
    ("bare", None, ["a"], "<eos>"),
    ("words", "[INST] {{x}} [/INST]", ["a"], "</s>"),
]  # fmt: skip


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    work = workspace(tmp_path_factory.mktemp("inputs"))
    data = work / "data"
    rows = [{"instruction": "a", "input": "b", "output": "c"}]
    files = {
        "sums.json": json.dumps(rows), "broken.json": "[{]", "empty.json": "[]", "data.xml": "<a/>",
        "other.json": json.dumps([{"question": "a", "answer": "b"}]),
        "late.jsonl": '{"instruction": "a", "input": ""}\n{"instruction": "a", "output": "c"}\n',
        "pairs.json": json.dumps([{"instruction": "a", "input": "", "chosen": "b", "rejected": "c"}]),
    }  # fmt: skip
    for name, text in files.items():
        (data / name).write_text(text)
    named = {name.partition(".")[0]: {"file_name": name} for name in files}
    named["pairs"] |= {"ranking": True,
                       "columns": {"prompt": "instruction", "query": "input", "chosen": "chosen",
                                   "rejected": "rejected"}}  # fmt: skip
    named["mapped"] = {"file_name": "other.json", "columns": {"prompt": "question", "response": "answer"}}
    named["gone"] = {"file_name": "gone.json"}
    named["hub"] = {"hf_hub_url": "some/name"}
    (data / "dataset_info.json").write_text(json.dumps(named))

    def run(**keys):
        return "train", train_config(work, "out", **keys)

    cases = {
        **{f"fine {name}": run(dataset=name) for name in ("sums", "late", "mapped", "hub", "sums,mapped")},
        "fine pairs": ("data rm", run(dataset="pairs", stage="dpo")[1]),
        "fine singles": ("data sft", run()[1]),
        "fine parsing": run(stage="dpo"),
        "fine eval": run(eval_dataset="sums"),
        "fine chat": ("chat", infer_config(work)),
        **{name: run(dataset=name) for name in ("sumz", "gone", "broken", "empty", "data", "other")},
        "eval": run(eval_dataset="sumz"),
        "pairs": ("data sft", run(dataset="pairs")[1]),
        "singles": ("data rm", run(stage="dpo")[1]),
        "no_dir": run(dataset_dir=str(work / "nowhere")),
        "template": run(template="chatlm"),
        "template_chat": ("chat", infer_config(work, template="of_nobody")),
        "bf16": run(use_cpu=None),
        "fp16": run(bf16=None, fp16=True),
        "pure": run(bf16=None, pure_bf16=True),
        "deepspeed": run(deepspeed=str(work / "nowhere.json")),
        "choice": run(lr_scheduler_type="cosinus"),
        "no_dataset": run(dataset=None),
    }
    found, fits = drive(SCRIPT, list(cases.values()), TOKENIZERS)
    return dict(zip(cases, found, strict=True)), fits


def test_what_is_there_passes(answers):
    assert {case: found for case, found in answers[0].items() if case.startswith("fine") and found} == {}


@pytest.mark.parametrize(("case", "words"), [
    ("sumz", ["dataset: sumz", "'sums'", "dataset_info.json"]),
    ("gone", ["dataset: gone", "gone.json", "file_name"]),
    ("broken", ["broken.json", "JSON"]),
    ("empty", ["empty.json", "none"]),
    ("data", ["data.xml", "json"]),
    ("other", ["other.json", "instruction", "question", "columns"]),
    ("eval", ["eval_dataset: sumz"]),
    ("pairs", ["dataset: pairs.json", "pairs of a chosen", "ranking"]),
    ("singles", ["dataset: sums.json", "single answers", "ranking"]),
    ("no_dir", ["dataset_dir", "nowhere", "No such file"]),
    ("template", ["template: chatlm", "did you mean 'chat"]),
    ("template_chat", ["template: of_nobody", "known: "]),
    ("bf16", ["bf16", "use_cpu: true"]),
    ("fp16", ["fp16", "bf16: true"]),
    ("pure", ["pure_bf16", "bf16: true"]),
    ("deepspeed", ["deepspeed", "nowhere.json", "No such file"]),
    ("choice", ["cosinus"]),
    ("no_dataset", ["specify dataset"]),
])  # fmt: skip
def test_refusal_is_one_line(answers, case, words):
    found = answers[0][case]
    assert found and "\n" not in found and all(word in found for word in words), found


def test_a_template_of_another_family_is_named(answers):
    fitting = {"qwen qwen", "qwen chatml", "llama3 llama3", "gemma gemma", "deepseek3 deepseek3"}
    for case, fault in answers[1].items():
        has_no_marks = case.split()[0] in ("bare", "words")
        assert (fault is None) == (case in fitting or has_no_marks), (case, fault)
    assert "<|im_start|>" in answers[1]["llama3 qwen"] and "<|start_header_id|>" in answers[1]["llama3 qwen"]


def test_a_missing_configuration_file_is_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "llamafactory.cli", "train", str(tmp_path / "missing.yaml")],
        capture_output=True, text=True, env=environment(), timeout=300,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr and "missing.yaml" in done.stderr


def test_a_misfit_is_said_in_training(tmp_path):
    work = workspace(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    tokenizer.add_tokens(["[INST]"], special_tokens=True)
    tokenizer.chat_template = "[INST] {{ messages[0]['content'] }}"
    tokenizer.save_pretrained(work / "model")
    done = cli("train", train_config(work, "out", max_steps=1), work)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("kt_sft: template: chatml")]
    assert len(lines) == 1 and "[INST]" in lines[0]
