"""The table of refused LoRA options: each row is refused at each of its doors, in the words of that door."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig

import kt_sft
from kt_sft.adapters import forms, options
from kt_sft.errors import ConfigError, KTError
from kt_sft.integrations.llamafactory import args
from kt_sft.integrations.merge.checkpoint import MergedCheckpoint
from kt_sft.integrations.peft.targets import plain_values
from kt_sft.integrations.transformers.opened import OpenedModel
from tests.helpers import adapters, parity, tiny_models
from tests.helpers.adapter_doors import Doors
from tests.helpers.adapters import edit

ROOT = Path(__file__).resolve().parents[2]
KEYS = {"r": "lora_rank", "init_lora_weights": "pissa_init"}  # of LLaMA-Factory, where they differ
VALUES = {
    "r": 300, "init_lora_weights": "pissa", "alora_invocation_tokens": [1], "arrow_config": {"top_k": 1},
    "megatron_config": {"a": 1}, "layer_replication": [[0, 1]], "bias": "lora_only",
}  # fmt: skip
CASES = [(row, door) for row in options.REFUSALS for door in row.doors]


@pytest.fixture(scope="module")
def doors(tmp_path_factory):
    return Doors(tmp_path_factory.mktemp("options"))


@pytest.fixture(scope="module")
def on_experts(tmp_path_factory):
    """An adapter of routed experts alone, which DoRA's other tensors are not missing from."""
    return adapters.make("qwen3_moe", tmp_path_factory.mktemp("experts"), targets=["experts"])


@pytest.fixture(scope="module")
def with_biases(tmp_path_factory):
    folder = tiny_models.build("qwen3_moe", tmp_path_factory.mktemp("biases") / "base", attention_bias=True)
    return kt_sft.load_model(folder)


def value_of(row: options.Refusal, door: str) -> object:
    is_begun = row.option == "init_lora_weights" and door == options.LOAD and row.scope is None
    return "corda" if is_begun else VALUES.get(row.option, True)


def wider(name: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
    """Zeros in the place of a factor of rank 3."""
    (rows, columns), factor = tensor.shape, rank // 3
    return torch.zeros(rows * factor, columns) if "lora_A" in name else torch.zeros(rows, columns * factor)


def call(
    doors: Doors, on_experts: Path, with_biases, row: options.Refusal, door: str, value: object, folder: Path
) -> None:
    if door == options.RUN:
        key = KEYS.get(row.option, row.option)
        values = {"use_kt": True, "finetuning_type": "lora", "stage": "sft", "infer_backend": "huggingface"}
        run = {"lora_rank": 8, "lora_target": ["all"], **values, key: True if key == "pissa_init" else value}
        args.check(SimpleNamespace(**run))
    elif door == options.TRAIN:
        config = parity.all_linear()
        setattr(config, row.option, value)
        model = with_biases if row.scope == options.BIASES else doors.model
        kt_sft.get_peft_model(model, config, expert_lora=row.scope == options.EXPERTS)
    else:
        adapter = shutil.copytree(on_experts, folder / "adapter")
        edit(adapter, **{row.option: value})
        if row.option == "r":
            adapters.damaged(lambda tensors: {name: wider(name, t, value) for name, t in tensors.items()})(adapter)
        if door == options.LOAD:
            kt_sft.load_adapter(doors.model, adapter)
        else:
            forms.open_adapter(adapter, doors.described)


@pytest.mark.parametrize(("row", "door"), CASES, ids=[f"{row.option}-{row.scope}-{door}" for row, door in CASES])
@pytest.mark.filterwarnings("ignore")
def test_every_row_is_refused_at_its_doors(doors, on_experts, with_biases, tmp_path, row, door):
    value = value_of(row, door)
    assert row.refuses(value)
    key = KEYS.get(row.option, row.option) if door == options.RUN else row.option
    with pytest.raises(KTError, match=rf"(^|: |\) ){key}") as caught:
        call(doors, on_experts, with_biases, row, door, value, tmp_path)
    assert "\n" not in str(caught.value)
    assert not [name for name, _ in doors.model.named_modules() if "lora" in name]


def test_a_door_says_it_in_its_own_words(doors, tmp_path):
    row = next(row for row in options.REFUSALS if row.option == "r")
    with pytest.raises(ConfigError, match=r"lora_rank: .* 1 to 256, got 300 .*, or set kt_expert_lora: false"):
        call(doors, tmp_path, None, row, options.RUN, 300, tmp_path)
    with pytest.raises(ConfigError, match=r"r: .* 1 to 256, got 300 for model.*, or set expert_lora=False"):
        call(doors, tmp_path, None, row, options.TRAIN, 300, tmp_path)


def test_the_rank_limit_is_that_of_the_kernels():
    header = (ROOT / "native/include/kts/lora.h").read_text(encoding="utf-8")
    assert int(re.search(r"kMaxRank = (\d+)", header)[1]) == options.MAX_RANK


def test_what_can_be_trained_and_not_merged_is_refused_when_it_is_merged(doors, tmp_path):
    """And said when training starts (tests/integrations/merge/test_merging_kinds.py)."""
    adapter = shutil.copytree(doors.adapter, tmp_path / "adapter")
    edit(adapter, init_lora_weights="olora")
    with pytest.raises(KTError, match="found 'olora', LoRA of what it left of them"):
        MergedCheckpoint(OpenedModel(doors.base), [adapter])
    assert "olora" in options.afterwards(plain_values(LoraConfig(init_lora_weights="olora")))[0]
    assert not options.afterwards(plain_values(LoraConfig(r=8)))


def test_ranks_above_the_limit_are_merged(tmp_path):
    """Merging multiplies in torch: the limit is one of the kernels."""
    doors = Doors(tmp_path)
    config = LoraConfig(r=300, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = kt_sft.get_peft_model(parity.load_ours(doors.base), config, expert_lora=False)
    model.save_pretrained(tmp_path / "wide")
    adapter = forms.open_adapter(tmp_path / "wide", doors.described)
    assert set(adapter.ranks.values()) == {300}
    assert isinstance(adapter.read_linear(adapter.linears[0]).delta(), torch.Tensor)
