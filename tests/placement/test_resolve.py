"""Rules on models without weights: first match, inheritance, ready rules, and every reason why rules cannot be."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from kt_sft.errors import ConfigError
from kt_sft.placement.resolve import resolve
from kt_sft.placement.rules import load_rules, parse_rules
from tests.helpers import rule_models, tiny_models

READY = Path(__file__).parents[2] / "configs" / "rules"
# Ready file -> models that it is for.
MODELS = {
    "deepseek_v2": ("deepseek_v2", "deepseek_v2_lite"),
    "deepseek_v3": ("deepseek_v3",),
    "qwen3_moe": ("qwen3_moe", "qwen3_moe_235b"),
    "mixtral": ("mixtral",),
}
STAGES = {
    1: {},
    2: {"stage3": "cuda:1"},
    4: {"stage2": "cuda:1", "stage3": "cuda:2", "stage4": "cuda:3"},
}


@pytest.fixture(scope="module")
def qwen():
    return rule_models.tiny("qwen3_moe", num_hidden_layers=4)


def rule(match, cls="default", recursive=True, **kwargs):
    return {"match": match, "replace": {"class": cls, "kwargs": kwargs}, "recursive": recursive}


def plan_of(model, *rules, **options):
    return resolve(model, parse_rules(list(rules), "r.yaml"), **options)


def faults_of(model, *rules, **options):
    with pytest.raises(ConfigError) as caught:
        plan_of(model, *rules, **options)
    return caught.value.faults


def device_of(plan, name):
    return {p.name: p.device for p in plan.placements}[name]


def test_without_rules_everything_is_on_the_default_device_and_experts_on_the_cpu(qwen):
    plan = resolve(qwen, default_device="cuda:0", method="INT8")
    assert plan.device_map() == {"": "cuda:0"} and plan.devices == ("cuda:0",)
    assert plan.methods == {f"model.layers.{i}.mlp.experts": "INT8" for i in range(4)}
    assert {p.device for p in plan.placements if p.kind == "experts"} == {"cpu"}
    assert all(p.rule is None for p in plan.placements)


def test_every_weight_has_one_place(qwen):
    names = [p.name for p in resolve(qwen).placements]
    owners = {name.rpartition(".")[0] for name, _ in [*qwen.named_parameters(), *qwen.named_buffers()]}
    assert len(names) == len(set(names)) and set(names) == owners


def test_first_matching_rule_decides(qwen):
    first, second = (
        rule({"layers": "0-1"}, generate_device="cuda:1"),
        rule({"name": "layers"}, generate_device="cuda:0"),
    )
    plan = plan_of(qwen, first, second)
    assert [device_of(plan, f"model.layers.{i}.mlp.gate") for i in range(4)] == ["cuda:1"] * 2 + ["cuda:0"] * 2
    fault = faults_of(qwen, second, first)[0]
    assert "r.yaml, rule 2: has no effect" in fault and "decided by rule 1" in fault


def test_modules_below_follow_their_parent_unless_a_rule_says_otherwise(qwen):
    plan = plan_of(qwen, rule({"name": "^model$"}, generate_device="cuda:1"), default_device="cuda:0")
    assert device_of(plan, "model.layers.2.self_attn.q_proj") == "cuda:1"
    assert device_of(plan, "lm_head") == "cuda:0"
    plan = plan_of(
        qwen, rule({"name": "^model$"}, generate_device="cuda:1"), rule({"name": "norm$", "class": "Qwen3MoeRMSNorm"})
    )
    assert device_of(plan, "model.norm") == "cuda:1", "a rule without a device leaves it open"


def test_a_rule_that_is_not_recursive_stops_the_others(qwen):
    layer = rule({"name": r"^model\.layers\.3$"}, recursive=False, generate_device="cuda:1")
    inside = rule({"name": r"layers\.3\.mlp\.experts$"}, "RoutedExperts", backend="INT4")
    assert "decided by rule 1" in faults_of(qwen, layer, inside)[0]
    layer["recursive"] = True
    assert plan_of(qwen, layer, inside).methods["model.layers.3.mlp.experts"] == "INT4"


def test_methods_follow_the_layers(qwen):
    experts = {"class": "Qwen3MoeExperts"}
    plan = plan_of(
        qwen,
        rule({**experts, "layers": "0-1"}, "RoutedExperts", backend="AMXInt8"),
        rule({**experts, "layers": 3}, "ktransformers.operators.experts.KTransformersExperts", backend="AMXInt4"),
    )
    assert list(plan.methods.values()) == ["INT8", "INT8", "BF16", "INT4"]
    assert [p.rule for p in plan.placements if p.kind == "experts"] == [1, 1, None, 2]


def test_device_map_has_an_entry_for_each_layer(qwen):
    plan = plan_of(
        qwen,
        rule({"name": "embed_tokens"}, generate_device="cpu"),
        rule({"layers": "2/2"}, generate_device="cuda:1"),
        default_device="cuda:0",
    )
    layers = {f"model.layers.{i}": "cuda:1" if i > 1 else "cuda:0" for i in range(4)}
    others = {"model.embed_tokens": "cpu", "model.norm": "cuda:0", "model.rotary_emb": "cuda:0", "lm_head": "cuda:0"}
    assert plan.device_map() == {**layers, **others}


def test_packed_linear(qwen):
    plan = plan_of(
        qwen,
        rule({"name": "lm_head"}, "PackedLinear", backend="int8"),
        rule({"name": r"layers\.0.*q_proj"}, "PackedLinear"),
    )
    assert plan.packed_linears == {"model.layers.0.self_attn.q_proj": "bf16", "lm_head": "int8"}
    assert plan.device_map() == {"": "cpu"}


@pytest.mark.parametrize(("family", "changes", "name", "words"), [
    ("deepseek_v2", {}, "", ["not for routers", "found model.layers.1.mlp.gate"]),
    ("qwen3_moe", {"tie_word_embeddings": True}, "lm_head", ["weights that several modules share, found lm_head"]),
])  # fmt: skip
def test_linear_layers_that_cannot_be_packed_are_named(family, changes, name, words):
    rules = [rule({"name": name, "class": "torch.nn.Linear"}, "PackedLinear"), rule({"name": "no such module"})]
    faults = "; ".join(faults_of(rule_models.tiny(family, **changes), *rules))
    assert all(word in faults for word in [*words, "rule 2: matches no module"]), faults


@pytest.mark.parametrize(("rules", "words"), [
    ([rule({"name": r"^model\.layrs\."})], ["rule 1: matches no module", "layrs", "did you mean 'model.layers"]),
    ([rule({"class": "Qwen3MoeExprts"})], ["rule 1: matches no module", "no Qwen3MoeExprts", "'Qwen3MoeExperts'"]),
    ([rule({"name": "experts$", "class": "Linear"})], ["rule 1: matches no module", "never fit the same module"]),
    ([rule({"layers": 9})], ["rule 1: matches no module", "4 layers"]),
    ([rule({"name": "mlp$"}, "RoutedExperts")], ["rule 1", "routed experts", "model.layers.0.mlp and 3 more"]),
    ([rule({"name": "norm$"}, "ktransformers.operators.linear.KTransformersLinear")], ["torch.nn.Linear", "norm"]),
    ([rule({"name": "experts$"}, "PackedLinear")], ["routed experts cannot be", "model.layers.0.mlp.experts"]),
    ([rule({"name": "experts$"}, "RoutedExperts", out_device="cuda:1")], ["out_device cuda:1", "is on cpu"]),
    ([rule({"name": "lm_head"}, "PackedLinear"), rule({"name": "^model$"}, generate_device="cuda")],
     ["PackedLinear: expected everything on the CPU", "cuda:0, cpu"]),
    ([rule({"name": "self_attn$"}, generate_device="cuda:1")],
     ["model.layers.0: expected all modules", "on cuda:1 (rule 1)", "on cpu (no rule)", "3 more layers"]),
])  # fmt: skip
def test_fault_names_rule_and_module(qwen, rules, words):
    message = "; ".join(faults_of(qwen, *rules))
    assert all(word in message for word in words), message


def test_tied_weights_stay_together():
    model = rule_models.tiny("qwen3_moe", tie_word_embeddings=True)
    message = faults_of(model, rule({"name": "lm_head"}, generate_device="cuda:0"))[0]
    assert all(word in message for word in ("tied weights", "model.embed_tokens on cpu", "lm_head on cuda:0 (rule 1)"))


def test_faults_come_at_once(qwen):
    assert len(faults_of(qwen, rule({"name": "nowhere"}), rule({"name": "mlp$"}, "RoutedExperts"))) == 2


@pytest.mark.parametrize("gpus", STAGES)
@pytest.mark.parametrize("file", MODELS)
def test_ready_rules_on_tiny_models(file, gpus):
    rules = load_rules(READY / f"{file}.yaml", STAGES[gpus])
    for num_layers in (2, 5):
        plan = resolve(rule_models.tiny(file, num_hidden_layers=num_layers), rules, default_device="cpu")
        assert set(plan.devices) <= {f"cuda:{i}" for i in range(gpus)}
        assert all(placement.rule is not None for placement in plan.placements)
    assert len(set(plan.devices)) == gpus


@pytest.mark.parametrize("file", MODELS)
def test_ready_rules_fit_the_published_sizes(file):
    for name in MODELS[file]:
        config = rule_models.published_config(name)
        model = rule_models.on_meta(config)
        for gpus, stages in STAGES.items():
            plan = resolve(model, load_rules(READY / f"{file}.yaml", stages), default_device="cpu")
            entries = plan.device_map()
            layers = [entries.get("") or entries[f"model.layers.{i}"] for i in range(config.num_hidden_layers)]
            counts = [layers.count(f"cuda:{i}") for i in range(gpus)]
            assert layers == sorted(layers) and sum(counts) == config.num_hidden_layers
            assert max(counts) - min(counts) <= (2 if gpus == 2 else 1), name
            assert (entries.get("model.embed_tokens", "cuda:0"), entries.get("lm_head", "cuda:0")) == (
                "cuda:0",
                f"cuda:{gpus - 1}",
            )
            dense = getattr(config, "first_k_dense_replace", 0)
            assert len(plan.methods) == config.num_hidden_layers - dense


def test_ready_rules_for_all_families_exist_and_say_how_many_gpus():
    assert {path.stem for path in READY.glob("*.yaml")} == set(MODELS) == set(tiny_models.FAMILIES)
    for path in READY.glob("*.yaml"):
        header = path.read_text().splitlines()[1]
        given = [yaml.safe_load(text) for text in re.findall(r"\{[^}]*\}", header)]
        assert given == [STAGES[2], STAGES[4]], header


# The shape of the rules that people have for ktransformers: its operators, one GPU, experts in AMX int8.
FOREIGN = r"""
- match: {class: ktransformers.models.modeling_deepseek.DeepseekV2YarnRotaryEmbedding}
  replace:
    class: ktransformers.operators.RoPE.YarnRotaryEmbedding
    kwargs: {generate_device: cuda, prefill_device: cuda}
- match: {name: '^lm_head', class: torch.nn.Linear}
  replace:
    class: ktransformers.operators.linear.KTransformersLinear
    kwargs: {generate_device: cuda, prefill_device: cuda, generate_op: KLinearTorch, prefill_op: KLinearTorch}
- match: {name: '^model\.layers\..*\.mlp$', class: ktransformers.models.modeling_deepseek.DeepseekV2MoE}
  replace:
    class: ktransformers.operators.experts.KDeepseekV2MoE
    kwargs: {generate_device: cuda, prefill_device: cuda}
- match: {name: '^model\.layers\..*\.mlp\.experts$'}
  replace:
    class: ktransformers.operators.experts.KTransformersExperts
    kwargs: {prefill_device: cpu, prefill_op: KExpertsTorch, generate_device: cpu, generate_op: KSFTExpertsCPU,
             out_device: cuda, backend: AMXInt8}
  recursive: false
- match: {name: '^model\.layers\..*\.self_attn$'}
  replace: {class: ktransformers.operators.attention.KDeepseekV2Attention, kwargs: {generate_device: cuda}}
- match: {name: '^model$'}
  replace: {class: ktransformers.operators.models.KDeepseekV2Model, kwargs: {per_layer_prefill_intput_threshold: 0}}
- match: {name: '^model.embed_tokens'}
  replace: {class: default, kwargs: {generate_device: cpu, prefill_device: cpu}}
"""


def test_rules_in_the_words_of_ktransformers():
    rules = parse_rules(yaml.safe_load(FOREIGN), "r.yaml")
    plan = resolve(rule_models.tiny("deepseek_v2"), rules, default_device="cuda:0")
    assert set(plan.methods.values()) == {"INT8"}
    assert {p.name for p in plan.placements if p.device == "cpu" and p.kind != "experts"} == {"model.embed_tokens"}
