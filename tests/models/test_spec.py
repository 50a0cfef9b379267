"""Which models are supported, and where their checkpoints keep each expert: derived from transformers."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from kt_sft.errors import FormatError, UnsupportedModel
from kt_sft.models.activations import activation_name
from kt_sft.models.auto_class import auto_class
from kt_sft.models.expert_keys import KeyMap
from kt_sft.models.layout import ExpertsSpec
from kt_sft.models.spec import experts_spec, find_experts
from tests.helpers import tiny_models
from tests.helpers.reference import GATES

SHAPES = {
    "qwen3_moe": (ExpertsSpec(7, 48, 20), ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]),
    "mixtral": (ExpertsSpec(5, 56, 36), ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]),
    "deepseek_v2": (ExpertsSpec(6, 52, 28), ["model.layers.1.mlp.experts", "model.layers.2.mlp.experts"]),
    "deepseek_v3": (ExpertsSpec(8, 44, 20), ["model.layers.1.mlp.experts", "model.layers.2.mlp.experts"]),
}


def on_meta(config):
    with torch.device("meta"):
        return auto_class(config).from_config(config)


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
    message = r"mlp\.experts .*gate activation: expected gelu or gelu_tanh or relu or silu, found QuickGELUActivation"
    with pytest.raises(UnsupportedModel, match=message):
        find_experts(on_meta(tiny_models.config("qwen3_moe", hidden_act="quick_gelu")))


ACTS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
}  # fmt: skip


@pytest.mark.parametrize("name", ACTS)
def test_activations_are_known_and_mean_what_the_kernels_compute(name):
    module = experts_of("qwen3_moe", hidden_act=name)
    assert experts_spec(module, "x").activation == ACTS[name]
    gate = torch.linspace(-6.0, 6.0, 101, dtype=torch.float64)
    want = GATES[ACTS[name]](gate, torch.ones_like(gate))
    torch.testing.assert_close(module.act_fn(gate), want, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("act_fn", [nn.GELU(), nn.GELU("tanh"), nn.functional.silu, nn.functional.relu])
def test_functions_and_torch_modules_are_known(act_fn):
    gate = torch.linspace(-6.0, 6.0, 101, dtype=torch.float64)
    want = GATES[activation_name(act_fn)](gate, torch.ones_like(gate))
    torch.testing.assert_close(act_fn(gate), want, rtol=1e-7, atol=1e-9)


def test_gpt_oss_says_its_layout():
    spec = ExpertsSpec(5, 56, 36, "clamped_swiglu", True, True, True, alpha=1.702, limit=7.0)
    assert set(find_experts(on_meta(tiny_models.config("gpt_oss"))).values()) == {spec}
    assert (spec.gate_up_shape, spec.down_shape) == ((5, 56, 72), (5, 36, 56))


def test_llama4_with_another_activation_is_refused():
    with pytest.raises(
        UnsupportedModel, match=r"Llama4TextExperts\), gate: expected an activation among gelu, .* found"
    ):
        find_experts(on_meta(tiny_models.config("llama4_text", hidden_act="mish")))


def test_interleaved_outputs_are_reordered():
    spec = ExpertsSpec(1, 3, 4, is_interleaved=True)
    gate, up = torch.randn(4, 3), torch.randn(4, 3)
    joined = spec.join_gate_up(gate, up)
    assert torch.equal(joined[0], gate[0]) and torch.equal(joined[1], up[0])
    assert torch.equal(joined[spec.gate_rows], gate) and torch.equal(joined[spec.up_rows], up)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("is_transposed", True, r"found transposed \[in, out\]"),
        ("has_gate", False, "found no gate"),
        ("has_bias", True, "expected no bias, found a bias"),
    ],
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


@pytest.mark.parametrize("turned", [False, True])
def test_orientation_of_fused_tensors_follows_their_shape(turned):
    mapping, specs = key_map("qwen3_vl_moe")
    name, spec = next(iter(specs.items()))
    keys = {f"{module}.{p}": spec.stored_shape(p, turned) for module in specs for p in ("gate_up_proj", "down_proj")}
    layer = mapping.layers(keys, "file", keys.get)[name]
    assert layer.expected_shapes() == {key: shape for key, shape in keys.items() if key.startswith(name)}
    stored = torch.randn(keys[f"{name}.gate_up_proj"]), torch.randn(keys[f"{name}.down_proj"])
    gate_up, down = (t.mT if turned else t for t in stored)
    parts = [
        part.matrix(tensor[part.rows])
        for part, tensor in zip(layer.expert(2), (stored[0], stored[0], stored[1]), strict=True)
    ]
    assert torch.equal(torch.cat(parts[:2]), gate_up[2]) and torch.equal(parts[2], down[2])


def test_missing_biases_are_named():
    mapping, specs = key_map("gpt_oss")
    keys = [f"{name}.{bias}" for name, spec in specs.items() for bias in spec.bias_shapes]
    assert mapping.missing_biases(keys) == []
    assert mapping.missing_biases(keys[1:]) == ["model.layers.0.mlp.experts.gate_up_proj_bias"]


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


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("NemotronHConfig", r"NemotronHExperts\), experts: expected gate and up projections, found no gate"),
        ("GraniteMoeConfig", r"model type 'granitemoe': expected a mixture-of-experts model .* no routed experts"),
        ("JetMoeConfig", r"model type 'jetmoe': expected a mixture-of-experts model .* no routed experts"),
        ("LongcatFlashConfig", r"model type 'longcat_flash': expected a mixture-of-experts model .* no routed experts"),
    ],
)
def test_what_cannot_work_yet_is_refused_by_name(config, message):
    settings = getattr(transformers, config)()
    with pytest.raises(UnsupportedModel, match=message):
        find_experts(on_meta(settings))
