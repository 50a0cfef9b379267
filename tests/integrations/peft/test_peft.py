"""Expert LoRA under stock PEFT: save, load, resume, switch off, merge, and the ways a training step is cut up."""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft import get_peft_model as plain_get_peft_model
from peft.tuners.lora.layer import ParamWrapper

import kt_sft.nn.routed_experts
from kt_sft.errors import ConfigError
from kt_sft.integrations import peft as kt_peft
from kt_sft.models.spec import iter_routed_experts
from tests.helpers import parity, tiny_models

FAMILY = "qwen3_moe"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return lambda family=FAMILY: tiny_models.build(family, root / family)


@pytest.fixture
def ids():
    return tiny_models.token_ids()


def trained(directory, config, ids, *, steps=2, **load):
    """Our model after a few optimizer steps."""
    model = parity.fill_lora(kt_peft.get_peft_model(parity.load_ours(directory, **load), config)).train()
    run_steps(model, optimizer_of(model), ids, steps)
    return model.eval()


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def run_steps(model, optimizer, ids, steps):
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def round_lora(model):
    """bf16-exact factors, so that both sides multiply the same numbers."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(parameter.to(torch.bfloat16))
    return model


def expert_lora_of(model):
    return [experts.lora for _, experts in iter_routed_experts(model)]


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


def check_logits_equal_plain_peft(directory, adapter):
    ids = parity.decided_ids(directory, adapter)

    def run(model):
        return {"logits": logits(model, ids).double()}

    truth = run(parity.plain_peft(directory, adapter))
    found = run(kt_peft.load_adapter(parity.load_ours(directory), adapter))
    parity.check_close(found, truth, parity.bounds(directory, adapter, truth, run))


# --- save, load, resume


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_saved_adapter_gives_equal_logits_in_plain_peft(checkpoint, tmp_path, ids, family, dropout):
    model = round_lora(trained(checkpoint(family), parity.all_linear(lora_dropout=dropout), ids))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0.0
    beside = {"model_type": family, "layout": "peft-0.18", "lora_dropout": dropout}
    assert json.loads((tmp_path / "kt_sft.json").read_text()) == beside
    check_logits_equal_plain_peft(checkpoint(family), tmp_path)


def test_adapter_with_dropout_loads_where_kt_sft_is_not_installed(checkpoint, tmp_path, ids):
    trained(checkpoint(), parity.all_linear(lora_dropout=0.1), ids).save_pretrained(tmp_path / "adapter")
    script = f"""
import sys; sys.modules["kt_sft"] = None
import torch, transformers, peft
model = transformers.AutoModelForCausalLM.from_pretrained({str(checkpoint())!r}, dtype=torch.float32)
model = peft.PeftModel.from_pretrained(model, {str(tmp_path / "adapter")!r})
torch.save({{k: v for k, v in model.state_dict().items() if ".lora_" in k}}, {str(tmp_path / "there.pt")!r})
"""
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}  # or torch itself would look for kt_sft
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, env=environment)
    there = torch.load(tmp_path / "there.pt")
    here = kt_peft.load_adapter(parity.load_ours(checkpoint()), tmp_path / "adapter").state_dict()
    assert {key for key in here if ".lora_" in key} == set(there)
    assert all(torch.equal(here[key], value) for key, value in there.items())


def test_adapter_of_plain_peft_loads_here(checkpoint, tmp_path):
    targets = {"target_modules": ["q_proj", "o_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
    plain = plain_get_peft_model(
        tiny_models.load_stock(checkpoint()), LoraConfig(r=2, task_type="CAUSAL_LM", **targets)
    )
    parity.fill_lora(plain).save_pretrained(tmp_path)
    check_logits_equal_plain_peft(checkpoint(), tmp_path)
    lora = expert_lora_of(kt_peft.load_adapter(parity.load_ours(checkpoint()), tmp_path))
    assert all(layer.gate_up is not None and layer.down is None and layer.dropout == 0.0 for layer in lora)


def test_resume_continues_bitwise_with_the_dropout_it_was_trained_with(checkpoint, tmp_path, ids):
    straight = kt_peft.get_peft_model(parity.load_ours(checkpoint()), parity.all_linear(lora_dropout=0.1)).train()
    optimizer = optimizer_of(straight)
    run_steps(straight, optimizer, ids, 2)
    straight.save_pretrained(tmp_path)
    saved = optimizer.state_dict()

    resumed = kt_peft.load_adapter(parity.load_ours(checkpoint()), tmp_path, is_trainable=True).train()
    again = optimizer_of(resumed)
    again.load_state_dict(copy.deepcopy(saved))
    assert {layer.dropout for layer in expert_lora_of(resumed)} == {0.1}
    assert {m.p for m in resumed.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}
    for model, own in ((straight, optimizer), (resumed, again)):
        torch.manual_seed(7)
        run_steps(model, own, ids, 2)
    for (name, one), (_, other) in zip(straight.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_weights_loaded_into_a_running_model_are_used(checkpoint, tmp_path, ids):
    """What transformers' Trainer does on resume, and PEFT's loading that replaces the Parameter objects."""
    trained(checkpoint(), parity.all_linear(), ids).save_pretrained(tmp_path)
    expected = logits(kt_peft.load_adapter(parity.load_ours(checkpoint()), tmp_path), ids)
    fresh = kt_peft.get_peft_model(parity.load_ours(checkpoint()), parity.all_linear())
    assert not torch.equal(logits(fresh.eval(), ids), expected)
    fresh.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert torch.equal(logits(fresh.eval(), ids), expected)
    assigned = kt_peft.load_adapter(parity.load_ours(checkpoint()), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(assigned, ids), expected)


# --- scale, rank, counts


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"r": 1},
        {
            "rank_pattern": {"mlp.experts.down_proj": 5, r"model\.layers\.1\.mlp\.experts\.gate_up_proj": 2},
            "alpha_pattern": {"mlp.experts.gate_up_proj": 9},
        },
    ],
    ids=["rslora", "rank1", "patterns"],
)
def test_scale_and_rank_are_pefts_own(checkpoint, tmp_path, options):
    model = kt_peft.get_peft_model(parity.load_ours(checkpoint()), parity.all_linear(**options))
    for layer in expert_lora_of(model):
        wrapper = layer.gate_up.scaling.wrapper
        rank = wrapper.r["default"]
        expected = wrapper.lora_alpha["default"] / (math.sqrt(rank) if "use_rslora" in options else rank)
        assert layer.gate_up.scaling() == expected
        assert layer.gate_up.a.canonical().shape[1] == rank
    parity.fill_lora(model).save_pretrained(tmp_path)
    check_logits_equal_plain_peft(checkpoint(), tmp_path)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_parameter_counts_are_those_of_plain_peft(checkpoint, tmp_path, family):
    model = kt_peft.get_peft_model(parity.load_ours(checkpoint(family)), parity.all_linear())
    model.save_pretrained(tmp_path)
    plain = parity.plain_peft(checkpoint(family), tmp_path, dtype=torch.float32)
    assert model.get_nb_trainable_parameters() == plain.get_nb_trainable_parameters()
    assert kt_peft.count_parameters(model) == plain.get_nb_trainable_parameters()
    assert all(p.numel() == 0 or 0 not in p.stride() for p in model.parameters()), "a placeholder DDP would broadcast"


# --- on and off


def test_disabled_adapter_is_the_base_model_exactly(checkpoint, ids):
    base = logits(parity.load_ours(checkpoint()), ids)
    model = trained(checkpoint(), parity.all_linear(lora_dropout=0.1), ids)
    adapted = logits(model, ids)
    assert not torch.equal(adapted, base)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), base)
        assert torch.equal(logits(model.train(), ids), base)
        assert not model(input_ids=ids).logits.requires_grad
    assert torch.equal(logits(model.eval(), ids), adapted)
    assert torch.equal(logits(model.unload(), ids), base)


def test_new_adapter_starts_as_the_base_model(checkpoint, ids):
    base = logits(parity.load_ours(checkpoint()), ids)
    model = kt_peft.get_peft_model(parity.load_ours(checkpoint()), parity.all_linear())
    assert torch.equal(logits(model.eval(), ids), base)


def test_second_adapter_is_refused_and_leaves_the_first(checkpoint, tmp_path, ids):
    model = trained(checkpoint(), parity.all_linear(), ids)
    model.save_pretrained(tmp_path)
    before = logits(model, ids)
    for add in (lambda: model.add_adapter("b", parity.all_linear()), lambda: model.load_adapter(str(tmp_path), "b")):
        with pytest.raises(ConfigError, match="holds one adapter at a time and has 'default'"):
            add()
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model, ids), before)
    for again in (model, model.get_base_model()):
        with pytest.raises(ConfigError, match="already carries an adapter"):
            kt_peft.get_peft_model(again, parity.all_linear())
    assert torch.equal(logits(kt_peft.load_adapter(model.unload(), tmp_path), ids), before)


# --- merge


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_merged_experts_are_base_plus_delta_rounded_once(checkpoint, tmp_path, family):
    model = parity.fill_lora(kt_peft.get_peft_model(parity.load_ours(checkpoint(family)), parity.all_linear()))
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(module, ParamWrapper) for module in merged.modules())
    truth = parity.plain_peft(checkpoint(family), tmp_path / "adapter").merge_and_unload()
    for name, experts in iter_routed_experts(merged):
        expected = truth.get_submodule(name)
        for index in range(experts.spec.num_experts):
            gate, up, down = experts.unpack_expert(index)
            for found, exact in (
                (torch.cat([gate, up]), expected.gate_up_proj[index]),
                (down, expected.down_proj[index]),
            ):
                error = (found.double() - exact.detach()).abs()
                assert (error <= 2.0**-8 * exact.abs() + 1e-6).all()  # half a unit of bf16, and the f32 sum before it
    merged.save_pretrained(tmp_path / "exported")
    exported = tiny_models.load_stock(tmp_path / "exported")
    ids = tiny_models.token_ids()
    bound = 0.05 * logits(exported, ids).norm()
    assert (logits(exported, ids) - logits(merged, ids)).norm() <= bound


def test_merged_adapter_cannot_be_taken_out_again(checkpoint, ids):
    model = trained(checkpoint(), parity.all_linear(target_modules=["experts"]), ids)
    adapted = logits(model, ids)
    model.merge_adapter()
    merged = logits(model, ids)
    assert (merged - adapted).norm() <= 0.05 * adapted.norm(), "applied once, not twice"
    with pytest.raises(ValueError, match="unmerge: adapter 'default' was rounded"):
        model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(ValueError, match="load the base model again"):
        logits(model, ids)


def test_safe_merge_of_a_broken_adapter_changes_nothing(checkpoint, ids):
    model = parity.fill_lora(kt_peft.get_peft_model(parity.load_ours(checkpoint()), parity.all_linear()))
    experts = next(module for _, module in iter_routed_experts(model))
    before = [part.clone() for part in experts.unpack_expert(0)]
    with torch.no_grad():
        expert_lora_of(model)[0].down.b.parameter.fill_(float("nan"))
    with pytest.raises(ValueError, match="makes expert 0 not finite; nothing was merged"):
        model.merge_and_unload(safe_merge=True)
    assert all(torch.equal(one, other) for one, other in zip(before, experts.unpack_expert(0), strict=True))


# --- the ways a step is cut up


@pytest.mark.parametrize("activation", ["retain", "recompute"])
@pytest.mark.parametrize("family", [FAMILY, "deepseek_v3"])
def test_gradient_checkpointing_gives_equal_gradients(checkpoint, ids, family, activation):
    results = {}
    for mode in ("off", "reentrant", "non-reentrant"):
        base = parity.load_ours(checkpoint(family), cpu_activation=activation)
        if mode != "off":
            base.gradient_checkpointing_enable({"use_reentrant": mode == "reentrant"})
            base.enable_input_require_grads()
        model = parity.fill_lora(kt_peft.get_peft_model(base, parity.all_linear(lora_dropout=0.2))).train()
        torch.manual_seed(11)
        results[mode] = parity.logits_and_grads(model, ids)
    for mode in ("reentrant", "non-reentrant"):
        for name, value in results["off"].items():
            assert torch.equal(results[mode][name], value), f"{mode}: {name}"


def test_two_forwards_before_one_backward(checkpoint):
    model = parity.fill_lora(kt_peft.get_peft_model(parity.load_ours(checkpoint()), parity.all_linear()))
    batches = [tiny_models.token_ids(2, 9, seed=1), tiny_models.token_ids(1, 12, seed=2)]
    apart = [parity.logits_and_grads(model, batch) for batch in batches]
    losses = [model(input_ids=batch, labels=batch).loss for batch in batches]
    sum(losses).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected = apart[0][name] + apart[1][name]
            torch.testing.assert_close(parameter.grad.double(), expected, rtol=1e-5, atol=1e-6, msg=name)


def test_gradients_accumulate_over_steps(checkpoint):
    model = parity.fill_lora(kt_peft.get_peft_model(parity.load_ours(checkpoint()), parity.all_linear()))
    batches = [tiny_models.token_ids(2, 9, seed=seed) for seed in range(3)]
    apart = [parity.logits_and_grads(model, batch) for batch in batches]
    for batch in batches:
        model(input_ids=batch, labels=batch).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected = sum(result[name] for result in apart)
            torch.testing.assert_close(parameter.grad.double(), expected, rtol=1e-5, atol=1e-6, msg=name)


# --- dropout


def test_dropout_equals_a_reference_with_the_same_mask(checkpoint, tmp_path, monkeypatch):
    p, directory = 0.3, checkpoint()
    model = kt_peft.get_peft_model(
        parity.load_ours(directory), parity.all_linear(target_modules=["experts"], lora_dropout=p)
    )
    parity.fill_lora(model).save_pretrained(tmp_path)
    ids = parity.decided_ids(directory, tmp_path)
    seeds = []
    real = kt_sft.nn.routed_experts.submit
    monkeypatch.setattr(
        kt_sft.nn.routed_experts, "submit", lambda *args, **more: seeds.append(more["seed"]) or real(*args, **more)
    )
    found = parity.logits_and_grads(model.train(), ids)
    config = model.config
    masks = [
        parity.dropout_masks(seed, p, tokens=ids.numel(), k=config.num_experts_per_tok, spec=experts.spec)
        for seed, (_, experts) in zip(seeds, iter_routed_experts(model), strict=True)
    ]
    assert len(set(seeds)) == len(seeds), "each layer has masks of its own"
    kept = torch.cat([(mask > 0).flatten() for layer in masks for mask in layer.values()]).double().mean()
    assert abs(kept - (1 - p)) < 0.02
    run = functools.partial(parity.logits_and_grads, ids=ids)
    truth = run(parity.noisy_peft(directory, tmp_path, roundoff=0.0, masks=masks))
    bound = parity.bounds(directory, tmp_path, truth, run, masks=masks)
    parity.check_close(found, truth, bound)
    without = run(parity.noisy_peft(directory, tmp_path, roundoff=0.0))
    assert parity.norm(without["logits"] - truth["logits"]) > 3 * bound["logits"], "the mask matters"


def test_dropout_is_seeded_and_off_in_eval(checkpoint, ids):
    target = {"target_modules": ["experts"]}
    plain, model = (
        parity.fill_lora(
            kt_peft.get_peft_model(parity.load_ours(checkpoint()), parity.all_linear(lora_dropout=p, **target))
        )
        for p in (0.0, 0.4)
    )
    expected = logits(plain.eval(), ids)
    assert torch.equal(logits(model.eval(), ids), expected)
    model.train()
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(logits(model, ids))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], expected)


def test_linear_layers_keep_the_users_dropout(checkpoint):
    model = kt_peft.get_peft_model(parity.load_ours(checkpoint()), parity.all_linear(lora_dropout=0.25))
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.25}
    assert {layer.dropout for layer in expert_lora_of(model)} == {0.25}
    attention_only = parity.all_linear(lora_dropout=0.25, target_modules=["q_proj"])
    model = kt_peft.get_peft_model(parity.load_ours(checkpoint()), attention_only)
    assert model.peft_config["default"].lora_dropout == 0.25
    assert isinstance(model, PeftModel)
    assert expert_lora_of(model) == [None, None]
