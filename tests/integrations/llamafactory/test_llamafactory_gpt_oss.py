"""gpt-oss through LLaMA-Factory, which asks for a GPU kernel by a function that transformers 5.6 lacks."""

from __future__ import annotations

from tests.helpers import tiny_models
from tests.helpers.llamafactory_runs import drive, infer_config, train_config, workspace
from tests.helpers.tiny_tokenizer import VOCAB_SIZE, save_tiny_tokenizer

SCRIPT = """
import json, logging
from pathlib import Path
from llamafactory.train.tuner import run_exp
from llamafactory.chat import ChatModel
lines = []
class Kept(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())
logging.getLogger("kt_sft").addHandler(Kept())
train, talk = given
run_exp(train)
log = json.loads((Path(train["output_dir"]) / "trainer_state.json").read_text())["log_history"]
model = ChatModel(talk)
give({"losses": [entry["loss"] for entry in log if "loss" in entry], "lines": lines,
      "attention": model.engine.model.config._attn_implementation,
      "length": model.chat([{"role": "user", "content": "add 1 and 1"}])[0].response_length})
"""


def test_trains_and_chats(tmp_path):
    work = workspace(tmp_path)
    model = tiny_models.build("gpt_oss", work / "oss", vocab_size=VOCAB_SIZE + 5)
    save_tiny_tokenizer(model)
    keys = {"model_name_or_path": str(model), "flash_attn": "fa2"}
    train = train_config(work, "out", max_steps=2, **keys)
    found = drive(SCRIPT, train, infer_config(work, adapter_name_or_path=str(work / "out"), **keys))
    assert len(found["losses"]) == 2 and all(0 < loss < 10 for loss in found["losses"])
    assert found["attention"] == "eager" and found["length"] > 0
    assert any("fa2" in line and "eager" in line for line in found["lines"])
