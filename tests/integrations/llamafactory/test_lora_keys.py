"""Faults of a LoRA target bear the names of LLaMA-Factory's keys wherever they are found in one of its runs."""

from __future__ import annotations

import re

import pytest
from peft import LoraConfig

import kt_sft
from kt_sft.errors import ConfigError
from kt_sft.integrations.llamafactory import adapters
from tests.helpers import tiny_models

OF_PEFT = re.compile(r"target_modules|modules_to_save|target_parameters|exclude_modules|expert_lora=|LoRA target|\br:")
FAULTS = {
    "typo": ({"target_modules": ["q_prj"]}, "lora_target: 'q_prj' names no layer"),
    "expression": ({"target_modules": [r".*\.(q_proj|v_proj)"]}, "a list, which holds names .*; name the layers"),
    "no layer": ({"target_modules": ["q_proj", "gate"]}, "lora_target: 'gate' names .* leave it out"),
    "saved": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_haed"]}, "additional_target: 'lm_haed' names no"),
    "saved experts": ({"target_modules": ["q_proj"], "modules_to_save": ["experts"]}, "additional_target: 'experts'"),
    "nothing": ({"target_modules": ["experts"]}, "lora_target: nothing is left to train"),
    "rank": ({"target_modules": ["experts"], "r": 300}, "lora_rank: .* or set kt_expert_lora: false"),
    "dora": ({"target_modules": ["experts"], "use_dora": True}, "use_dora: .* kt_expert_lora: false"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_models.build("qwen3_moe", tmp_path_factory.mktemp("keys") / "model")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_by_the_key(base, fault):
    values, words = FAULTS[fault]
    model, config = kt_sft.load_model(base), LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **values})
    with pytest.raises(ConfigError, match=words) as caught, adapters.under_keys():
        kt_sft.get_peft_model(model, config, expert_lora=False if fault == "nothing" else None)
    assert not OF_PEFT.search(str(caught.value)) and "\n" not in str(caught.value)
