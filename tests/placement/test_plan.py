"""`kt-sft plan`: what goes where and how much that is, from a run's YAML and a config.json."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf
from peft import LoraConfig
from torch import nn
from typer.testing import CliRunner

from kt_sft.cli import app
from kt_sft.config import KTConfig
from kt_sft.errors import GIB, ConfigError, FormatError
from kt_sft.integrations import peft as kt_peft
from kt_sft.integrations.llamafactory.planning import plan_run, read_run
from kt_sft.integrations.llamafactory.run_file import read_run_file
from kt_sft.integrations.transformers.loading import load_model
from kt_sft.models.spec import find_experts, iter_routed_experts
from kt_sft.native import native
from kt_sft.placement.budget import TRAINED_BYTES, Run, memory_by_device
from kt_sft.placement.plan import groups
from kt_sft.placement.resolve import resolve
from tests.helpers import gguf_models, parity, rule_models, tiny_models

READY = Path(__file__).parents[2] / "configs" / "rules"
FOUR = {"stage2": "cuda:1", "stage3": "cuda:2", "stage4": "cuda:3"}


@pytest.fixture
def run_of(tmp_path):
    """Writes a config.json without weights, and the configuration of a run on it."""

    def write(config, **values):
        config.save_pretrained(tmp_path / "model")
        defaults = {"model_name_or_path": str(tmp_path / "model"), "do_train": True, "bf16": True, "lora_target": "all"}
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump({**defaults, **values}))
        return file

    return write


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_weight_is_counted_once_and_experts_as_packed(run_of, family):
    file = run_of(tiny_models.config(family), kt_method="INT8")
    result = plan_run(file, device="cpu")
    model = rule_models.tiny(family)
    specs = find_experts(model)
    outside = [t for n, t in [*model.named_parameters(), *model.named_buffers()] if n.rpartition(".")[0] not in specs]
    memory = result.memory["cpu"]
    assert memory.weights_bytes == 2 * sum(tensor.numel() for tensor in outside)
    sizes = [(spec.num_experts, spec.hidden, spec.inter) for spec in specs.values()]
    assert memory.experts_bytes == sum(native().ExpertStore.packed_bytes_for(*size, "int8", 32) for size in sizes)


@pytest.mark.parametrize(("family", "target"), [
    ("qwen3_moe", "all"), ("deepseek_v2", "all"), ("mixtral", "q_proj,experts"), ("deepseek_v3", "o_proj"),
])  # fmt: skip
def test_lora_is_what_peft_makes(run_of, tmp_path, family, target):
    file = run_of(tiny_models.config(family), lora_rank=3, lora_target=target)
    result = plan_run(file, device="cpu")
    model = parity.load_ours(tiny_models.build(family, tmp_path / "real"))
    names = "all-linear" if target == "all" else target.split(",")
    peft_model = kt_peft.get_peft_model(model, LoraConfig(r=3, target_modules=names, task_type="CAUSAL_LM"))
    trained = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    assert result.memory["cpu"].lora_bytes == TRAINED_BYTES * trained
    assert result.run.rank == (0 if target == "o_proj" else 3)


@pytest.mark.parametrize("trains", [False, True])
def test_lora_of_an_adapter_is_what_its_files_say(run_of, tmp_path, trains):
    file = run_of(tiny_models.config("qwen3_moe"), do_train=trains, lora_rank=64, lora_target="o_proj")
    model = parity.load_ours(tiny_models.build("qwen3_moe", tmp_path / "real"))
    wanted = LoraConfig(r=3, target_modules=["q_proj", "experts"], rank_pattern={"q_proj": 5}, task_type="CAUSAL_LM")
    peft_model = kt_peft.get_peft_model(model, wanted)
    peft_model.save_pretrained(tmp_path / "adapter")
    elements = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    override = f"adapter_name_or_path={tmp_path / 'adapter'}"
    result = plan_run(file, [override], device="cpu")
    assert result.memory["cpu"].lora_bytes == (TRAINED_BYTES if trains else 4) * elements
    assert result.run.rank == 3
    with pytest.raises(FormatError, match="no such adapter directory"):
        plan_run(file, ["adapter_name_or_path=./nowhere/at/all"], device="cpu")


@pytest.mark.parametrize("setting", ["rule", "kt_cpu_linear"])
def test_packed_linear_layers_are_counted_as_packed(run_of, tmp_path, setting):
    names = "(q_proj|k_proj|v_proj|o_proj|lm_head)$"  # all of this model
    rules = tmp_path / "r.yaml"
    rules.write_text(f"- match: {{name: {names}}}\n  replace: {{class: PackedLinear, kwargs: {{backend: int8}}}}\n")
    changes = {"kt_optimize_rule": str(rules)} if setting == "rule" else {"kt_cpu_linear": "int8"}
    config = tiny_models.config("qwen3_moe", dtype="bfloat16", attention_bias=True)
    result = plan_run(run_of(config, **changes), device="cpu")
    model = rule_models.on_meta(config)
    linears = {n: m for n, m in model.named_modules() if type(m) is nn.Linear}
    weights = {id(linear.weight) for linear in linears.values()}
    specs = find_experts(model)
    others = [t for n, t in [*model.named_parameters(), *model.named_buffers()] if n.rpartition(".")[0] not in specs]
    packed = [native().PackedLinear(m.out_features, m.in_features, "int8").packed_bytes for m in linears.values()]
    assert result.memory["cpu"].weights_bytes == sum(packed) + 2 * sum(
        t.numel() for t in others if id(t) not in weights
    )
    assert set(result.plan.packed_linears) == set(linears)


@pytest.mark.parametrize(("stored", "bytes_each"), [("bfloat16", 2), ("float32", 4), (None, 2)])
def test_a_model_is_loaded_as_it_is_stored(run_of, stored, bytes_each):
    config = tiny_models.config("mixtral", dtype=stored)
    assert plan_run(run_of(config), device="cpu").run.element_bytes == bytes_each


def test_activations_grow_with_what_is_kept():
    model = rule_models.tiny("qwen3_moe")
    plan, specs = resolve(model), find_experts(model)

    def activations(**changes):
        values = {"tokens": 64, "experts_per_token": 2, "vocabulary": 96, "rank": 4, **changes}
        held = memory_by_device(model, plan, specs, dict.fromkeys(specs, 0), Run(**values))
        return held["cpu"].activations_bytes

    assert activations(tokens=128) == 2 * activations()
    assert activations(trains=False) < activations() < activations(checkpoints=False)
    assert activations(retains=False) < activations(rank=0) < activations()


# (model, rule variables) -> GiB of weights outside the experts on each GPU, GiB of experts in main memory.
@pytest.mark.parametrize(("name", "rules", "variables", "method", "gpus", "experts"), [
    ("deepseek_v3", "deepseek_v3", {}, "BF16", [31.88], 1218.0),
    ("deepseek_v3", "deepseek_v3", FOUR, "INT4", [10.19, 6.51, 6.51, 8.67], 342.6),
    ("deepseek_v2_lite", "deepseek_v2", {"stage3": "cuda:1"}, "BF16", [1.24, 1.20], 26.8),
    ("qwen3_moe", "qwen3_moe", {"stage3": "cuda:1"}, "INT8", [1.4, 1.4], 27.0),
    ("mixtral", "mixtral", {}, "BF16", [3.0], 84.0),
])  # fmt: skip
def test_published_models_need_what_they_need(run_of, name, rules, variables, method, gpus, experts):
    file = run_of(
        rule_models.published_config(name),
        kt_optimize_rule=str(READY / f"{rules}.yaml"),
        kt_rule_vars=variables,
        kt_method=method,
        cutoff_len=16,
    )
    result = plan_run(file)
    found = [held.weights_bytes / GIB for device, held in result.memory.items() if device != "cpu"]
    assert found == pytest.approx(gpus, rel=0.03)
    assert result.memory["cpu"].experts_bytes / GIB == pytest.approx(experts, rel=0.03)
    assert result.memory["cpu"].weights_bytes == 0


def test_a_gguf_file_is_the_model_and_has_the_formats_of_its_experts(run_of, tmp_path, monkeypatch):
    source = tiny_models.build("mixtral", tmp_path / "source", hidden_size=64, intermediate_size=32)
    file = gguf_models.write_model(source, tmp_path / "model.gguf", kind="Q8_0")
    rules = tmp_path / "r.yaml"
    rules.write_text(
        "- match: {name: experts$, layers: 0}\n  replace: {class: RoutedExperts, kwargs: {method: INT8}}\n"
    )
    overrides = [f"model_name_or_path={file}", "kt_method=GGUF", f"kt_optimize_rule={rules}"]
    result = plan_run(run_of(tiny_models.config("mixtral")), overrides, device="cpu")
    assert list(result.plan.methods.values()) == ["INT8", "GGUF"]
    monkeypatch.setenv("HOME", str(tmp_path))  # where the model directory of the file is written
    model = load_model(file, KTConfig(method="GGUF", optimize_rule=rules, threads=1))
    held = [experts.packed_bytes for _, experts in iter_routed_experts(model)]
    assert result.memory["cpu"].experts_bytes == sum(held) and held[0] != held[1]


def test_packed_linear_layers_of_a_model_in_f32_are_refused(run_of, tmp_path):
    rules = tmp_path / "r.yaml"
    rules.write_text("- match: {name: q_proj$}\n  replace: {class: PackedLinear}\n")
    config = tiny_models.config("qwen3_moe", dtype="float32")
    with pytest.raises(ConfigError, match="expected a model in bfloat16, found model.layers.0.self_attn.q_proj"):
        plan_run(run_of(config, kt_optimize_rule=str(rules)), device="cpu")


def test_groups_tell_layers_by_range(run_of):
    config = tiny_models.config("deepseek_v2", num_hidden_layers=5)
    file = run_of(config, kt_optimize_rule=str(READY / "deepseek_v2.yaml"), kt_rule_vars=FOUR)
    told = {group.modules: (group.what, group.device, group.rules) for group in groups(plan_run(file).plan)}
    assert told["model.layers.1-4.mlp.experts"] == ("experts BF16", "cpu", (1,))
    assert told["model.layers.3-4"] == ("weights", "cuda:3", (6,)) and told["model.layers.0"][1] == "cuda:0"


def test_command_prints_tables_and_json(run_of):
    file = str(run_of(tiny_models.config("qwen3_moe"), use_cpu=True))
    shown = CliRunner().invoke(app, ["plan", file])
    assert shown.exit_code == 0 and "model.layers.0-1.mlp.experts" in shown.stdout and "total GiB" in shown.stdout
    rules = [f"kt_optimize_rule={READY / 'qwen3_moe.yaml'}", "kt_rule_vars.stage4=cuda:1"]
    done = CliRunner().invoke(app, ["plan", file, *rules, "kt_method=INT4", "--json"])
    told = json.loads(done.stdout)
    assert set(told["methods"].values()) == {"INT4"}
    assert told["device_map"]["model.layers.1"] == "cuda:1" and set(told["memory"]) == {"cpu", "cuda:0", "cuda:1"}
    held = told["memory"]["cuda:1"]
    assert held["total_bytes"] == sum(value for key, value in held.items() if key != "total_bytes")


def test_command_fails_with_one_line(run_of, tmp_path):
    rules = tmp_path / "r.yaml"
    rules.write_text("- match: {name: nowhere}\n  replace: {class: default}\n")
    file = str(run_of(tiny_models.config("qwen3_moe"), kt_optimize_rule=str(rules)))
    done = CliRunner().invoke(app, ["plan", file])
    assert done.exit_code == 2 and "Traceback" not in done.output
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("kt-sft plan: error:") and "r.yaml, rule 1" in lines[0]


@pytest.mark.parametrize(("text", "overrides", "error", "words"), [
    (None, [], FormatError, ["run.yaml", "expected a file"]),
    ("a: 1\na: 2", [], FormatError, ["expected YAML", "a is there twice"]),
    ("model_name_or_path: x", ["foo=[a", "cutoff_len"], ConfigError, ["foo=[a: expected a value", "key=value"]),
    ("model_name_or_path: x", ["kt_metod=INT4"], ConfigError, ["kt_metod: unknown key", "did you mean 'kt_method'"]),
    ("model_name_or_path: x", ["lora_ranks=4"], ConfigError, ["lora_ranks: unknown key"]),
    ("model_name_or_path: x", ["finetuning_type=full", "stage=rm"], ConfigError, ["finetuning_type", "'full'", "'rm'"]),
    ("model_name_or_path: x", ["deepspeed.zero_optimization.stage=3"], ConfigError, ["ZeRO-3"]),
    ("- 1", [], FormatError, ["mapping of keys", "list"]),
    ("a: [", [], FormatError, ["expected YAML"]),
    ("a: 1", [], ConfigError, ["model_name_or_path", "None"]),
    ("model_name_or_path: x", ["cutoff_len"], ConfigError, ["cutoff_len: expected key=value"]),
    ("model_name_or_path: x", ["lora_rank=many", "cutoff_len=0"], ConfigError, ["lora_rank", "'many'", "cutoff_len"]),
])  # fmt: skip
def test_wrong_run_files(tmp_path, text, overrides, error, words):
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(error) as caught:
        read_run(file, overrides)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_without_llamafactory_our_keys_are_known(run_of, monkeypatch):
    monkeypatch.setitem(sys.modules, "llamafactory.hparams.parser", None)
    assert read_run(run_of(tiny_models.config("mixtral"), lora_ranks=4, kt_method="INT8"))["kt_method"] == "INT8"
    with pytest.raises(ConfigError, match=r"kt_metod: unknown key; did you mean 'kt_method'\?"):
        read_run(run_of(tiny_models.config("mixtral"), kt_metod="INT8"))


def test_files_and_overrides_mean_what_they_mean_to_llamafactory(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "a: 1e3\nb: 2024-01-02\nc: [1, x]\nd: {e: 1}\nf: ${d}\ng: yes\nh:\ni: 0x10\nj: 1_0\nk: 12:30\nl: .5\nm: '1e3'\n"
    )
    overrides = ["a=2e1", "d={m: 2}", "d.n=null", "o.p=cuda:1", "q=a=cuda:1,b=cpu", "c=[3]", "r=1.e2", "s=text"]
    merged = OmegaConf.merge(OmegaConf.load(file), OmegaConf.from_cli(overrides))
    assert read_run_file(file, overrides) == OmegaConf.to_container(merged)
    json_file = tmp_path / "run.json"
    json_file.write_text('{\n\t"cutoff_len": 1e3\n}')
    assert read_run_file(json_file) == {"cutoff_len": 1000.0}


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("a: ${b", (), "expected what OmegaConf takes, found"),
        ("a: {~: 1}", (), "expected what OmegaConf takes"),
        ("a: [{b: '" + "${" * 100_000 + "'}]", (), "of 8192 characters at most, found 200000"),
        ("a: 1", ("b=" + "${" * 5000,), "of 8192 characters at most, found 10002"),
    ],
)
def test_what_omegaconf_refuses_is_one_line(tmp_path, text, overrides, words):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(FormatError, match=words) as caught:
        read_run_file(tmp_path / "run.yaml", overrides)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(("text", "word"), [("a: 1", "b=${"), ("a: [1, 2]", "a[0]=3")])
def test_what_omegaconf_refuses_of_a_word_names_the_word(tmp_path, text, word):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"^{re.escape(word)}: expected what OmegaConf takes, found [^\n]*$"):
        read_run_file(tmp_path / "run.yaml", (word,))


def test_a_run_file_in_json_has_the_limits_of_one_in_yaml(tmp_path):
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"a": list(range(10_000))}))
    with pytest.raises(FormatError, match="expected at most 10000 keys and values, found 100"):
        read_run_file(file)
    file.write_text(json.dumps({"a": "x" * (1 << 18)}))
    with pytest.raises(FormatError, match="expected at most 262144 bytes"):
        read_run_file(file)


def test_a_whole_number_in_floating_point_is_a_length(run_of):
    assert plan_run(run_of(tiny_models.config("mixtral")), ["cutoff_len=1e3"], device="cpu").run.tokens == 8 * 1000


def test_wrong_models_and_settings(run_of):
    with pytest.raises(FormatError, match="expected a directory, found nothing"):
        plan_run(run_of(tiny_models.config("mixtral")), ["model_name_or_path=./nowhere"])
    with pytest.raises(ConfigError, match=r"kt_method: .*'INT9'"):
        plan_run(run_of(tiny_models.config("mixtral"), kt_method="INT9"))
    with pytest.raises(ConfigError, match="method GGUF: expected kt_weight_path"):
        plan_run(run_of(tiny_models.config("mixtral"), kt_method="GGUF"))
    with pytest.raises(ConfigError, match="device: expected cpu, cuda"):
        plan_run(run_of(tiny_models.config("mixtral")), device="tpu")


def test_what_is_not_counted_is_said(run_of, caplog):
    plan_run(
        run_of(
            tiny_models.config("qwen3_moe"),
            stage="dpo",
            ref_model="other",
            do_train=True,
            kt_config={"kt_tp_enabled": True},
        )
    )
    lines = [record.getMessage() for record in caplog.records]
    assert any("ref_model" in line and "not counted" in line for line in lines)
    assert any("kt_config.kt_tp_enabled: no effect" in line for line in lines)


def test_a_missing_deepspeed_file_is_named(run_of):
    with pytest.raises(ConfigError, match="deepspeed: nowhere.json: expected a configuration of DeepSpeed"):
        plan_run(run_of(tiny_models.config("qwen3_moe"), deepspeed="nowhere.json"))


@pytest.mark.parametrize("value", ["false", "0", "no", "'true'"])
def test_a_run_without_our_kernels_is_not_planned(run_of, value):
    with pytest.raises(ConfigError, match="use_kt: expected true"):
        read_run(run_of(tiny_models.config("mixtral")), [f"use_kt={value}"])


def test_a_run_that_does_not_say_use_kt_is_planned_as_if_it_did(run_of, caplog):
    read_run(run_of(tiny_models.config("mixtral")), ["use_kt=true"])
    assert not caplog.records
    file = run_of(tiny_models.config("mixtral"))
    file.write_text("\n".join(line for line in file.read_text().splitlines() if not line.startswith("use_kt")))
    read_run(file)
    assert "no use_kt: true" in caplog.text


def test_types_and_ranges_are_those_of_the_run(run_of):
    with pytest.raises(ConfigError, match="lora_alpha: expected a whole number from 1 to 2147483647, found 0"):
        read_run(run_of(tiny_models.config("mixtral"), lora_alpha=0))
    with pytest.raises(ConfigError, match="cutoff_len: expected a whole number, found '64'"):
        read_run(run_of(tiny_models.config("mixtral"), cutoff_len="64"))
