"""LLaMA-Factory trains from a GGUF file alone, and from an FP8 checkpoint as from its bf16 twin."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.helpers import gguf_models, quantized_checkpoints
from tests.helpers.llamafactory_runs import cli, environment, train_config, workspace


def losses(work, output: str, **changes) -> list[float]:
    env = environment(HOME=str(work))  # the cache of model directories
    done = cli("train", train_config(work, output, **changes), work, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((work / output / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def test_training_from_a_gguf_file(tmp_path):
    work = workspace(tmp_path, "deepseek_v2")
    file = gguf_models.write_model(work / "model", work / "model.gguf")
    shutil.rmtree(work / "model")
    found = losses(work, "out", model_name_or_path=str(file))
    assert len(found) == 3 and all(0 < loss < 20 for loss in found)
    adapter = json.loads((work / "out" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"].startswith(str(work / ".cache" / "kt_sft" / "gguf"))


@pytest.mark.slow
def test_training_from_an_fp8_checkpoint(tmp_path):
    work = workspace(tmp_path, "deepseek_v3")
    quantized, twin = quantized_checkpoints.fp8_checkpoint(work / "model", work / "formats")
    found = [losses(work, path.name, model_name_or_path=str(path)) for path in (quantized, twin)]
    assert len(found[0]) == 3 and found[0] == found[1]
