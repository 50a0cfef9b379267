"""Stock LLaMA-Factory end to end on a tiny model: train, resume, evaluate, predict, chat, api, export."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from kt_sft.adapters import forms
from kt_sft.integrations.llamafactory import hook
from kt_sft.integrations.merge.inspecting import open_with_base
from tests.helpers import tiny_models
from tests.helpers.llamafactory_runs import cli, drive, environment, infer_config, train_config, workspace

RUN = """
from llamafactory.train.tuner import run_exp
for config in given[0]:
    run_exp(config)
give(True)
"""
TRAIN_PREDICT_CHAT_EXPORT = """
from llamafactory.chat import ChatModel
from llamafactory.train.tuner import export_model, run_exp
runs, chat, exports = given
for config in runs:
    run_exp(config)
model = ChatModel(chat)
loaded = type(model.engine.model).__name__
answer = model.chat([{"role": "user", "content": "add 3 and 1"}])[0]
for config in exports:
    export_model(config)
give({"class": loaded, "length": answer.response_length, "text": answer.response_text})
"""


FORMATS = {"bf16": {}, "int4": {"kt_method": "AMXINT4", "kt_int4_group_size": 64}}


def results(output: Path) -> dict:
    return json.loads((output / "all_results.json").read_text())


def losses(output: Path) -> list[float]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return workspace(tmp_path_factory.mktemp("llamafactory"))


@pytest.fixture(scope="module")
def trained(work):
    """A training through the command: 4 steps of 2 x 2 rows with dropout, a checkpoint at 2, then evaluation."""
    config = train_config(
        work, "trained", max_steps=4, save_steps=2, gradient_accumulation_steps=2, val_size=0.2, do_eval=True,
        compute_accuracy=True, per_device_eval_batch_size=3, cpu_infer=2, kt_method="AMXBF16",
    )  # fmt: skip
    done = cli("train", config, work)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return work / "trained", done.stdout + done.stderr


@pytest.fixture(scope="module")
def continued(work, trained):
    """Resume, predict, chat with the adapter as a GGUF file, export it as vLLM reads it, and experts in int4; in one
    process."""
    output, _ = trained
    common = {"gradient_accumulation_steps": 2, "val_size": 0.2, "save_steps": 2}
    resume = train_config(work, "resumed", max_steps=4, resume_from_checkpoint=str(output / "checkpoint-2"), **common)
    predict = train_config(
        work, "predicted", do_train=False, dataset=None, eval_dataset="sums", max_samples=3, do_predict=True,
        predict_with_generate=True,
        max_new_tokens=6, adapter_name_or_path=str(output), max_steps=None, per_device_eval_batch_size=2,
    )  # fmt: skip
    adapter = open_with_base(output)
    file, folder = (str(forms.convert(adapter, form, work / f"adapter.{form}")) for form in ("gguf", "vllm"))
    chat = infer_config(work, adapter_name_or_path=file)
    export = infer_config(work, adapter_name_or_path=folder, export_dir=str(work / "exported"), export_size=1)
    trainings = [train_config(work, f"with_{name}", **keys) for name, keys in FORMATS.items()]
    exports = [export] + [
        infer_config(
            work, adapter_name_or_path=str(work / "with_int4"), export_dir=str(work / f"export_{name}"), **keys
        )
        for name, keys in FORMATS.items()
    ]
    return drive(TRAIN_PREDICT_CHAT_EXPORT, [resume, predict, *trainings], chat, exports)


def test_training_learns_and_evaluates(trained):
    output, _ = trained
    seen = losses(output)
    assert len(seen) == 4 and seen[-1] < seen[0]
    assert results(output)["eval_loss"] < seen[0] and "eval_accuracy" in results(output)


def test_log_shows_the_true_parameter_counts(work, trained):
    output, log = trained
    numbers = re.search(r"trainable params: ([\d,]+) \|\| all params: ([\d,]+)", log)
    trainable, total = (int(number.replace(",", "")) for number in numbers.groups())
    adapter = load_file(output / "adapter_model.safetensors")
    stock = tiny_models.load_stock(work / "model")
    assert trainable == sum(tensor.numel() for tensor in adapter.values())
    assert total == trainable + sum(parameter.numel() for parameter in stock.parameters())
    config = stock.config
    # in + out features of both matrices
    rows = config.num_experts * (2 * config.hidden_size + 3 * config.moe_intermediate_size)
    on_experts = sum(tensor.numel() for name, tensor in adapter.items() if ".experts." in name)
    assert on_experts == config.num_hidden_layers * 4 * rows


def test_adapter_is_plain_peft_with_experts_and_without_router(trained):
    output, _ = trained
    config = json.loads((output / "adapter_config.json").read_text())
    assert sorted(config["target_parameters"]) == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    assert "gate" not in config["target_modules"] and not any(
        ".gate." in key for key in load_file(output / "adapter_model.safetensors")
    )
    assert "kt-kernel" not in (output / "README.md").read_text()


def test_every_lora_matrix_has_moved(trained):
    output, _ = trained
    early = load_file(output / "checkpoint-2" / "adapter_model.safetensors")
    late = load_file(output / "adapter_model.safetensors")
    assert all(not torch.equal(early[name], late[name]) for name in late)


def test_resumed_training_repeats_the_rest(work, trained, continued):
    torch.testing.assert_close(losses(work / "resumed"), losses(trained[0]), rtol=1e-3, atol=1e-3)


def test_prediction_writes_texts_and_scores(work, continued):
    rows = [json.loads(line) for line in (work / "predicted" / "generated_predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all("add" in row["prompt"] for row in rows)
    assert "predict_rouge-1" in results(work / "predicted")


def test_chat_uses_the_adapter_unmerged(continued):
    assert continued["class"].startswith("Peft") and continued["length"] > 0


def test_export_is_a_complete_stock_checkpoint(work, trained, continued):
    from peft import PeftModel

    exported = tiny_models.load_stock(work / "exported")
    reference = PeftModel.from_pretrained(tiny_models.load_stock(work / "model"), str(trained[0])).eval()
    ids = tiny_models.token_ids()
    with torch.no_grad():
        expected, found = reference(ids).logits, exported(ids).logits
    base = tiny_models.load_stock(work / "model")(ids).logits
    distance = (found - expected).norm() / (base - expected).norm()
    assert distance < 0.1, (
        f"exported weights are bf16 of merged ones; relative to what the adapter changes: {distance:.3f}"
    )


class TrainingArgumentsOfManyGpus:
    _n_gpu = 4

    @property
    def n_gpu(self) -> int:
        return self._n_gpu


def test_several_gpus_without_torchrun_are_one(caplog):
    arguments = TrainingArgumentsOfManyGpus()
    hook.use_one_device(arguments)
    assert arguments.n_gpu == 1 and len(caplog.records) == 1 and "FORCE_TORCHRUN=1" in caplog.text
    arguments._n_gpu = 4
    hook.use_one_device(arguments, has_rules=True)
    assert arguments.n_gpu == 1 and len(caplog.records) == 1, "rules say which GPUs are used"


@pytest.mark.parametrize(
    ("device_map", "expected"),
    [({"": torch.device("cuda:1")}, {"": torch.device("cuda:1")}), ({"": torch.device("cpu")}, None), (None, None)],
)
def test_model_is_placed_on_one_device(work, device_map, expected):
    hub = dict.fromkeys(("trust_remote_code", "model_revision", "cache_dir", "hf_hub_token"))
    model_args = SimpleNamespace(model_name_or_path=str(work / "model"), **hub)
    init_kwargs = {"device_map": device_map, "offload_folder": "offload"}
    hook.load_experts_apart(model_args, init_kwargs)
    assert init_kwargs.pop("quantization_config").quant_method == "kt_sft"
    assert init_kwargs == ({"device_map": expected} if expected else {})


def test_rules_place_the_model(work, tmp_path, monkeypatch):
    rules = tmp_path / "r.yaml"
    rules.write_text("- match: {layers: 1}\n  replace: {class: default, kwargs: {generate_device: 'cuda:1'}}\n")
    monkeypatch.setattr("kt_sft.placement.inject.device_count", lambda kind: 2)
    hub = dict.fromkeys(("trust_remote_code", "model_revision", "cache_dir", "hf_hub_token"))
    model_args = SimpleNamespace(model_name_or_path=str(work / "model"), kt_optimize_rule=str(rules), **hub)
    init_kwargs = {"device_map": {"": torch.device("cuda:0")}}
    hook.load_experts_apart(model_args, init_kwargs)
    device_map = init_kwargs["device_map"]
    assert device_map.pop("model.layers.1") == torch.device("cuda:1")
    assert "model.layers.0" in device_map and set(device_map.values()) == {torch.device("cuda:0")}


@pytest.mark.slow
def test_gradient_checkpointing_variants_and_batching_agree(work):
    """With dropout 0 the loss of a step depends on none of these."""
    common = {"lora_dropout": 0.0, "bf16": False, "max_steps": 3, "disable_shuffling": True}
    variants = {
        "reentrant": {},
        "non_reentrant": {"use_reentrant_gc": False},
        "off": {"disable_gradient_checkpointing": True},
        "recompute": {"kt_cpu_activation": "recompute", "disable_gradient_checkpointing": True},
        "chunks": {"chunk_size": 16},
        "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    }
    assert drive(RUN, [train_config(work, name, **common, **changes) for name, changes in variants.items()])
    expected = losses(work / "reentrant")
    for name in variants:
        torch.testing.assert_close(
            losses(work / name), expected, rtol=2e-3, atol=2e-3, msg=f"{name}: {losses(work / name)} {expected}"
        )


def test_int4_experts_train_like_bf16_ones_and_export_without_their_rounding(work, continued):
    for one, other in zip(losses(work / "with_int4"), losses(work / "with_bf16"), strict=True):
        assert 0 < abs(one - other) < 0.03 * other
    by_format = {}
    for name in FORMATS:
        files = sorted((work / f"export_{name}").glob("*.safetensors"))
        by_format[name] = {key: tensor for file in files for key, tensor in load_file(file).items()}
    assert by_format["bf16"].keys() == by_format["int4"].keys()
    assert all(torch.equal(tensor, by_format["int4"][key]) for key, tensor in by_format["bf16"].items())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "deepseek_v3"])
def test_other_families_train_and_never_the_router(tmp_path, family):
    work = workspace(tmp_path, family)
    assert drive(RUN, [train_config(work, "out", max_steps=2)])
    keys = load_file(work / "out" / "adapter_model.safetensors")
    assert any(".experts." in key for key in keys) and not any(re.search(r"\.(gate|router)\.", key) for key in keys)


@pytest.mark.slow
def test_new_adapter_on_a_merged_one(work, trained):
    config = train_config(
        work, "second", adapter_name_or_path=str(trained[0]), create_new_adapter=True, max_steps=2, lora_dropout=0.0
    )
    assert drive(RUN, [config])
    assert losses(work / "second")[0] < losses(trained[0])[0]


@pytest.mark.slow
def test_chat_command_answers(work, trained):
    done = cli("chat", infer_config(work, adapter_name_or_path=str(trained[0])), work, input="add 3 and 1\nexit\n")
    assert done.returncode == 0 and "Assistant:" in done.stdout, done.stderr[-4000:]


@pytest.mark.slow
def test_api_answers_a_request(work, trained):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    file = work / "api.yaml"
    file.write_text(yaml.safe_dump(infer_config(work, adapter_name_or_path=str(trained[0]))))
    env = environment(API_HOST="127.0.0.1", API_PORT=str(port))
    command = [sys.executable, "-m", "llamafactory.cli", "api", str(file)]
    with (
        (work / "api.log").open("w") as log,
        subprocess.Popen(command, env=env, cwd=work, stdout=log, stderr=log) as server,
    ):
        try:
            answer = ask(port, server)
        finally:
            server.terminate()
    assert answer["choices"][0]["message"]["role"] == "assistant"


def ask(port: int, server: subprocess.Popen) -> dict:
    body = json.dumps(
        {"model": "m", "messages": [{"role": "user", "content": "add 3 and 1"}], "max_tokens": 4}
    ).encode()
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    for _ in range(120):
        assert server.poll() is None, "the server ended before it answered"
        try:
            request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.load(response)
        except OSError:
            time.sleep(0.5)
    raise AssertionError("no answer within a minute")
