"""Rules at work: layers in formats of their own, packed linear layers, and a model on several devices."""

from __future__ import annotations

import pytest
import torch
import yaml
from peft import LoraConfig

import kt_sft
from kt_sft.errors import ConfigError, FormatError
from kt_sft.integrations.transformers.loading import check_model
from kt_sft.models.spec import iter_routed_experts
from kt_sft.nn.packed_linear import PackedLinear
from kt_sft.placement import inject
from kt_sft.placement.resolve import resolve
from kt_sft.placement.rules import parse_rules
from tests.helpers import parity, rule_models, tiny_models
from tests.helpers.tolerance import rel_l2
from tests.integrations.transformers.test_formats import stock_of

EXPERTS = {"class": "Qwen3MoeExperts"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_models.build("qwen3_moe", tmp_path_factory.mktemp("placement"), num_hidden_layers=3)


def rule(match, cls="default", **kwargs):
    return {"match": match, "replace": {"class": cls, "kwargs": kwargs}}


@pytest.fixture
def rule_file(tmp_path):
    def write(*rules, **variables):
        file = tmp_path / "rules.yaml"
        file.write_text(yaml.safe_dump({"vars": variables, "rules": list(rules)}))
        return str(file)

    return write


BY_LAYER = [
    rule({**EXPERTS, "layers": 0}, "RoutedExperts", backend="INT8"),
    rule({**EXPERTS, "layers": 2}, "RoutedExperts", backend="${last}"),
]


def test_layers_have_their_formats_and_logits_follow_them(directory, rule_file):
    file = rule_file(*BY_LAYER, last="BF16")
    rows = {"expert_activations": "bf16"}  # what a CPU with int8 dot instructions would take rounds more
    model = parity.load_ours(directory, optimize_rule=file, rule_vars={"last": "INT4"}, **rows)
    held = [experts.formats[0] for _, experts in iter_routed_experts(model)]
    assert held == ["int8", "bf16", "int4"]
    assert [name for name, _ in model.named_parameters() if "layers.0.mlp.experts" in name] == [
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
    ]
    ids = tiny_models.token_ids()
    with torch.no_grad():
        ours, stock = model(ids).logits, stock_of(model, directory)(ids).logits
        one_format = [parity.load_ours(directory, method=m, **rows)(ids).logits for m in ("BF16", "INT8", "INT4")]
    errors = (ours - stock).norm(dim=-1) / stock.norm(dim=-1)  # of each token
    assert (errors < 0.01).double().mean() > 0.9, "all but one whose router scores nearly tie"
    assert all(rel_l2(ours, other) > 1e-3 for other in one_format)


def test_one_method_in_all_rules_is_that_method(directory, rule_file, tmp_path):
    file, ids = rule_file(rule(EXPERTS, "RoutedExperts", backend="INT8")), tiny_models.token_ids()
    model = parity.load_ours(directory, optimize_rule=file, weight_cache=tmp_path / "cache")
    assert model.kt_config.method == "INT8" and list((tmp_path / "cache").iterdir())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, parity.load_ours(directory, method="INT8")(ids).logits)


def test_mixed_formats_train_and_save_the_checkpoint(directory, rule_file, tmp_path):
    model = parity.load_ours(directory, optimize_rule=rule_file(*BY_LAYER, last="INT4"))
    model.save_pretrained(tmp_path / "saved")
    peft_model = kt_sft.get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).train()
    ids = tiny_models.token_ids()
    peft_model(input_ids=ids, labels=ids).loss.backward()
    grads = [p.grad for name, p in peft_model.named_parameters() if "experts" in name and ".lora_" in name]
    assert len(grads) == 12 and all(grad is not None for grad in grads)
    again = parity.load_ours(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, parity.load_ours(directory)(ids).logits)


def test_packed_linear_layers_by_rule(directory, rule_file):
    file = rule_file(rule({"name": "(q|k)_proj$", "layers": 1}, "PackedLinear", backend="int8"))
    model = parity.load_ours(directory, torch.bfloat16, optimize_rule=file, cpu_linear="off")
    packed = {name: m.format for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert packed == {"model.layers.1.self_attn.q_proj": "int8", "model.layers.1.self_attn.k_proj": "int8"}
    for load in (kt_sft.load_model, check_model):
        with pytest.raises(ConfigError, match=r"expected a model in bfloat16, found .*1\.self_attn\.q_proj in float32"):
            load(directory, kt_sft.KTConfig(optimize_rule=file), dtype=torch.float32)


def test_hooks_carry_hidden_states_and_leave_the_experts_alone(directory, monkeypatch, rule_file):
    """`cpu` and `cpu:0` are two devices to accelerate: the same loading path as with GPUs, but that nothing moves."""
    ids = tiny_models.token_ids()
    with torch.no_grad():
        expected = parity.load_ours(directory)(ids).logits
    map_of, moved = inject.device_map, []
    second = {"cuda:0": torch.device("cpu", 0), "cpu": torch.device("cpu")}
    monkeypatch.setattr(inject, "device_count", lambda kind: 1)
    monkeypatch.setattr(
        "accelerate.hooks.set_module_tensor_to_device",
        lambda module, name, device, **_: moved.append(name),
    )
    monkeypatch.setattr(
        "kt_sft.integrations.transformers.loading.device_map",
        lambda plan: {name: second[str(device)] for name, device in map_of(plan).items()},
    )
    file = rule_file(rule({"layers": "1-2"}, generate_device="cuda:0"))
    model = parity.load_ours(directory, optimize_rule=file)
    assert len(set(model.hf_device_map.values())) == 2 and "model.layers.1" in model.hf_device_map
    assert hasattr(model.model.layers[1], "_hf_hook")
    assert "self_attn.q_proj.weight" in moved and not [name for name in moved if "experts" in name]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
    found, wanted = (
        parity.logits_and_grads(parity.fill_lora(kt_sft.get_peft_model(m, parity.all_linear())).train(), ids)
        for m in (model, parity.load_ours(directory))
    )
    assert found.keys() == wanted.keys() and len(found) > 20
    assert all(rel_l2(found[name], wanted[name]) <= 1e-5 for name in wanted), "f32 sums in another order, no more"


def test_a_part_on_the_cpu_is_computed_there():
    """Whoever looks for the word `cpu` (accelerate, PEFT, the trainer) means weights that are offloaded to it."""
    rules = parse_rules([rule({"name": "embed_tokens"}, generate_device="cpu")], "r.yaml")
    devices = inject.device_map(resolve(rule_models.tiny("qwen3_moe"), rules, default_device="cuda:0"))
    assert devices["model.embed_tokens"] == torch.device("cpu") and devices["lm_head"] == torch.device("cuda", 0)
    assert not any(device in ["cpu", "disk"] for device in devices.values())


def faults_of(call):
    with pytest.raises(ConfigError) as caught:
        call()
    return "; ".join(caught.value.faults)


def test_refusals_before_anything_is_loaded(directory, rule_file, tmp_path):
    file = rule_file(rule({"layers": 2}, generate_device="cuda:7"))
    missing = faults_of(lambda: parity.load_ours(directory, optimize_rule=file))
    assert "cuda:7 (for model.layers.2." in missing and "cuda devices" in missing
    both = faults_of(lambda: kt_sft.load_model(directory, kt_sft.KTConfig(optimize_rule=file), device_map="cpu"))
    assert "device_map" in both
    activations = {"optimize_rule": rule_file(*BY_LAYER, last="INT4"), "method": "INT8", "expert_activations": "int8"}
    rules = rule_file(rule({**EXPERTS, "layers": 1}, "RoutedExperts", backend="BF16"))
    assert "found BF16" in faults_of(lambda: parity.load_ours(directory, **{**activations, "optimize_rule": rules}))
    raw = rule_file(rule({**EXPERTS, "layers": 1}, "RoutedExperts", backend="RAWINT4"))
    assert "method RAWINT4" in faults_of(lambda: parity.load_ours(directory, optimize_rule=raw))
    with pytest.raises(FormatError, match="kt_optimize_rule: expected a rule file"):
        parity.load_ours(directory, optimize_rule=tmp_path / "nowhere.yaml")
    with pytest.raises(FormatError, match="expected a directory"):
        kt_sft.load_model(tmp_path / "no" / "such" / "model", kt_sft.KTConfig(optimize_rule=file))


def test_processes_keep_to_their_own_device(monkeypatch):
    monkeypatch.setattr(inject, "device_count", lambda kind: 2)
    for written, rank, fine in (("cuda", 1, True), ("cuda:1", 1, True), ("cuda:0", 1, False)):
        rules = parse_rules([rule({"name": "^(model|lm_head)$"}, generate_device=written)], "r.yaml", local_rank=rank)
        plan = resolve(rule_models.tiny("qwen3_moe"), rules)
        inject.check_devices(plan, local_rank=rank)
        if fine:
            inject.check_devices(plan, local_rank=rank, num_processes=2)
        else:
            with pytest.raises(ConfigError, match="cuda:0 .*each of 2 processes"):
                inject.check_devices(plan, local_rank=rank, num_processes=2)
