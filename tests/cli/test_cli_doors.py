"""Every command with wrong paths, wrong values, a misspelt name or Ctrl-C: one line and an exit code, no traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import LoraConfig
from typer.testing import CliRunner

import kt_sft
from kt_sft import cli, doctor
from kt_sft.integrations.llamafactory import chat, planning
from kt_sft.integrations.merge import command, inspecting
from kt_sft.integrations.transformers import converting
from tests.helpers import tiny_models
from tests.helpers.llamafactory_runs import train_config

CONVERT = ["convert", "--output", "OUT", "--input-path"]
MERGE = ["merge", "--adapter", "ADAPTER", "--output"]
RUN = ["plan", "RUN"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    work = tmp_path_factory.mktemp("doors")
    model = tiny_models.build("qwen3_moe", work / "model")
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    kt_sft.get_peft_model(kt_sft.load_model(model), config).save_pretrained(work / "adapter")
    (work / "run.json").write_text(json.dumps(train_config(work, "out")))
    (work / "broken.yaml").write_text("a: [")
    (work / "file").write_text("x")
    (work / "empty").mkdir()
    for name, text in (("half", "{"), ("odd", json.dumps({"model_type": "qwen3_moe", "hidden_size": "x"}))):
        (work / name).mkdir()
        (work / name / "config.json").write_text(text)
        (work / name / "adapter_config.json").write_text(text)
    return work


def run(work: Path, words: list[str]):
    names = {"ADAPTER": "adapter", "MODEL": "model", "RUN": "run.json", "FILE": "file", "OUT": "out"}
    words = [str(work / names[word]) if word in names else word.replace("WORK", str(work)) for word in words]
    return CliRunner().invoke(cli.app, words)


@pytest.mark.parametrize("words", [
    *(["plan", f"WORK/{name}"] for name in ("nowhere", "broken.yaml", "file", "empty")),
    *(["serve", f"WORK/{name}"] for name in ("nowhere", "broken.yaml", "file", "empty")),
    *([*RUN, value] for value in (
        "model_name_or_path=/nope", "model_name_or_path=3", "model_name_or_path=WORK/odd", "kt_method=9", "kt_config=3",
        "deepspeed=/nope", "adapter_name_or_path=3", "lora_target=of_nobody", "cutoff_len=-1", "kt_optimize_rule=/nope",
        "kt_rule_vars=[1]", "cpu_infer=x",
    )),
    [*RUN, "--device", "warp"],
    *([*CONVERT, f"WORK/{name}"] for name in ("nowhere", "file", "empty", "half", "odd")),
    *([*CONVERT, "MODEL", *more] for more in (
        ["--quant-method", "int9"], ["--input-type", "zz"], ["--threads", "0"], ["--int4-group-size", "7"],
    )),
    *(["adapter", "inspect", f"WORK/{name}"] for name in ("nowhere", "file", "empty", "half", "odd")),
    *(["adapter", "inspect", "ADAPTER", "--base-model", f"WORK/{name}"] for name in ("nowhere", "file", "half", "odd")),
    ["adapter", "convert", "ADAPTER", "OUT", "--to", "of_nobody"],
    ["adapter", "convert", "ADAPTER", "WORK/file/x", "--to", "vllm"],
    *([*MERGE, "OUT", "--model", f"WORK/{name}"] for name in ("nowhere", "empty", "half", "odd")),
    [*MERGE, "FILE"],
    [*MERGE, "OUT", "--to", "of_nobody"],
    ["serve", "RUN", "--host", "no host"],
    ["serve", "RUN", "--log-level", "loud"],
    ["bench", "serve", "--api-url", "of_nobody", "--model", "x"],
    ["bench", "serve", "--api-url", "http://127.0.0.1:9", "--model", "x", "--prompt-lens", "many"],
], ids=" ".join)  # fmt: skip
def test_faults_are_one_line(work, words):
    done = run(work, words)
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit), (done.output, done.exception)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("kt-sft ") and ": error: " in lines[0], done.output
    assert not (work / "out").exists()


@pytest.mark.parametrize("value", ["nan", "inf", "0"])
@pytest.mark.parametrize(
    "words", [["serve", "RUN"], ["bench", "serve", "--api-url", "http://127.0.0.1:9", "--model", "x"]]
)
def test_times_without_an_end_are_refused(work, words, value):
    done = run(work, [*words, "--timeout", value])
    assert done.exit_code == 2 and "--timeout" in done.stderr, done.output


@pytest.mark.parametrize(("words", "meant"), [
    (["merg"], "merge"), (["adapter", "convrt"], "convert"), (["bench", "srve"], "serve"), (["docter"], "doctor"),
])  # fmt: skip
def test_a_misspelt_command_names_the_nearest(work, words, meant):
    done = run(work, words)
    assert done.exit_code == 2 and f"Did you mean '{meant}'" in done.output


def test_version(work):
    done = run(work, ["--version"])
    assert done.exit_code == 0 and done.output == f"kt-sft {kt_sft.__version__}\n"


@pytest.mark.parametrize(("words", "owner", "name"), [
    (["doctor"], doctor, "collect"), (RUN, planning, "plan_run"),
    ([*CONVERT, "MODEL"], converting, "convert_checkpoint"),
    (["adapter", "inspect", "ADAPTER"], inspecting, "inspect"), ([*MERGE, "OUT"], command, "merge"),
    (["adapter", "convert", "ADAPTER", "OUT", "--to", "vllm"], inspecting, "open_with_base"),
    (["serve", "RUN"], chat, "load"),
])  # fmt: skip
@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left"), 2)])
def test_interrupts_and_errors_of_files(work, monkeypatch, words, owner, name, error, status):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(owner, name, fail)
    done = run(work, words)
    assert done.exit_code == status and isinstance(done.exception, SystemExit)
    assert "Traceback" not in done.output and ("No space left" in done.output) == (status == 2)
