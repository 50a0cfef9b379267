"""The memory that examples and README state is what `kt-sft plan` computes, for the models that they name."""

from __future__ import annotations

import re

import pytest
import yaml

from kt_sft.errors import GIB
from tests.helpers import example_figures, rule_models
from tests.helpers.example_figures import EXAMPLES, MODELS, ROOT, large_examples, planned

RERUN = "run `python -m tests.helpers.example_figures`"


@pytest.mark.parametrize("path", large_examples(), ids=lambda path: path.relative_to(EXAMPLES).as_posix())
def test_headers_state_what_plan_computes(path):
    assert path.read_text(encoding="utf-8") == example_figures.with_figures(path), RERUN


def test_pages_state_what_plan_computes():
    assert (EXAMPLES / "README.md").read_text(encoding="utf-8") == example_figures.examples_page(), RERUN
    assert (ROOT / "README.md").read_text(encoding="utf-8") == example_figures.readme(), RERUN


# Billions of parameters, as the models' publishers state them.
@pytest.mark.parametrize(("name", "billions"), [
    ("deepseek_v2_lite", 15.7), ("deepseek_v2", 236), ("deepseek_v3", 671), ("kimi_k2", 1026), ("qwen3_moe", 30.5),
    ("qwen3_moe_235b", 235), ("mixtral", 46.7),
])  # fmt: skip
def test_configs_have_the_published_numbers_of_parameters(name, billions):
    model = rule_models.on_meta(rule_models.published_config(name))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=2e-3)


def test_the_weights_of_a_plan_are_all_of_the_model():
    """Outside the experts in bf16 on the GPU, the experts packed: bf16 tiles pad none of these shapes."""
    for name in ("deepseek_v2_lite", "deepseek_v3", "qwen3_moe"):
        plan = planned(EXAMPLES / "train_lora" / f"{name}.yaml")
        model = rule_models.on_meta(rule_models.published_config(name))
        held = sum(memory.weights_bytes + memory.experts_bytes for memory in plan.memory.values())
        buffers = sum(buffer.numel() for buffer in model.buffers())
        assert held == 2 * (sum(p.numel() for p in model.parameters()) + buffers)


def test_every_large_example_is_held_and_has_its_chat():
    trained = {path.name for path in EXAMPLES.glob("train_lora/*.yaml")}
    assert trained == {path.name for path in EXAMPLES.glob("chat/*.yaml")}
    assert {path.name for path in large_examples()} == trained - {"tiny_moe.yaml"}
    for name in trained:
        train, chat = (yaml.safe_load((EXAMPLES / kind / name).read_text()) for kind in ("train_lora", "chat"))
        assert chat["adapter_name_or_path"] == train["output_dir"]
        same = ("model_name_or_path", "template", "kt_optimize_rule", "kt_rule_vars", "default_system")
        assert [chat.get(key) for key in same] == [train.get(key) for key in same]
        assert chat.get("kt_method", "BF16") == train["kt_method"]


def test_deepseek_v3_fits_two_gpus_of_24_gb():
    main, *gpus = planned(EXAMPLES / "train_lora" / "deepseek_v3_int8_two_gpus.yaml").memory.values()
    assert len(gpus) == 2 and all(held.total_bytes < 22 * GIB for held in gpus)
    assert main.experts_bytes == planned(EXAMPLES / "train_lora" / "deepseek_v3_int8.yaml").memory["cpu"].experts_bytes


def test_disk_is_the_size_of_the_checkpoint():
    for config, stated_gb in MODELS.values():
        model = rule_models.on_meta(rule_models.published_config(config))
        bytes_each = 1 if config == "deepseek_v3" else 2  # FP8; 14 B more for multi-token prediction
        assert stated_gb == pytest.approx(bytes_each * sum(p.numel() for p in model.parameters()) / 1e9, rel=0.03)


def test_a_figure_that_is_off_is_seen(tmp_path):
    path = EXAMPLES / "train_lora" / "qwen3_moe.yaml"
    off = tmp_path / "qwen3_moe.yaml"
    off.write_text(re.sub(r"GPU: [\d.]+ GiB", "GPU: 16 GiB", path.read_text(encoding="utf-8")))
    assert off.read_text() != path.read_text() and example_figures.with_figures(off) == path.read_text()
