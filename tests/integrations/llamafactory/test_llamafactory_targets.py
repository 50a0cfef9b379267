"""`lora_target` and the canary inside LLaMA-Factory: one process, several short runs."""

from __future__ import annotations

import pytest

from tests.helpers import families, tiny_models
from tests.helpers import llamafactory_runs as runs
from tests.helpers.tiny_tokenizer import VOCAB_SIZE, save_tiny_tokenizer

SCRIPT = """
import logging
from llamafactory.hparams import get_train_args
from llamafactory.train.tuner import run_exp
from kt_sft.integrations.peft import coverage, injecting

class Lines(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())

logging.getLogger("kt_sft").addHandler(Lines())
counts = []
stock = coverage.log
def log(model, what):
    stock(model, what)
    counts.append({kind: [c.trained, c.present] for kind, c in coverage.count(model).items()})
coverage.log = log
answers = {}
for name, config in given[0].items():
    lines, error = [], None
    counts.clear()
    try:
        get_train_args(dict(config)) if name.startswith("parse") else run_exp(dict(config))
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    answers[name] = {"lines": lines, "error": error, "counts": counts[0] if counts else None}
give(answers)
"""


def build(work, family, **overrides):
    model = tiny_models.build(family, work / family, **overrides)
    save_tiny_tokenizer(model)
    return str(model)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    work = runs.workspace(tmp_path_factory.mktemp("targets"))
    text = {**families.FAMILIES["ernie4_5_vl_moe"].values["text_config"], "vocab_size": VOCAB_SIZE + 5}
    ernie = build(work, "ernie4_5_vl_moe", text_config=text)
    text = {**families.FAMILIES["qwen3_vl_moe"].values["text_config"], "vocab_size": VOCAB_SIZE + 5}
    qwen = build(work, "qwen3_vl_moe", text_config=text)

    def config(name, **changes):
        return runs.train_config(work, name, max_steps=1, save_strategy="no", **changes)

    configs = {
        "all and the head": config("a", lora_target="all,lm_head"),
        "plain": config("b", lora_target="q_proj"),
        "ernie": config("c", model_name_or_path=ernie),
        "vision": config("d", model_name_or_path=qwen, lora_target="q_proj,down_proj,qkv"),
        "vision all and the head": config("e", model_name_or_path=qwen, lora_target="all,lm_head"),
        "frozen language": config(
            "f", model_name_or_path=qwen, freeze_language_model=True, freeze_vision_tower=False, lora_target="all"
        ),
        "parse typo": config("g", lora_target="q_proj,expert", additional_target="lm_haed"),
        "parse router": config("h", lora_target="q_proj,gate"),
        "parse vision typo": config("i", model_name_or_path=qwen, lora_target="q_proj,k_prj"),
    }
    return runs.drive(SCRIPT, configs)


def test_all_beside_the_head_is_both(answers):
    answer = answers["all and the head"]
    assert answer["error"] is None
    assert {k: answer["counts"][k] for k in ("attention", "routed experts", "head")} == {
        "attention": [8, 8],
        "routed experts": [4, 4],
        "head": [1, 1],
    }
    assert answers["plain"]["counts"]["routed experts"] == [0, 4]


@pytest.mark.parametrize("name", ["all and the head", "plain", "ernie", "vision"])
def test_every_run_says_once_what_trains_and_has_the_canary(answers, name):
    lines = answers[name]["lines"]
    assert answers[name]["error"] is None
    assert sum(line.startswith("LoRA asked for") for line in lines) == 1
    assert sum(line.startswith("canary: step 1 changed all") for line in lines) == 1


def test_names_of_all_that_modules_without_lora_bear_are_left_out_and_said(answers):
    (line,) = (line for line in answers["ernie"]["lines"] if line.startswith("lora_target all: left out"))
    assert " mlp;" in line
    counts = answers["ernie"]["counts"]
    assert counts["routed experts"][0] == counts["routed experts"][1] > 0


def test_on_vision_models_experts_are_reached_and_frozen_parts_said(answers):
    counts = answers["vision"]["counts"]
    assert counts["routed experts"][0] * 2 == counts["routed experts"][1]
    assert counts["attention"][0] * 4 == counts["attention"][1]
    assert counts["other"][0] == 0
    assert any(line.startswith("lora_target: qkv: in parts that freeze_* keys") for line in answers["vision"]["lines"])
    counts = answers["vision all and the head"]["counts"]
    assert counts["head"] == [1, 1]
    assert counts["routed experts"][0] == counts["routed experts"][1]
    assert counts["other"][0] == 0


def test_a_frozen_language_model_keeps_its_experts_frozen(answers):
    counts = answers["frozen language"]["counts"]
    assert counts["routed experts"][0] == counts["attention"][0] == 0
    assert counts["other"][0] > 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "parse typo",
            ["'expert' names no layer", "did you mean 'experts'", "additional_target: 'lm_haed'", "mean 'lm_head'"],
        ),
        ("parse router", ["'gate' names model.layers.0.mlp.gate, whose Qwen3MoeTopKRouter LoRA cannot wrap"]),
        ("parse vision typo", ["'k_prj' names no layer of the model; did you mean 'k_proj'"]),
    ],
)
def test_a_target_that_cannot_be_is_refused_when_parsed(answers, name, words):
    error = answers[name]["error"]
    assert error.startswith("ConfigError: ") and "\n" not in error
    assert all(word in error for word in words), error
    assert "lora_target: " in error and "target_modules" not in error and "target_parameters" not in error
