"""Values that no model can have, by name of the key; and those of every family, which all can."""

from __future__ import annotations

import json
import math

import pytest
import transformers

from kt_sft.errors import FormatError
from kt_sft.formats.config_values import check_values, find_faults
from tests.helpers.families import FAMILIES
from tests.helpers.family_parts import COMMON, composite

GOOD = {
    "model_type": "deepseek_v3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 128,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32},
    "layer_types": ["full_attention"] * 4,
    "eos_token_id": [1, 2],
    "pad_token_id": None,
    "max_position_embeddings": 1 << 20,
    "tie_word_embeddings": False,
}
NO_COUNTS = (0, -1, 10**9, 2**63, 1.5, math.inf, math.nan, "8", True, {}, [[8]])
COUNTS = ("hidden_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "head_dim")
WRONG = [
    *((name, value) for name in COUNTS for value in NO_COUNTS),
    *((name, value) for name in ("n_routed_experts", "num_key_value_heads", "n_group") for value in NO_COUNTS[1:]),
    *(("num_experts_per_tok", value) for value in (0, -1, 9, 10**12, 2.5, "2")),
    *(
        (name, value)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        for value in (128, -1, 2**40, "1", 1.5)
    ),
    *(("eos_token_id", value) for value in ([1, 128], [1, -1], ["1"], [[1]], [None], {}, True)),
    ("image_token_id", -5),
    *(("rms_norm_eps", value) for value in (0, -1e-6, 2.0, math.nan, math.inf, "1e-6", [], False)[:6]),
    *(("rope_theta", value) for value in (0, -1.0, math.nan, math.inf, "10000", {})),
    *(("routed_scaling_factor", value) for value in (0, -1.0, math.nan, math.inf, 1e30, "2.5", True)),
    ("first_k_dense_replace", 5),
    ("first_k_dense_replace", -1),
    ("n_group", 3),
    ("topk_group", 5),
    ("topk_group", 0),
    ("num_key_value_heads", 3),
    ("layer_types", ["full_attention"] * 3),
    ("layer_types", "full_attention"),
    ("mlp_only_layers", [0, 4]),
    ("mlp_only_layers", [-1]),
    ("moe_layer_freq", [1] * 9),
    ("decoder_sparse_step", 0),
    ("expert_layer_period", 0),
    ("num_labels", 10**9),
    ("num_mtp_modules", 10**6),
    ("num_anything", 10**9),
    ("any_dim", 2**40),
    ("anything", math.nan),
    ("anything", 10**300),
    ("model_type", ["x"]),
    ("hidden_act", 5),
    ("architectures", "X"),
    ("text_config", [1]),
    ("rope_scaling", "yarn"),
    ("rope_scaling", {"factor": 0}),
    ("rope_scaling", {"factor": math.nan}),
    ("rope_scaling", {"full_attention": {"rope_theta": -1}}),
    ("rope_scaling", {"original_max_position_embeddings": -4}),
    ("rope_scaling", {"long_factor": [1.0, math.inf]}),
    ("rope_parameters", {"beta_fast": "32"}),
    ("vision_config", {"depth": 10**9}),
    ("text_config", {"num_hidden_layers": 10**9}),
    ("text_config", {"thinker_config": {"hidden_size": 0}}),
]


def test_a_good_one():
    assert find_faults(GOOD) == []


@pytest.mark.parametrize(("key", "value"), WRONG, ids=lambda part: repr(part)[:40])
def test_values_that_no_model_has(key, value):
    with pytest.raises(FormatError, match=rf"^config\.json: {key}\S*: expected .*, found .*; correct it, or") as raised:
        check_values("config.json", {**GOOD, key: value})
    assert str(raised.value).isprintable() and len(str(raised.value)) < 500


def test_keys_without_end():
    many = {f"k{number}": {f"l{other}": 1 for other in range(200)} for number in range(100)}
    with pytest.raises(FormatError, match="keys: expected at most 10000 of them"):
        check_values("config.json", many)
    assert find_faults({**GOOD, "id2label": {str(number): "x" for number in range(20_000)}}) == []


def test_all_of_them_are_counted():
    with pytest.raises(FormatError, match=r"hidden_size: expected .* found 0 \(and 1 more keys\)"):
        check_values("config.json", {**GOOD, "hidden_size": 0, "vocab_size": -1})


def test_experts_of_a_token_come_from_the_groups_that_are_used():
    with pytest.raises(FormatError, match="topk_group: expected groups that hold the 5 experts of a token, 2 in each"):
        check_values("config.json", {**GOOD, "num_experts_per_tok": 5})


def test_what_is_unknown_or_has_its_own_meaning_passes():
    odd = {"time_step_limit": [0.0, math.inf], "vision_feature_layer": -1, "moe_layer_end_index": -1, "x": {"y": [1]}}
    odd |= {
        "num_parameters": 10**12,
        "mamba_dt_rank": "auto",
        "hidden_size_per_layer_input": 0,
        "moe_topk": [2] * 4,
        "id2label": {"0": "A"},
    }
    assert find_faults({**GOOD, **odd, "quantization_config": {"bits": -1}}) == []


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_passes(name):
    family = FAMILIES[name]
    values = composite(family.values) if "text_config" in family.values else {**COMMON, **family.values}
    config = getattr(transformers, family.config_class)(**values)
    assert find_faults(json.loads(config.to_json_string(use_diff=True)) | family.config_json) == []
    assert find_faults(config.to_dict(), has_defaults=True) == []
    assert find_faults(getattr(transformers, family.config_class)().to_dict(), has_defaults=True) == []
