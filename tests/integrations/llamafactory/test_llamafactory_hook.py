"""The patched names of LLaMA-Factory do what ours do, on a real model in one process; and when adapters are merged."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import yaml

from kt_sft.integrations.llamafactory import adapters as hooked
from tests.helpers import tiny_models
from tests.helpers.llamafactory_runs import drive, train_config, workspace

PATCHED = """
import peft, torch
from llamafactory.model import adapter, loader
import kt_sft
from kt_sft.models.spec import iter_routed_experts

def bound(model):
    return [experts.lora is not None for _, experts in iter_routed_experts(model)]

def config():
    return peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")

directory, saved, ruled = given
model = kt_sft.load_model(directory)
names = adapter.find_all_linear_modules(model, True)
before = loader.count_parameters(model)
trained = adapter.get_peft_model(model, config())
made = bound(trained)
trained.save_pretrained(saved)
counts = loader.count_parameters(trained)
loaded = adapter.PeftModel.from_pretrained(kt_sft.load_model(directory), saved, is_trainable=True)
from llamafactory.hparams import get_train_args
model_args, _, _, finetuning_args, _ = get_train_args(ruled)
tokenizer = loader.load_tokenizer(model_args)["tokenizer"]
placed = loader.load_model(tokenizer, model_args, finetuning_args, is_trainable=True)
formats = [experts.formats[0] for _, experts in iter_routed_experts(placed)]
give({"names": sorted(names), "before": before, "made": made, "counts": counts, "loaded": bound(loaded),
      "again": loader.count_parameters(loaded), "formats": formats})
"""


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """On DeepSeek-V2, whose router is a linear layer."""
    root = tmp_path_factory.mktemp("hook")
    directory = tiny_models.build("deepseek_v2", root / "model")
    experts = {"class": "RoutedExperts", "kwargs": {"backend": "${last}"}}
    rules = [{"match": {"class": "Qwen3MoeExperts", "layers": 1}, "replace": experts}]
    (root / "rules.yaml").write_text(yaml.safe_dump({"vars": {"last": "BF16"}, "rules": rules}))
    settings = {"kt_optimize_rule": str(root / "rules.yaml"), "kt_rule_vars": {"last": "INT4"}, "kt_method": "INT8"}
    ruled = train_config(workspace(root / "ruled"), "out", **settings)
    return drive(PATCHED, str(directory), str(root / "adapter"), ruled), tiny_models.load_stock(directory)


def test_names_that_loading_uses_are_ours(patched):
    found, stock = patched
    assert found["made"] and all(found["made"]) and found["loaded"] == found["made"]
    total = sum(parameter.numel() for parameter in stock.parameters())
    assert found["before"][1] == total
    trainable, every = found["counts"]
    assert found["again"] == found["counts"] and trainable > 0 and every == total + trainable


def test_all_is_every_linear_layer_but_the_router(patched):
    found, stock = patched
    linears = {name.rpartition(".")[2] for name, m in stock.named_modules() if type(m).__name__ == "Linear"}
    assert "gate" not in found["names"]
    assert set(found["names"]) == linears - {"gate", "lm_head"}


def test_llamafactory_follows_the_rules(patched):
    assert patched[0]["formats"] == ["int8", "int4"]


@pytest.mark.parametrize(
    ("export_dir", "is_trainable", "creates", "keeps_apart"),
    [
        (None, False, False, True),  # chat
        (None, True, False, True),  # goes on with an adapter
        (None, True, True, False),  # a new one on the merged one
        ("out", False, False, False),  # export
    ],
    ids=["chat", "continue", "new", "export"],
)
def test_adapters_are_merged_for_export_and_below_a_new_one_only(export_dir, is_trainable, creates, keeps_apart):
    """Within the context LLaMA-Factory sees `use_kt`, which has it keep an adapter apart."""
    model_args = SimpleNamespace(export_dir=export_dir, kt_active=True, use_kt=False)
    finetuning_args = SimpleNamespace(create_new_adapter=creates)
    with hooked.merging(model_args, finetuning_args, is_trainable):
        assert model_args.use_kt is keeps_apart
    assert model_args.use_kt is False
    stock_args = SimpleNamespace(export_dir=export_dir, use_kt=False)
    with hooked.merging(stock_args, finetuning_args, is_trainable):
        assert stock_args.use_kt is False
