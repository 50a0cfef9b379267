"""DPO and KTO with a reference model of its own: it computes its own checkpoint, whatever keys the policy has."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from kt_sft.config import KTConfig
from kt_sft.integrations.transformers.converting import convert_checkpoint
from tests.helpers import gguf_models, tiny_models
from tests.helpers.llamafactory_runs import drive, environment, train_config, workspace
from tests.helpers.tiny_tokenizer import VOCAB_SIZE, save_tiny_tokenizer

RULES = [
    {"match": {"class": "Qwen3MoeExperts"}, "replace": {"class": "RoutedExperts", "kwargs": {"method": "INT8"}}},
]
SCRIPT = """
import logging, torch
from llamafactory.hparams import get_train_args
from llamafactory.train.trainer_utils import create_ref_model
from kt_sft import memory
from kt_sft.errors import KTError
from tests.helpers import tiny_models

class Kept(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())

logging.getLogger("kt_sft").addHandler(Kept())
answers, available = [], memory.available_memory
for config, free in given[0]:
    lines = []
    if free is not None:
        memory.available_memory = lambda: memory.AvailableMemory(free, "a test")
    try:
        model_args, _, _, finetuning_args, _ = get_train_args(config)
        model = create_ref_model(model_args, finetuning_args) if free is None else None
        logits = model(tiny_models.token_ids()).logits.detach().float().tolist() if model is not None else None
        answers.append({"logits": logits, "lines": lines})
    except KTError as error:
        answers.append({"error": str(error), "lines": lines})
    if free is not None:  # that one of them alone fits
        get_train_args({**config, "ref_model": None})
    memory.available_memory = available
give(answers)
"""


@contextmanager
def no_bar(what, total):
    yield lambda *moved: None


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    work = workspace(tmp_path_factory.mktemp("references"))
    sizes = {"vocab_size": VOCAB_SIZE + 5, "max_position_embeddings": 512}
    for name, family, seed in (("other", "qwen3_moe", 3), ("mixtral", "mixtral", 4)):
        save_tiny_tokenizer(tiny_models.build(family, work / name, seed=seed, **sizes))
    convert_checkpoint(work / "model", work / "packed", KTConfig(method="INT8"), bar=no_bar)
    (work / "rules.json").write_text(json.dumps(RULES))
    torch.manual_seed(5)
    tuned = get_peft_model(tiny_models.load_stock(work / "other"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    tuned.save_pretrained(work / "adapter")
    gguf_models.write_model(work / "other", work / "other.gguf")
    return work


@pytest.fixture(scope="module")
def answers(work):
    def run(free=None, **keys):
        keys = {"stage": "dpo", "ref_model": str(work / "other"), **keys}
        return train_config(work, "out", **keys), free

    model, packed = str(work / "model"), str(work / "packed")
    cases = {
        "plain": run(),
        "weight_path": run(kt_weight_path=model),
        "kto": run(stage="kto", kt_expert_checkpoint_path=model),
        "container": run(kt_weight_path=packed, kt_method="INT8"),
        "cache": run(kt_weight_cache=str(work / "cache")),
        "rules": run(kt_weight_path=model, kt_optimize_rule=str(work / "rules.json")),
        "rules_of_another": run(ref_model=str(work / "mixtral"), kt_optimize_rule=str(work / "rules.json")),
        "adapter": run(ref_model_adapters=str(work / "adapter"), kt_weight_path=model, adapter_folder="best"),
        "gguf": run(ref_model=str(work / "other.gguf"), kt_weight_path=model),
        "same": run(ref_model=f"{model}/.", kt_weight_path=packed, kt_method="INT8"),
        "same_with_experts_of_another": run(ref_model=f"{model}/.", kt_weight_path=str(work / "other")),
        "no_reference": run(ref_model=None),
        "goes_on": run(ref_model=None, adapter_name_or_path=str(work / "adapter")),
        "new_adapter": run(ref_model=None, adapter_name_or_path=str(work / "adapter"), create_new_adapter=True),
        "no_effect": run(stage="sft"),
        "no_reward": run(stage="sft", ref_model=None, reward_model="nowhere", reward_model_adapters="nowhere"),
        "no_effect_simpo": run(pref_loss="simpo"),
        "missing": run(ref_model=str(work / "nowhere"), dataset="no data is read before this"),
        "container_as_model": run(ref_model=packed),
        "method_gguf": run(kt_method="GGUF", kt_weight_path=str(work / "other.gguf")),
        "quantized": run(ref_model_quantization_bit=4),
        "adapter_alone": run(ref_model=None, ref_model_adapters=str(work / "adapter")),
        "adapter_of_another": run(ref_model=str(work / "mixtral"), ref_model_adapters=str(work / "adapter")),
        "one_fits": run(free=300_000),
    }
    env = environment(HOME=str(work))  # the cache of model directories
    return dict(zip(cases, drive(SCRIPT, list(cases.values()), env=env), strict=True))


def logits(directory: Path, adapter: Path | None = None) -> torch.Tensor:
    from peft import PeftModel

    model = tiny_models.load_stock(directory)
    model = PeftModel.from_pretrained(model, adapter) if adapter else model
    return model(tiny_models.token_ids()).logits.detach()


@pytest.mark.parametrize(("case", "reference", "bound"), [
    ("plain", "other", 0.02), ("weight_path", "other", 0.02), ("kto", "other", 0.02), ("cache", "other", 0.02),
    ("container", "other", 0.06), ("rules", "other", 0.06), ("rules_of_another", "mixtral", 0.02),
    ("gguf", "other", 0.03), ("same", "model", 0.06),
])  # fmt: skip
def test_reference_computes_its_own_checkpoint(work, answers, case, reference, bound):
    want = logits(work / reference)
    got = torch.tensor(answers[case]["logits"])
    assert float((got - want).norm() / want.norm()) < bound, answers[case]["lines"]


def test_reference_of_the_same_model_has_the_policys_experts(work, answers):
    """They are not those of the model directory here. A token near a tie may take other experts: the median counts."""
    stock, other = (tiny_models.load_stock(work / name) for name in ("model", "other"))
    for name, parameter in stock.named_parameters():
        if ".experts." in name:
            parameter.data.copy_(other.get_parameter(name))
    want = stock(tiny_models.token_ids()).logits.detach()
    got, own = torch.tensor(answers["same_with_experts_of_another"]["logits"]), logits(work / "model")
    errors, effects = ((found - want).norm(dim=-1) / want.norm(dim=-1) for found in (got, own))
    assert float(errors.median()) < 0.02 < 0.1 < float(effects.median())


def test_reference_has_its_own_adapter(work, answers):
    base, want = logits(work / "other"), logits(work / "other", work / "adapter")
    got = torch.tensor(answers["adapter"]["logits"])
    assert float((got - want).norm() / want.norm()) < 0.02 < 0.1 < float((base - want).norm() / want.norm())


@pytest.mark.parametrize(("case", "words"), [
    ("rules_of_another", ["ref_model", "kt_optimize_rule", "qwen3_moe"]),
    ("no_effect", ["ref_model", "no effect"]),
    ("no_reward", ["reward_model, reward_model_adapters: no effect", "no reward model"]),
    ("no_effect_simpo", ["ref_model", "no effect"]),
])  # fmt: skip
def test_what_does_not_apply_is_said(answers, case, words):
    assert any(all(word in line for word in words) for line in answers[case]["lines"]), answers[case]


def test_without_a_reference_the_policy_is_one(answers):
    assert answers["no_reference"] == answers["new_adapter"] == {"logits": None, "lines": []}
    (line,) = answers["goes_on"]["lines"]
    assert "the reference is the base model without the adapter" in line and "create_new_adapter" in line


@pytest.mark.parametrize(("case", "words"), [
    ("missing", ["ref_model", "nowhere", "correct the path"]),
    ("container_as_model", ["ref_model", "packed", "container", "checkpoint"]),
    ("method_gguf", ["ref_model", "other", "GGUF", "kt_method"]),
    ("quantized", ["ref_model_quantization_bit", "kt_method"]),
    ("adapter_alone", ["ref_model_adapters", "ref_model"]),
    ("adapter_of_another", ["ref_model", "adapter"]),
    ("one_fits", ["memory", "policy", "ref_model", "needed"]),
])  # fmt: skip
def test_refusal_is_one_line(answers, case, words):
    answer = answers[case].get("error", "")
    assert answer and "\n" not in answer and all(word in answer for word in words), answers[case]
