"""A LoRA target that does less than it says is an error or one warning, and one line says what trains."""

from __future__ import annotations

import logging

import pytest
from peft import LoraConfig

from kt_sft.errors import ConfigError
from kt_sft.integrations import peft as kt_peft
from kt_sft.integrations.peft import coverage
from tests.helpers import parity, tiny_models

BOTH = {"gate_up_proj", "down_proj"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """family -> our model, which carries no adapter between tests."""
    root = tmp_path_factory.mktemp("checkpoints")
    models = {}

    def of(family="qwen3_moe"):
        if family not in models:
            models[family] = parity.load_ours(tiny_models.build(family, root / family))
        return models[family]

    return of


@pytest.fixture
def prepared(base, caplog):
    """(projections of experts, target modules) of a config, and the warnings on the way."""

    def of(family, **options):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            config = kt_peft.prepare_lora_config(base(family), parity.all_linear(**options))
        experts = {entry.rpartition(".")[2] for entry in config.target_parameters or []}
        return experts, set(config.target_modules), [record.getMessage() for record in caplog.records]

    return of


def faults_of(model, **options):
    config = parity.all_linear()
    for name, value in options.items():
        setattr(config, name, value)
    with pytest.raises(ConfigError) as caught:
        kt_peft.prepare_lora_config(model, config)
    assert "\n" not in str(caught.value)
    return caught.value.faults


def test_dense_layers_named_as_the_experts_matrices_leave_the_experts_frozen_and_that_is_said(prepared):
    target = ["q_a_proj", "gate_proj", "up_proj", "down_proj"]
    experts, modules, warnings = prepared("deepseek_v2", target_modules=target)
    assert (experts, modules) == (set(), set(target))
    assert len(warnings) == 1
    assert "down_proj, gate_proj, up_proj: means the dense and shared layers" in warnings[0]
    assert "the routed experts stay frozen; add 'experts'" in warnings[0]
    experts, _, warnings = prepared("deepseek_v2", target_modules=[*target, "experts"])
    assert (experts, warnings) == (BOTH, [])
    _, _, warnings = prepared("deepseek_v2", target_modules=["q_a_proj"])
    assert warnings == []


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2"])
@pytest.mark.parametrize("name", ["all", "all-linear"])
def test_all_beside_another_name_is_all_and_that(base, prepared, family, name):
    _, alone, _ = prepared(family, target_modules=[name])
    experts, modules, warnings = prepared(family, target_modules=[name, "lm_head"])
    assert (experts, modules, warnings) == (BOTH, alone | {"lm_head"}, [])
    model = kt_peft.get_peft_model(base(family), parity.all_linear(target_modules=[name, "lm_head"]))
    counts = coverage.count(model)
    model.unload()
    assert (counts["head"].trained, counts["routed experts"].trained) == (1, counts["routed experts"].present)


def test_layers_to_transform_holds_for_all(base):
    model = kt_peft.get_peft_model(base(), parity.all_linear(target_modules=["all"], layers_to_transform=[1]))
    owners = {name for name, _ in coverage.trainable(model)}
    model.unload()
    assert len(owners) == 6
    assert all(".layers.1." in name for name in owners)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["q_proj", "expert"]}, ["target_modules: 'expert' .* did you mean 'experts'"]),
        (
            {"target_modules": ["q_proj", "gate_upproj", "v_prj"]},
            ["'gate_upproj' .* mean 'gate_up_proj'", "'v_prj' .* mean 'v_proj'"],
        ),
        ({"target_modules": ["q_proj", "self_attn.o_prj"]}, ["'self_attn.o_prj' .* mean 'self_attn.o_proj'"]),
        ({"target_modules": r".*\.(q_proj|expert)"}, ["'expert' .* did you mean 'experts'"]),
        ({"target_modules": r".*\.nothing"}, ["names no module"]),
        ({"target_modules": "q_proj"}, [r"pass a list: \['q_proj'\]"]),
        ({"target_modules": r".*(q_proj"}, ["is no regular expression"]),
        ({"target_modules": ["q_proj", "gate"]}, ["'gate' names model.layers.0.mlp.gate, whose Qwen3MoeTopKRouter"]),
        ({"target_modules": ["self_attn"]}, ["a Qwen3MoeAttention that LoRA cannot wrap; name the linear layers"]),
        ({"target_modules": r".*mlp.*"}, ["model.layers.0.mlp, a Qwen3MoeSparseMoeBlock"]),
        (
            {"target_modules": ["q_proj", "model.layers.1.mlp.experts.3.down_proj"]},
            ["experts.3.down_proj' names 1 of 7 experts; .* name 'model.layers.1.mlp.experts.down_proj'"],
        ),
        ({"target_modules": ["q_proj", "experts.0"]}, ["'model.layers.0.mlp.experts.0' names 1 of 7 experts"]),
        ({"target_modules": r".*experts\.[0-3]\.down_proj"}, ["names 4 of 7 experts"]),
        ({"target_modules": ["q_proj", "experts.9.down_proj"]}, ["'experts.9.down_proj' names no layer"]),
        ({"exclude_modules": ["v_prj"]}, ["exclude_modules: 'v_prj' .* did you mean 'v_proj'"]),
        ({"exclude_modules": r".*vision.*"}, ["exclude_modules: '.*vision.*' names no module"]),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 7]}, ["expected layers 0 to 1 .* found 7"]),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layer"},
            ["layers_pattern: 'layer' .* did you mean 'layers'"],
        ),
        ({"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 4}}, ["rank_pattern: 'v_proj' names no module or"]),
        ({"alpha_pattern": {"experts.dwn_proj": 4}}, ["alpha_pattern: 'experts.dwn_proj' .* mean 'experts.down_proj'"]),
        ({"modules_to_save": ["lm_haed"]}, ["modules_to_save: 'lm_haed' .* did you mean 'lm_head'"]),
        ({"trainable_token_indices": {"embed": [1]}}, ["trainable_token_indices: 'embed' .* mean 'embed_tokens'"]),
    ],
)
def test_names_that_mean_nothing_are_faults_with_the_nearest(base, options, expected):
    import re

    faults = faults_of(base(), **options)
    found = [fault for fault in faults if "nothing is left" not in fault]
    assert len(found) == len(expected), faults
    for fault, pattern in zip(found, expected, strict=True):
        assert re.search(pattern, fault), fault


def test_lists_that_serve_many_families_warn(prepared):
    _, modules, warnings = prepared("deepseek_v2", target_modules=["q_proj", "k_proj", "q_a_proj", "o_proj"])
    assert "q_a_proj" in modules
    assert len(warnings) == 1
    assert warnings[0] == "target_modules: k_proj, q_proj: no such layer in deepseek_v2; without effect"
    _, _, warnings = prepared("qwen3_moe", target_modules=["all"], exclude_modules=["vision_tower"])
    assert warnings == ["exclude_modules: vision_tower: no such layer in qwen3_moe; without effect"]


UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|o_proj|up_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:q_proj|o_proj|up_proj)))"
)


@pytest.mark.parametrize(
    ("options", "unused"),
    [
        ({"target_modules": UNSLOTH}, "feed_forward"),
        ({"target_modules": ["o_proj", "in_proj_qkvz", "shared_expert_gate"]}, "in_proj_qkvz, shared_expert_gate"),
        (
            {"target_modules": ["o_proj", "q_proj", "qkv_proj"], "rank_pattern": {"qkv_proj": 8}},
            "rank_pattern: qkv_proj",
        ),
        ({"target_modules": ["o_proj"], "exclude_modules": ["shared_expert_gate"]}, "shared_expert_gate"),
    ],
)
def test_paths_options_and_layers_of_other_families_warn(prepared, options, unused):
    _, _, warnings = prepared("qwen3_moe", **options)
    assert any(unused in line and line.endswith("no such layer in qwen3_moe; without effect") for line in warnings)


@pytest.mark.parametrize(
    ("family", "options", "expected"),
    [
        ("deepseek_v2", {"target_modules": ["q_proj", "v_proj"]}, "q_proj, v_proj names no layer of the model"),
        ("qwen3_moe", {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "the other options leave in"),
        ("qwen3_next", {"target_modules": ["o_proj", "conv1d"]}, "linear_attn.conv1d, a Conv1d in 64 groups"),
        ("gemma4", {"target_modules": ["o_proj"]}, "or set exclude_modules: '.*vision_tower.*'"),
    ],
)
def test_targets_that_peft_would_refuse_later_are_faults(base, family, options, expected):
    assert any(expected in fault for fault in faults_of(base(family), **options))


def test_half_of_a_fused_matrix_is_said_to_be_all_of_it(prepared):
    experts, _, warnings = prepared("qwen3_moe", target_modules=["q_proj", "up_proj"])
    assert experts == {"gate_up_proj"}
    assert warnings == ["LoRA target up_proj: gate and up of the routed experts are one matrix; both train"]
    for target in (["gate_proj", "up_proj"], ["up_proj", "gate_up_proj"], ["down_proj"]):
        assert prepared("qwen3_moe", target_modules=target)[2] == []


def test_every_expert_named_one_by_one_is_all(prepared):
    target = [f"model.layers.1.mlp.experts.{index}.down_proj" for index in range(7)]
    config_experts, _, warnings = prepared("qwen3_moe", target_modules=["q_proj", *target])
    assert (config_experts, warnings) == ({"down_proj"}, [])


def test_patterns_and_saved_modules_that_match_are_accepted(prepared):
    experts, _, warnings = prepared(
        "qwen3_moe",
        rank_pattern={"mlp.experts.down_proj": 2, "q_proj": 4, r"layers\.0\.self_attn\.v_proj": 5},
        alpha_pattern={"experts.gate_up_proj": 3},
        modules_to_save=["lm_head", "score", "classifier"],
    )
    assert (experts, warnings) == (BOTH, [])


def test_one_line_says_what_was_asked_and_what_trains(base, caplog):
    with caplog.at_level(logging.WARNING):
        model = kt_peft.get_peft_model(base("deepseek_v2"), parity.all_linear(modules_to_save=["lm_head"]))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    counts = coverage.count(model)
    model.unload()
    lines = [record.getMessage() for record in caplog.records if "modules that train" in record.getMessage()]
    assert len(lines) == 1
    assert lines[0].startswith("LoRA asked for: all-linear; modules_to_save: lm_head; modules that train: attention ")
    assert {kind: (c.trained, c.present) for kind, c in counts.items()} == {
        "attention": (15, 15),
        "dense MLP": (3, 3),
        "shared experts": (6, 6),
        "routed experts": (4, 4),
        "router": (0, 2),
        "head": (1, 1),
        "embedding": (0, 1),
        "other": (0, 0),
    }
    assert sum(c.parameters for c in counts.values()) == trained
    assert f"routed experts 4 of 4 ({counts['routed experts'].parameters:,} parameters)" in lines[0]


def test_a_router_trained_by_its_parameter_is_counted_as_one(base):
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.gate.weight"])
    model = kt_peft.get_peft_model(base(), config)
    counts = coverage.count(model)
    model.unload()
    assert (counts["router"].trained, counts["routed experts"].trained) == (2, 0)


def test_what_was_asked_and_does_not_train_is_an_error(base, monkeypatch):
    """PEFT passes over a module here, as another release or a patch of it might."""
    from peft.tuners.lora import LoraModel

    stock = LoraModel._create_and_replace

    def skip(self, config, name, target, target_name, parent, **kwargs):
        if target_name != "v_proj":
            stock(self, config, name, target, target_name, parent, **kwargs)

    monkeypatch.setattr(LoraModel, "_create_and_replace", skip)
    with pytest.raises(ConfigError, match=r"layers.0.self_attn.v_proj was asked for and does not train \(and 1 more\)"):
        kt_peft.get_peft_model(base("mixtral"), parity.all_linear())
