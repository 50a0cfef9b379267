"""Which models are supported, and where their checkpoints keep each expert: derived from transformers."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from kt_sft.errors import FormatError, UnsupportedModel
from kt_sft.models.expert_keys import KeyMap
from kt_sft.models.spec import ExpertsSpec, experts_spec, find_experts
from tests.helpers import tiny_models

SHAPES = {
    "qwen3_moe": (ExpertsSpec(7, 48, 20), ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]),
    "mixtral": (ExpertsSpec(5, 56, 36), ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]),
    "deepseek_v2": (ExpertsSpec(6, 52, 28), ["model.layers.1.mlp.experts", "model.layers.2.mlp.experts"]),
    "deepseek_v3": (ExpertsSpec(8, 44, 20), ["model.layers.1.mlp.experts", "model.layers.2.mlp.experts"]),
}


def on_meta(config):
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def experts_of(family, **overrides):
    model = on_meta(tiny_models.config(family, **overrides))
    return next(module for module in model.modules() if type(module).__name__.endswith("Experts"))


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_spec_is_read_off_the_experts_modules(family):
    spec, names = SHAPES[family]
    assert find_experts(on_meta(tiny_models.config(family))) == dict.fromkeys(names, spec)


def test_dense_model_is_refused_by_type():
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(
        UnsupportedModel, match=r"model type 'llama': expected a mixture-of-experts .* no routed experts"
    ):
        find_experts(on_meta(config))


def test_other_activation_is_refused():
    with pytest.raises(UnsupportedModel, match=r"mlp\.experts .*gate activation: expected silu, found GELUActivation"):
        find_experts(on_meta(tiny_models.config("qwen3_moe", hidden_act="gelu")))


@pytest.mark.parametrize("name", ["silu", "swish"])
def test_both_spellings_of_silu_are_known(name):
    assert experts_spec(experts_of("qwen3_moe", hidden_act=name), "x").activation == "silu"


def test_bias_is_refused():
    config = transformers.GptOssConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    with pytest.raises(UnsupportedModel, match=r"GptOssExperts.*expected no bias, found a bias"):
        find_experts(on_meta(config))


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [("is_transposed", True, r"found transposed \[in, out\]"), ("has_gate", False, "found no gate")],
)
def test_other_layouts_are_refused(attribute, value, message):
    module = experts_of("mixtral")
    setattr(module, attribute, value)
    with pytest.raises(UnsupportedModel, match=message):
        experts_spec(module, "layer")


def test_own_gate_is_refused():
    module = experts_of("mixtral")
    module.__class__ = type("OtherExperts", (type(module),), {"_apply_gate": lambda self, x: x})
    with pytest.raises(UnsupportedModel, match=r"layer \(OtherExperts\), gate: .* found a gate function of its own"):
        experts_spec(module, "layer")


def test_extra_parameters_are_refused():
    module = experts_of("mixtral")
    module.scale = nn.Parameter(torch.ones(3))
    with pytest.raises(UnsupportedModel, match="'scale': \\(3,\\)"):
        experts_spec(module, "layer")


def key_map(family, **overrides):
    model = on_meta(tiny_models.config(family, **overrides))
    specs = find_experts(model)
    return KeyMap(model, specs), specs


def per_expert_keys(family, specs, *, prefix="model."):
    block = "block_sparse_moe" if family == "mixtral" else "mlp"
    names = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    return {
        (name, e, p): f"{prefix}layers.{name.split('.')[2]}.{block}.experts.{e}.{suffix}.weight"
        for name, spec in specs.items()
        for e in range(spec.num_experts)
        for p, suffix in zip(("gate", "up", "down"), names)
    }


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_hub_names_of_every_family_are_mapped(family, prefix):
    mapping, specs = key_map(family)
    keys = per_expert_keys(family, specs, prefix=prefix)
    layers = mapping.layers(keys.values(), "file")
    assert list(layers) == list(specs)
    for name, spec in specs.items():
        for e in range(spec.num_experts):
            found = [part.key for part in layers[name].expert(e)]
            assert found == [keys[name, e, p] for p in ("gate", "up", "down")]
        shapes = layers[name].expected_shapes()
        assert shapes[keys[name, 0, "gate"]] == (spec.inter, spec.hidden)
        assert shapes[keys[name, 0, "down"]] == (spec.hidden, spec.inter)


def test_fused_tensors_are_sliced_gate_before_up():
    mapping, specs = key_map("qwen3_moe")
    keys = [f"{name}.{p}" for name in specs for p in ("gate_up_proj", "down_proj")]
    layer = next(iter(mapping.layers(keys, "file").values()))
    gate, up, down = layer.expert(3)
    assert (gate.rows, up.rows, down.rows) == ((3, slice(0, 20)), (3, slice(20, 40)), (3,))
    assert layer.expected_shapes() == {keys[0]: (7, 40, 48), keys[1]: (7, 48, 20)}


def test_layer_beyond_the_model_is_left_out():
    mapping, specs = key_map("deepseek_v3")
    keys = list(per_expert_keys("deepseek_v3", specs).values())
    extra = [key.replace("layers.2.", "layers.3.") for key in keys if "layers.2." in key]
    assert list(mapping.layers([*keys, *extra], "file")) == list(specs)


def test_missing_expert_is_named():
    mapping, specs = key_map("mixtral")
    keys = per_expert_keys("mixtral", specs)
    del keys["model.layers.1.mlp.experts", 2, "up"]
    with pytest.raises(FormatError, match=r"layers\.1\.mlp\.experts: .* found 1 missing, first expert 2 up"):
        mapping.layers(keys.values(), "file")


def test_layer_without_any_expert_tensor_is_named():
    mapping, specs = key_map("mixtral")
    with pytest.raises(FormatError, match=r"layers\.0\.mlp\.experts: .* found 15 missing, first expert 0"):
        mapping.layers([], "file")


def test_more_experts_than_the_config_says_are_refused():
    mapping, specs = key_map("mixtral")
    keys = [*per_expert_keys("mixtral", specs).values(), "model.layers.0.block_sparse_moe.experts.5.w1.weight"]
    with pytest.raises(FormatError, match="expected 5 experts, found expert 5"):
        mapping.layers(keys, "file")


def test_fused_and_single_tensors_together_are_refused():
    mapping, specs = key_map("qwen3_moe")
    keys = [*per_expert_keys("qwen3_moe", specs).values(), "model.layers.0.mlp.experts.down_proj"]
    with pytest.raises(FormatError, match="found both"):
        mapping.layers(keys, "file")


def test_shape_of_other_tensors_is_known():
    mapping, _ = key_map("qwen3_moe")
    assert mapping.plain_shape("model.embed_tokens.weight") == (tiny_models.VOCAB, 48)
    assert mapping.plain_shape("model.layers.0.mlp.experts.0.up_proj.weight") is None
    assert mapping.plain_shape("something.else") is None
