"""Configuration keys and every refusal: one line, with the remedy, before a model or data is read."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kt_sft.config import KTConfig
from kt_sft.errors import ConfigError
from kt_sft.integrations.llamafactory import args
from tests.helpers import tiny_models
from tests.helpers.llamafactory_runs import cli, drive, infer_config, train_config, workspace


@dataclass
class StockModelArguments:
    """The fields of LLaMA-Factory's class that matter here."""

    model_name_or_path: str | None = None
    use_kt: bool = False
    kt_weight_path: str | None = None
    derived: str = field(default="", init=False)


Ours = args.model_arguments(StockModelArguments)


def test_only_missing_keys_are_added():
    names = [f.name for f in fields(Ours)]
    assert set(args.KEYS) <= set(names) and len(names) == len(set(names))
    assert Ours.__name__ == "StockModelArguments" and issubclass(Ours, StockModelArguments)
    assert "kt_active" not in [f.name for f in fields(Ours) if f.init]


def test_nothing_set_means_the_defaults_of_ktconfig():
    assert args.kt_config(Ours()) == KTConfig()


def test_every_setting_reaches_ktconfig():
    given = Ours(kt_method="AMXINT4", kt_int4_group_size=64, kt_expert_activations="bf16", kt_cpu_linear="off",
                 cpu_infer=3, kt_threadpool_count=1, chunk_size=64, kt_expert_lora=False,
                 kt_max_deferred_experts_per_token=2, kt_optimize_rule="r.yaml", kt_rule_vars={"stage2": "cuda:1"},
                 kt_cpu_activation="recompute", kt_expert_checkpoint_path="elsewhere")  # fmt: skip
    expected = KTConfig(
        method="INT4",
        int4_group_size=64,
        expert_activations="bf16",
        cpu_linear="off",
        threads=3,
        threadpool_count=1,
        chunk_size=64,
        max_deferred_experts_per_token=2,
        expert_lora=False,
        cpu_activation="recompute",
        optimize_rule="r.yaml",
        rule_vars="stage2=cuda:1",
        weight_path="elsewhere",
    )
    assert args.kt_config(given) == expected


def test_an_export_follows_no_rules():
    given = Ours(kt_optimize_rule="r.yaml", kt_rule_vars="stage2=cuda:1")
    given.export_dir = "exported"
    assert args.kt_config(given) == KTConfig(cpu_linear="off")
    assert args.no_effect(given) == ["kt_optimize_rule"]


def test_faults_of_values_bear_the_name_of_the_key():
    with pytest.raises(ConfigError) as caught:
        args.kt_config(Ours(cpu_infer=0, kt_cpu_activation="retian", kt_method="INT4", kt_int4_group_size=48))
    message = str(caught.value)
    assert "cpu_infer: expected" in message and "kt_cpu_activation: expected" in message and "'retain'" in message
    assert "kt_int4_group_size: expected one of 32, 64, 128, found 48" in message


@pytest.mark.parametrize(
    ("key", "near"), [("kt_methd", "kt_method"), ("cpu_infre", "cpu_infer"), ("use_kts", "use_kt")]
)
def test_unknown_key_names_the_nearest(key, near):
    with pytest.raises(ConfigError, match=f"{key}: unknown key; did you mean '{near}'"):
        args.check_known({key: 1}, [Ours], [])


def test_unknown_command_line_option():
    args.check_known(["--use_k", "true", "--kt_method=BF16"], [Ours], ["--use_kt", "--kt_method"])
    with pytest.raises(ConfigError, match="kt_methd"):
        args.check_known(["--kt_methd", "BF16"], [Ours], ["--use_kt", "--kt_method"])


@pytest.mark.parametrize(("set_to", "target", "expected"), [
    (None, ["all"], True), (None, ["q_proj"], None), (False, ["all"], False), (True, ["q_proj"], True),
])  # fmt: skip
def test_expert_lora_follows_the_target_unless_set(set_to, target, expected):
    assert args.expert_lora(KTConfig(expert_lora=set_to), target) is expected


def test_zero3_is_seen_in_a_file_and_in_a_mapping(tmp_path):
    for stage in (2, 3):
        content = {"zero_optimization": {"stage": stage}}
        file = tmp_path / f"z{stage}.json"
        file.write_text(json.dumps(content))
        assert args.is_zero3(str(file)) is args.is_zero3(content) is (stage == 3)
    assert not args.is_zero3(None) and not args.is_zero3(str(tmp_path / "missing.json"))


@pytest.mark.parametrize(("line", "found"), [
    ("--use_kt true --deepspeed FILE", True), ("--use_kt --deepspeed=FILE", True),
    ("--use_kt=1 --deepspeed FILE", True),
    ("--use_kt false --deepspeed FILE", False), ("--deepspeed FILE", False), ("--use_kt true", False), ("", False),
])  # fmt: skip
def test_zero3_is_seen_in_command_line_words(tmp_path, line, found):
    (tmp_path / "z3.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    words = line.replace("FILE", str(tmp_path / "z3.json")).split()
    assert (args.is_set(words, "use_kt") and args.is_zero3(args.given(words, "deepspeed"))) is found


PARSE = """
import io, contextlib
from llamafactory.hparams import get_train_args, get_infer_args
from kt_sft.errors import KTError
answers = []
for kind, config in given[0]:
    try:
        groups = (get_train_args if kind == "train" else get_infer_args)(config)
        model = groups[0]
        answers.append({"use_kt": model.use_kt, "kt_active": model.kt_active, "engine": str(model.infer_backend)})
    except KTError as error:
        answers.append({"error": str(error), "type": type(error).__name__})
    except Exception as error:
        answers.append({"stock": f"{type(error).__name__}: {error}"})
give(answers)
"""


def words(config: dict[str, object]) -> list[str]:
    """The configuration as command line options."""
    return [word for key, value in config.items() for word in (f"--{key}", str(value))]


def foreign_adapter(directory: Path) -> None:
    """A LoRA of q_proj for another hidden size."""
    directory.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    module = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    tensors = {module.format(layer, "A"): torch.zeros(4, 99) for layer in range(2)}
    tensors |= {module.format(layer, "B"): torch.zeros(48, 4) for layer in range(2)}
    save_file(tensors, directory / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def parsed(tmp_path_factory):
    """Answer of the real parser to every case, in one start."""
    work = workspace(tmp_path_factory.mktemp("args"))
    (work / "zero3.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    (work / "empty").mkdir()
    experts = {
        "match": {"class": "Qwen3MoeExperts"},
        "replace": {"class": "RoutedExperts", "kwargs": {"method": "INT8"}},
    }
    (work / "rule.yaml").write_text(json.dumps([experts]))
    (work / "wrong.yaml").write_text(json.dumps([experts, {**experts, "match": {"name": "^model.layrs"}}]))
    dense = tiny_models.dense(work / "dense")
    cut, bent = (Path(shutil.copytree(work / "model", work / name)) for name in ("cut", "bent"))
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[:-100])
    expert = "model.layers.1.mlp.experts.2.up_proj.weight"
    tiny_models.rewrite(bent, lambda tensors: {**tensors, expert: tensors[expert][:, 1:]})
    foreign_adapter(work / "foreign")
    cases = {
        "fine": train_config(work, "out"),
        "fine_chat": ("chat", infer_config(work)),
        "chat_of_094": ("chat", infer_config(work, infer_backend="ktransformers", kt_maxlen=512, mode="normal")),
        "without_use_kt": train_config(work, "out", use_kt=None),
        "unknown": train_config(work, "out", chunk_sise=64),
        "full": train_config(work, "out", finetuning_type="full"),
        "dora": train_config(work, "out", use_dora=True),
        "dora_experts": train_config(work, "out", use_dora=True, lora_target="q_proj,experts"),
        "dora_attention": train_config(work, "out", use_dora=True, kt_expert_lora=False),
        "quantization": train_config(work, "out", quantization_bit=4),
        "zero3": train_config(work, "out", deepspeed=str(work / "zero3.json")),
        "zero3_words": words(train_config(work, "out", deepspeed=str(work / "zero3.json"))),
        "rule": train_config(work, "out", kt_optimize_rule=str(work / "rule.yaml")),
        "no_rule": train_config(work, "out", kt_optimize_rule="nowhere.yaml"),
        "wrong_rule": train_config(work, "out", kt_optimize_rule=str(work / "wrong.yaml")),
        "rank": train_config(work, "out", lora_rank=300),
        "rank_text": train_config(work, "out", lora_rank="8"),
        "rows": train_config(work, "out", kt_expert_activations="int8"),
        "rm": train_config(work, "out", stage="rm"),
        "deferred": train_config(work, "out", kt_max_deferred_experts_per_token=1),
        "vllm": ("chat", infer_config(work, infer_backend="vllm")),
        "two_adapters": ("chat", infer_config(work, adapter_name_or_path="a/b/c,d/e/f")),
        "no_adapter": ("chat", infer_config(work, adapter_name_or_path=str(work / "nowhere"))),
        "empty_adapter": ("chat", infer_config(work, adapter_name_or_path=str(work / "empty"))),
        "no_model": train_config(work, "out", model_name_or_path=str(work / "nowhere")),
        "dense": train_config(work, "out", model_name_or_path=str(dense)),
        "no_weights": train_config(work, "out", kt_weight_path=str(work / "nowhere")),
        "cut_shard": train_config(work, "out", model_name_or_path=str(cut)),
        "bent_tensor": train_config(work, "out", model_name_or_path=str(bent)),
        "foreign_adapter": ("chat", infer_config(work, adapter_name_or_path=str(work / "foreign"))),
        "use_kt_text": train_config(work, "out", use_kt="false"),
        "use_kt_words": [*words(train_config(work, "out", use_kt=None)), "--use_kt", "maybe"],
        "number_words": words(train_config(work, "out", learning_rate="fast")),
        "number_text": train_config(work, "out", learning_rate="1e-4"),
        "no_steps": train_config(work, "out", gradient_accumulation_steps=0, save_steps=0),
        "empty_name": train_config(work, "out", additional_target="lm_head,"),
        "off": train_config(work, "out", kt_cpu_linear=False, save_steps=0, save_strategy="steps"),
        "export_file": ("chat", infer_config(work, export_dir=str(work / "rule.yaml"))),
        "reports": train_config(work, "out", report_to="wandbb"),
        "peer_key": train_config(work, "out", kt_backend="AMXFP8", kt_num_threads="many"),
        "rule_vars": train_config(work, "out", kt_rule_vars="a=b"),
        "two_faults": train_config(work, "out", use_dora=True, cpu_infer="many"),
    }
    pairs = [case if isinstance(case, tuple) else ("train", case) for case in cases.values()]
    return dict(zip(cases, drive(PARSE, pairs), strict=True))


@pytest.mark.parametrize("case", ["fine", "fine_chat", "chat_of_094", "rule", "dora_attention", "off"])
def test_good_configuration_switches_the_flags(parsed, case):
    assert parsed[case] == {"use_kt": False, "kt_active": True, "engine": "huggingface"}


def test_use_kt_variable_alone_is_stock(parsed):
    assert parsed["without_use_kt"]["kt_active"] is False


@pytest.mark.parametrize(("case", "words"), [
    ("unknown", ["chunk_sise", "'chunk_size'"]),
    ("full", ["finetuning_type", "lora", "'full'"]),
    ("dora", ["use_dora", "remove"]),
    ("dora_experts", ["use_dora", "remove"]),
    ("quantization", ["quantization_bit", "kt_method"]),
    ("zero3", ["deepspeed", "ZeRO-3", "ZeRO-2"]),
    ("zero3_words", ["deepspeed", "ZeRO-3", "ZeRO-2"]),
    ("no_rule", ["nowhere.yaml", "kt_optimize_rule", "expected a rule file"]),
    ("wrong_rule", ["wrong.yaml, rule 2", "matches no module", "model.layers"]),
    ("rows", ["kt_expert_activations", "INT8, INT4 or RAWINT4"]),
    ("rank", ["lora_rank", "256", "300"]),
    ("rank_text", ["lora_rank: expected a whole number", "'8'"]),
    ("rm", ["stage", "'rm'", "sft"]),
    ("deferred", ["kt_max_deferred_experts_per_token", "inference", "do_train"]),
    ("vllm", ["infer_backend", "vllm", "huggingface"]),
    ("two_adapters", ["adapter_name_or_path", "expected one"]),
    ("no_adapter", ["nowhere", "check the path"]),
    ("empty_adapter", ["empty", "adapter_config.json"]),
    ("no_model", ["nowhere", "directory"]),
    ("dense", ["expert"]),
    ("no_weights", ["nowhere"]),
    ("cut_shard", ["cut/model.safetensors"]),
    ("bent_tensor", ["model.layers.1.mlp.experts.2.up_proj.weight", "expected", "[20, 48]", "[20, 47]"]),
    ("foreign_adapter", ["foreign", "q_proj.lora_A.weight", "[4, 48]", "[4, 99]"]),
    ("use_kt_text", ["use_kt: expected true or false, found 'false'", "quotes"]),
    ("use_kt_words", ["use_kt: expected true or false, found 'maybe'"]),
    ("number_words", ["learning_rate: invalid float value: 'fast'"]),
    ("number_text", ["learning_rate: expected a number, found '1e-4'", "quotes"]),
    ("no_steps", ["gradient_accumulation_steps: expected a whole number from 1 to 2147483647"]),
    ("empty_name", ["additional_target: expected names, found an empty one"]),
    ("export_file", ["rule.yaml: export_dir: expected a directory, found a file"]),
    ("reports", ["report_to: wandbb: unknown; did you mean 'wandb'?"]),
    ("peer_key", ["kt_backend: expected one of BF16", "kt_num_threads: expected a whole number"]),
    ("rule_vars", ["kt_rule_vars: variables of a rule file, but there is no kt_optimize_rule", "remove kt_rule_vars"]),
    ("two_faults", ["2 faults", "use_dora", "cpu_infer", "'many'"]),
])  # fmt: skip
def test_refusal_is_one_line_with_the_names(parsed, case, words):
    answer = parsed[case]
    assert "error" in answer, answer
    assert "\n" not in answer["error"] and all(word in answer["error"] for word in words), answer["error"]


def test_command_ends_with_one_line_and_status_2(tmp_path):
    work = workspace(tmp_path)
    done = cli("train", train_config(work, "out", kt_optimize_rule="rule.yaml"), work)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("kt_sft: error: rule.yaml: kt_optimize_rule")]
