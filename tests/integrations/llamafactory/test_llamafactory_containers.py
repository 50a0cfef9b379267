"""Stock LLaMA-Factory on a packed container: converted by the command, trained, merged and chatted with."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from tests.helpers.llamafactory_runs import cli, drive, environment, infer_config, train_config, workspace
from tests.integrations.transformers.test_saving import tensors_of

TRAIN_CHAT_EXPORT = """
from llamafactory.chat import ChatModel
from llamafactory.train.tuner import export_model, run_exp
runs, chats, exports = given
for config in runs:
    run_exp(config)
answers = []
for config in chats:
    model = ChatModel(config)
    stores = [m.store for m in model.engine.model.modules() if hasattr(getattr(m, "store", None), "mapped_experts")]
    text = model.chat([{"role": "user", "content": "add 3 and 1"}])[0].response_text
    answers.append([text, sum(store.mapped_experts for store in stores)])
for config in exports:
    export_model(config)
give(answers)
"""


def losses(output):
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    work = workspace(tmp_path_factory.mktemp("containers"))
    command = [
        sys.executable,
        "-m",
        "kt_sft.cli",
        "convert",
        "--input-path",
        work / "model",
        "--output",
        work / "packed",
    ]
    done = subprocess.run([*command, "--quant-method", "int8"], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return work


@pytest.mark.slow
def test_trains_chats_and_exports_as_from_the_checkpoint(work):
    packed = {"kt_weight_path": str(work / "packed")}
    cached = {"kt_weight_cache": str(work / "cache")}
    ways = {"from-plain": {}, "from-packed": packed, "from-cache": cached}
    runs = [train_config(work, name, kt_method="INT8", **more) for name, more in ways.items()]
    adapters = {name: {"adapter_name_or_path": str(work / name)} for name in ways}
    chats = [infer_config(work, kt_method="INT8", **adapters[name], **more) for name, more in ways.items()]
    exports = [
        infer_config(work, kt_method="INT8", **adapters[name], **more, export_dir=str(work / f"{name}-merged"))
        for name, more in ways.items()
    ]
    answers = drive(TRAIN_CHAT_EXPORT, runs, chats, exports)
    plain, *others = (losses(work / name) for name in ways)
    assert plain != [] and others == [plain, plain]
    texts, mapped = zip(*answers)
    assert len(set(texts)) == 1 and mapped[0] == 0 < mapped[1] == mapped[2]
    merged = [tensors_of(work / f"{name}-merged") for name in ways]
    for other in merged[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in merged[0].items())


@pytest.mark.slow
def test_a_container_of_another_format_is_one_line(work):
    config = train_config(work, "refused", kt_method="INT4", kt_weight_path=str(work / "packed"))
    done = cli("train", config, work)
    assert done.returncode == 2
    assert "kt_sft: error: method: int4 in groups of 32 is asked for, but the container" in done.stderr
    wrong = cli("train", {**config, "kt_weight_load": "stream"}, work)
    assert wrong.returncode == 2 and "kt_weight_load: expected one of auto, mmap, copy" in wrong.stderr
