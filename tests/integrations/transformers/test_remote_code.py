"""Checkpoints with code of their own: transformers' classes wherever it has them, at every door; else what is trusted.

The code beside these checkpoints fails when it is imported, as that of DeepSeek's does with transformers 5.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV2Config
from typer.testing import CliRunner

import kt_sft
from kt_sft.cli import app
from kt_sft.errors import UnsupportedModel
from kt_sft.models import auto_class
from tests.helpers import tiny_models
from tests.helpers.llamafactory_runs import drive, infer_config, train_config, workspace
from tests.helpers.tiny_tokenizer import VOCAB_SIZE

BROKEN = "from transformers.utils.import_utils import is_torch_fx_available\n"
TOKENIZER = """
from transformers import PreTrainedTokenizerFast

class OwnTokenizer(PreTrainedTokenizerFast):
    is_own = True
"""


def with_own_code(directory: Path, *, model_type: str | None = None) -> Path:
    """Add code that does not import to a checkpoint, and a tokenizer of its own that does."""
    for name in ("modeling_own", "configuration_own"):
        (directory / f"{name}.py").write_text(BROKEN)
    (directory / "tokenization_own.py").write_text(TOKENIZER)
    for name, extra in (
        ("config.json", {"auto_map": {"AutoConfig": "configuration_own.OwnConfig",
                                      "AutoModel": "modeling_own.OwnModel",
                                      "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
                                   "tokenizer_class": "OwnTokenizer"}),
    ):  # fmt: skip
        values = json.loads((directory / name).read_text()) | extra
        (directory / name).write_text(json.dumps(values | ({"model_type": model_type} if model_type else {})))
    return directory


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    work = workspace(tmp_path_factory.mktemp("own_code"), "deepseek_v2")
    shutil.copytree(work / "model", work / "plain")
    with_own_code(work / "model")
    return work


def command(*words: object) -> str:
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 0, done.output
    return done.output


def test_loading_takes_the_class_that_transformers_has(work, caplog):
    auto_class._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        found = kt_sft.load_model(work / "model", trust_remote_code=True)
    assert type(found.config) is DeepseekV2Config and not hasattr(found.config, "auto_map")
    lines = [record.getMessage() for record in caplog.records if "deepseek_v2" in record.getMessage()]
    assert len(lines) == 1 and "not" in lines[0]
    wanted = kt_sft.load_model(work / "plain")(tiny_models.token_ids()).logits
    assert torch.equal(found(tiny_models.token_ids()).logits, wanted)


def test_unknown_model_types_need_their_own_code(tmp_path):
    model = with_own_code(workspace(tmp_path, "deepseek_v2") / "model", model_type="of_nobody")
    for trusts, found in ((False, "trust"), (True, "is_torch_fx_available")):
        with pytest.raises(UnsupportedModel, match=found) as caught:
            kt_sft.load_model(model, trust_remote_code=trusts)
        assert "\n" not in str(caught.value)


def test_commands(work, tmp_path):
    model, trust = work / "model", "--trust-remote-code"
    command("convert", "--input-path", model, "--output", tmp_path / "packed", "--quant-method", "int8", trust)
    tuned = kt_sft.get_peft_model(kt_sft.load_model(model, trust_remote_code=True), _lora())
    tuned.save_pretrained(tmp_path / "adapter")
    command("adapter", "inspect", tmp_path / "adapter", "--base-model", model, trust)
    command("adapter", "convert", tmp_path / "adapter", tmp_path / "vllm", "--to", "vllm", "--base-model", model, trust)
    command("merge", "--adapter", tmp_path / "adapter", "--model", model, "--output", tmp_path / "merged", trust)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(merged.config) is DeepseekV2Config
    run = tmp_path / "run.json"
    run.write_text(json.dumps(train_config(work, "out", trust_remote_code=True)))
    plan = json.loads(command("plan", run, "--json"))
    run.write_text(json.dumps(train_config(work, "out", model_name_or_path=str(work / "plain"))))
    assert plan["memory"] == json.loads(command("plan", run, "--json"))["memory"]


def _lora():
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")


SCRIPT = """
import json, torch
from pathlib import Path
from llamafactory.train.tuner import run_exp, export_model
from llamafactory.chat import ChatModel
from llamafactory.hparams import get_train_args
from llamafactory.train.trainer_utils import create_ref_model
from kt_sft.integrations.llamafactory import chat
from llamafactory.model import load_tokenizer
train, talk, preferences, exported, qwen = given
run_exp(dict(train))
losses = [e["loss"] for e in json.loads((Path(train["output_dir"]) / "trainer_state.json").read_text())["log_history"]
          if "loss" in e]
model = ChatModel(dict(talk))
export_model({**talk, "export_dir": exported})
arguments = get_train_args(preferences)
give({
    "losses": losses, "answer": model.chat([{"role": "user", "content": "add 1 and 1"}])[0].response_length,
    "tokenizer": type(load_tokenizer(get_train_args(qwen)[0])["tokenizer"]).__name__,
    "config": type(model.engine.model.config).__module__,
    "reference": type(create_ref_model(arguments[0], arguments[3]).config).__module__,
    "backend": chat.load(dict(talk)).facts.family,
})
"""


def test_llamafactory_trains_chats_exports_and_compares(work):
    keys = {"trust_remote_code": True}
    talk = infer_config(work, adapter_name_or_path=str(work / "out"), **keys)
    preferences = train_config(work, "dpo", stage="dpo", ref_model=str(work / "model"), **keys)
    qwen = with_own_code(workspace(work / "qwen") / "model")  # of DeepSeek's tokenizers transformers 5 runs no code
    qwen = train_config(work, "out_of_qwen", model_name_or_path=str(qwen), **keys)
    train = train_config(work, "out", max_steps=2, **keys)
    found = drive(SCRIPT, train, talk, preferences, str(work / "exported"), qwen)
    assert len(found["losses"]) == 2 and found["answer"] > 0
    assert found["tokenizer"] == "OwnTokenizer"  # code of a tokenizer is wanted: most have no other
    native = "transformers.models.deepseek_v2.configuration_deepseek_v2"
    assert found["config"] == found["reference"] == native and found["backend"] == "deepseek_v2"
    config = json.loads((work / "exported" / "config.json").read_text())
    assert config["model_type"] == "deepseek_v2"
    stock = AutoModelForCausalLM.from_pretrained(work / "exported", trust_remote_code=False)
    assert stock.config.vocab_size == VOCAB_SIZE + 5
