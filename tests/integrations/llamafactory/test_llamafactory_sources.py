"""LLaMA-Factory trains from a GGUF file alone, and from an FP8 checkpoint as from its bf16 twin."""

from __future__ import annotations

import json

import pytest

from kt_sft.formats.gguf import GgufIndex
from kt_sft.integrations.gguf.tokenizer import read_tokenizer
from tests.helpers import gguf_models, quantized_checkpoints
from tests.helpers.llamafactory_runs import cli, drive, environment, train_config, workspace

TRAIN_ONE_AFTER_ANOTHER = """
import shutil
from llamafactory.train.tuner import run_exp
plain, gguf = given
run_exp(plain)
shutil.rmtree(plain["model_name_or_path"])
run_exp(gguf)
give(True)
"""


def losses(folder) -> list[float]:
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def test_training_from_a_gguf_file(tmp_path):
    """Alone, the file trains as the checkpoint does that it was made of; dropout included."""
    work = workspace(tmp_path, "deepseek_v2")
    file = gguf_models.write_model(work / "model", work / "model.gguf")
    read_tokenizer(GgufIndex.from_path(file)).save_pretrained(work / "model")
    configs = train_config(work, "plain"), train_config(work, "out", model_name_or_path=str(file))
    assert drive(TRAIN_ONE_AFTER_ANOTHER, *configs, env=environment(HOME=str(work)))  # the cache of directories
    found, wanted = losses(work / "out"), losses(work / "plain")
    assert len(found) == 3 and found == wanted
    adapter = json.loads((work / "out" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"].startswith(str(work / ".cache" / "kt_sft" / "gguf"))


@pytest.mark.slow
def test_training_from_an_fp8_checkpoint(tmp_path):
    work = workspace(tmp_path, "deepseek_v3")
    quantized, twin = quantized_checkpoints.fp8_checkpoint(work / "model", work / "formats")
    found = []
    for path in (quantized, twin):
        done = cli("train", train_config(work, path.name, model_name_or_path=str(path)), work)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(losses(work / path.name))
    assert len(found[0]) == 3 and found[0] == found[1]
