"""Rule files: what a rule may say, and that every fault is named with its file, rule and the nearest known name."""

from __future__ import annotations

import pytest
import yaml

from kt_sft.errors import ConfigError, FormatError
from kt_sft.placement.classes import target_of
from kt_sft.placement.rules import load_rules, parse_rules, parse_variables


def rules_of(text, variables=None, **options):
    return parse_rules(yaml.safe_load(text), "r.yaml", variables, **options)


def faults_of(text, variables=None):
    with pytest.raises(ConfigError) as caught:
        rules_of(text, variables)
    return caught.value.faults


def one_rule(match="name: x", replace="class: default", kwargs="", more=""):
    inner = f", kwargs: {{{kwargs}}}" if kwargs else ""
    return f"- match: {{{match}}}\n  replace: {{{replace}{inner}}}\n  {more}"


def test_a_rule_is_read_whole():
    text = one_rule(
        "name: 'experts$', class: MixtralExperts, layers: 2-5",
        "class: RoutedExperts",
        "generate_device: cpu, prefill_device: cpu, out_device: 'cuda:1', backend: AMXInt8",
        "recursive: false",
    )
    rule = rules_of(text).rules[0]
    assert (rule.number, rule.name.pattern, rule.class_name) == (1, "experts$", "MixtralExperts")
    assert (rule.target, rule.device, rule.out_device, rule.method) == ("experts", "cpu", "cuda:1", "INT8")
    assert not rule.recursive and list(rule.layers.range(48)) == [2, 3, 4, 5]


@pytest.mark.parametrize("count", [1, 3, 27, 60, 61])
def test_parts_of_the_layers_are_all_of_them_in_order(count):
    parts = [rules_of(one_rule(f"layers: {part}/4")).rules[0].layers.range(count) for part in (1, 2, 3, 4)]
    assert [number for part in parts for number in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("written", "rank", "device"),
    [("cpu", 0, "cpu"), ("CUDA", 0, "cuda:0"), ("cuda", 2, "cuda:2"), ("cuda:3", 2, "cuda:3"), ("npu:1", 0, "npu:1")],
)
def test_devices(written, rank, device):
    text = one_rule(kwargs=f"generate_device: '{written}'")
    assert rules_of(text, local_rank=rank).rules[0].device == device


def test_variables_refer_to_others_and_are_overridden():
    text = "vars: {a: 'cuda:0', b: '${a}', c: '${b}'}\nrules:\n" + one_rule(kwargs="generate_device: '${c}'")
    assert rules_of(text).rules[0].device == "cuda:0"
    assert rules_of(text, {"b": "cuda:1"}).rules[0].device == "cuda:1"
    assert rules_of(text, {"a": "cpu"}).variables == {"a": "cpu", "b": "cpu", "c": "cpu"}


def test_a_variable_is_used_on_two_ways():
    text = "vars: {a: '${b}', b: x, c: '${b}-${a}', d: '${c}${b}'}\nrules:\n" + one_rule()
    assert rules_of(text).variables == {"a": "x", "b": "x", "c": "x-x", "d": "x-xx"}


def test_two_names_of_one_format_agree():
    text = one_rule(replace="class: RoutedExperts", kwargs="backend: INT8, method: AMXInt8")
    assert rules_of(text).rules[0].method == "INT8"


def test_a_hint_names_operators_of_the_class():
    faults = faults_of(one_rule(replace="class: RoutedExperts", kwargs="generate_op: KLinearCPUInfer"))
    assert "no operator for experts" in faults[0] and "KLinear" not in faults[0].partition(";")[2]


def test_variables_from_text_and_mapping_are_the_same():
    assert parse_variables("a=cuda:1, b=cpu") == parse_variables({"a": "cuda:1", "b": "cpu"})
    assert parse_variables(None) == {}
    with pytest.raises(ConfigError, match="name=value, found 'b'"):
        parse_variables("a=1,b")


@pytest.mark.parametrize(("text", "words"), [
    (one_rule(more="recurse: false"), ["r.yaml, rule 1", "recurse", "'recursive'"]),
    (one_rule(more="recursive: maybe"), ["recursive", "'maybe'"]),
    (one_rule("nmae: x"), ["match: nmae", "'name'"]),
    (one_rule("name: '(x'"), ["match name", "regular expression", "unterminated"]),
    (one_rule("name: !!binary eA=="), ["match name", "regular expression", "bytes"]),
    (one_rule("name: null"), ["match", "found none of them"]),
    (one_rule("class: [a]"), ["match class", "['a']"]),
    (one_rule("layers: 3-1"), ["layers", "'3-1'", "2/4"]),
    (one_rule("layers: 5/4"), ["layers", "'5/4'"]),
    (one_rule(replace="class: RoutedExprts"), ["'RoutedExprts'", "'RoutedExperts'"]),
    (one_rule(replace="class: ktransformers.operators.flux.Capacitor"), ["Capacitor", "known: default"]),
    (one_rule(kwargs="generate_devcie: cpu"), ["kwargs: generate_devcie", "'generate_device'"]),
    (one_rule(kwargs="generate_device: 'gpu:0'"), ["generate_device", "'gpu:0'", "cuda"]),
    (one_rule(kwargs="generate_device: 'cuda:x'"), ["generate_device", "'cuda:x'"]),
    (one_rule(kwargs="generate_device: 'cuda:0', prefill_device: cpu"), ["prefill_device", "held once", "cpu"]),
    (one_rule(kwargs="out_device: cpu"), ["out_device", "experts"]),
    (one_rule(kwargs="backend: INT8"), ["backend", "only experts"]),
    (one_rule(replace="class: RoutedExperts", kwargs="backend: AMXInt9"), ["backend 'AMXInt9'", "AMXINT8"]),
    (one_rule(replace="class: RoutedExperts", kwargs="backend: INT8, method: INT4"), ["backend, method", "remove one"]),
    (one_rule(replace="class: PackedLinear", kwargs="generate_device: 'cuda:0'"), ["generate_device", "expected cpu"]),
    (one_rule(replace="class: PackedLinear", kwargs="backend: int4"), ["backend 'int4'", "int8"]),
    (one_rule(kwargs="generate_op: KLinearTorch"), ["generate_op", "no operator for stock", "remove it"]),
    (one_rule(replace="class: ktransformers.operators.linear.KTransformersLinear", kwargs="generate_op: KLinearTorhc"),
     ["generate_op", "'KLinearTorch'"]),
    (one_rule(replace="class: ktransformers.operators.linear.KTransformersLinear", kwargs="generate_op: KLinearMarlin"),
     ["KLinearMarlin", "use KLinearTorch"]),
    (one_rule(kwargs="per_layer_prefill_intput_threshold: 100"), ["layer by layer", "chunk_size"]),
    (one_rule(kwargs="generate_device: '${gpu}'"), ["${gpu}", "no `vars`"]),
    ("vars: {gpu0: cuda}\nrules:\n" + one_rule(kwargs="generate_device: '${gpu1}'"), ["${gpu1}", "'gpu0'"]),
    ("vars: {a: '${b}', b: '${a}'}\nrules:\n" + one_rule(), ["variable a", "itself"]),
    ("vars: {a: '${z}'}\nrules:\n" + one_rule(), ["variable a", "${z}", "a"]),
    ("- replace: {class: default}", ["rule 1", "match", "nothing"]),
    ("- match: {name: x}", ["rule 1", "replace", "nothing"]),
    ("- 7", ["rule 1", "mapping", "7"]),
    ("variables: {}\nrules:\n" + one_rule(), ["variables: unknown key", "known: vars, rules"]),
    ("rule: []", ["list of rules"]),
    ("[]", ["list of rules"]),
])  # fmt: skip
def test_fault_is_named(text, words):
    message = "; ".join(faults_of(text))
    assert message.startswith("r.yaml") and all(word in message for word in words), message


def test_unknown_override_is_a_fault():
    text = "vars: {gpu0: cuda}\nrules:\n" + one_rule()
    assert "variable gpu1: unknown; did you mean 'gpu0'?" in faults_of(text, {"gpu1": "cpu"})[0]
    assert "no variables" in faults_of(one_rule(), {"gpu1": "cpu"})[0]


def test_all_faults_come_at_once():
    text = one_rule("name: '('") + "\n" + one_rule(kwargs="generate_device: tpu") + "\n" + one_rule(more="x: 1")
    faults = faults_of(text)
    assert [fault[:14] for fault in faults] == ["r.yaml, rule 1", "r.yaml, rule 2", "r.yaml, rule 3"]


@pytest.mark.parametrize(("name", "target"), [
    ("default", "stock"),
    ("kt_sft.nn.routed_experts.RoutedExperts", "experts"),
    ("ktransformers.operators.experts.KTransformersExperts", "experts"),
    ("ktransformers.operators.experts.KTransformersExpertsV2", "experts"),
    ("ktransformers.operators.experts.KDeepseekV3MoE", "stock"),
    ("ktransformers.operators.experts.KQwen3MoeSparseMoeBlock", "stock"),
    ("ktransformers.operators.linear.KTransformersLinear", "linear"),
    ("ktransformers.operators.RoPE.YarnRotaryEmbeddingV3", "stock"),
    ("ktransformers.operators.attention.KDeepseekV2Attention", "stock"),
    ("ktransformers.operators.gate.KMoEGate", "stock"),
    ("ktransformers.operators.models.KDeepseekV2Model", "stock"),
    ("other.operators.experts.KTransformersExperts", None),
    ("ktransformers.operators.experts.Nonsense", None),
    ("elsewhere.RoutedExperts", None),
])  # fmt: skip
def test_class_names_of_ktransformers_mean_what_we_have(name, target):
    assert target_of(name) == target


def test_files_that_are_none(tmp_path):
    with pytest.raises(FormatError, match=r"missing\.yaml: kt_optimize_rule: expected a rule file"):
        load_rules(tmp_path / "missing.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("- match: {name: [\n")
    with pytest.raises(FormatError, match=r"bad\.yaml: kt_optimize_rule: expected YAML"):
        load_rules(bad)


@pytest.mark.parametrize(("kwargs", "said"), [
    ("generate_device: 'cuda:1', generate_op: KExpertsMarlin", "generate_device cuda:1"),
    ("prefill_device: 'cuda:0', prefill_op: KExpertsTorch, generate_device: cpu, generate_op: KExpertsCPU",
     "prefill_device cuda:0"),
    ("generate_op: KExpertsTorch", "generate_op KExpertsTorch"),
])  # fmt: skip
def test_experts_that_ask_for_a_gpu_are_computed_on_the_cpu(tmp_path, caplog, kwargs, said):
    file = tmp_path / "r.yaml"
    file.write_text(one_rule(replace="class: ktransformers.operators.experts.KTransformersExperts", kwargs=kwargs))
    for _ in range(2):
        rule = load_rules(file).rules[0]
    assert rule.device in (None, "cpu") and rule.target == "experts"
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1 and f"{file}, rule 1: {said}: no effect" in lines[0]


def test_experts_on_the_cpu_are_no_news(tmp_path, caplog):
    file = tmp_path / "r.yaml"
    file.write_text(one_rule(replace="class: RoutedExperts", kwargs="generate_device: cpu, prefill_device: cpu"))
    assert load_rules(file).rules[0].on_gpu is None and not caplog.records
