"""Every example through LLaMA-Factory's own parser with USE_KT=1: accepted, and each key arrives where it acts."""

from __future__ import annotations

import pytest
import yaml
from peft import LoraConfig

from kt_sft.config import KTConfig
from kt_sft.integrations import peft as kt_peft
from kt_sft.integrations.llamafactory.args import KEY_OF_SETTING, NO_EFFECT
from tests.helpers import parity, tiny_models
from tests.helpers.llamafactory_runs import ROOT, drive

EXAMPLES = {path.relative_to(ROOT).as_posix(): path for path in sorted((ROOT / "examples").glob("*/*.yaml"))}
FAMILIES = {"V2-Lite": "deepseek_v2", "V3": "deepseek_v3", "Qwen3": "qwen3_moe", "tiny_moe": "mixtral"}

# What the parsers make of a word.
WORDS = {"none": [], "huggingface": "EngineName.HF", "no": "SaveStrategy.NO", "cosine": "SchedulerType.COSINE"}

PARSE = """
import json
from llamafactory.hparams import get_train_args, get_infer_args
from kt_sft.integrations.llamafactory import args
answers = {}
for name, config in given[0].items():
    groups = (get_train_args if "train_lora" in name else get_infer_args)(dict(config))
    answer = {"kt_active": groups[0].kt_active, "config": args.kt_config(groups[0]).to_dict()}
    for key in config:
        found = [getattr(group, key) for group in groups if hasattr(group, key)]
        answer[key] = json.loads(json.dumps(found[0], default=str)) if found else "arrives nowhere"
    answers[name] = answer
give(answers)
"""


def family_of(keys: dict) -> str:
    return next(family for part, family in FAMILIES.items() if part in keys["model_name_or_path"])


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """The examples' keys, but for what this machine lacks: models, adapters, GPUs."""
    work = tmp_path_factory.mktemp("examples")
    for family in FAMILIES.values():
        model = parity.load_ours(tiny_models.build(family, work / family))
        wanted = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
        kt_peft.get_peft_model(model, wanted).save_pretrained(work / f"{family}_lora")
    configs = {}
    for name, path in EXAMPLES.items():
        keys = yaml.safe_load(path.read_text(encoding="utf-8"))
        family = family_of(keys)
        keys["model_name_or_path"] = str(work / family)
        if "adapter_name_or_path" in keys:
            keys["adapter_name_or_path"] = str(work / f"{family}_lora")
        else:
            keys["use_cpu"] = True
            keys["output_dir"] = str(work / "out" / path.stem)
        if "kt_optimize_rule" in keys:
            keys["kt_optimize_rule"] = str(ROOT / keys["kt_optimize_rule"])
            keys["kt_rule_vars"] = {stage: "cpu" for stage in ("stage1", *keys["kt_rule_vars"])}
        configs[name] = keys
    return configs


@pytest.fixture(scope="module")
def parsed(given):
    return drive(PARSE, given)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_key_of_an_example_acts(given, parsed, name):
    keys, answer = given[name], parsed[name]
    assert not set(keys) & set(NO_EFFECT)
    assert answer["kt_active"] is True
    off = {
        key: answer[key] for key, value in keys.items() if answer[key] not in (value, [value], WORDS.get(str(value)))
    }
    assert set(off) == {"use_kt"}, off  # LLaMA-Factory's own branches never see that one
    settings = {field: keys[key] for field, key in KEY_OF_SETTING.items() if key in keys}
    assert answer["config"] == KTConfig(**settings, expert_lora=True).to_dict()  # lora_target: all
