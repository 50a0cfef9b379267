"""The canary: a run whose adapter is inert stops after one step and names the module; any other run is left alone."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import Trainer, TrainingArguments

import kt_sft
from kt_sft.errors import InertAdapter
from kt_sft.integrations import peft as kt_peft
from kt_sft.models.spec import iter_routed_experts
from tests.helpers import parity, tiny_models

ROWS = [{"input_ids": torch.arange(2 + i, 11 + i), "labels": torch.arange(2 + i, 11 + i)} for i in range(24)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    built = {}

    def of(family="qwen3_moe"):
        if family not in built:
            built[family] = tiny_models.build(family, root / family)
        return built[family]

    return of


def adapted(directory, *, dtype=torch.float32, **options):
    torch.manual_seed(2)
    model = parity.load_ours(directory, dtype=dtype)
    return kt_peft.get_peft_model(model, parity.all_linear(lora_dropout=0.1, **options))


def run(model, tmp_path, *, canary=True, rows=ROWS, optimizer=None, **options):
    """(losses, canary) of a short training."""
    values = {
        "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "seed": 7,
        "lr_scheduler_type": "constant", "report_to": "none", "save_strategy": "no", "use_cpu": True,
    }  # fmt: skip
    arguments = TrainingArguments(output_dir=str(tmp_path), **{**values, **options})
    ours = kt_sft.Canary()
    more = {} if optimizer is None else {"optimizers": (optimizer, None)}
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[ours] if canary else [], **more)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], ours


def lines(caplog):
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith("canary")]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3_moe", {}),
        ("deepseek_v2", {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "warmup_steps": 2}),
        ("mixtral", {"weight_decay": 0.1, "bf16": True}),
    ],
)
def test_a_run_with_it_is_the_run_without_it_bit_for_bit(checkpoint, tmp_path, caplog, family, options):
    if "warmup_steps" in options:
        options = {**options, "lr_scheduler_type": "constant_with_warmup"}
    results = []
    for canary in (False, True):
        model = adapted(checkpoint(family))
        losses, _ = run(model, tmp_path, canary=canary, **options)
        assert all(module.training for module in model.modules())
        results.append((losses, {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}))
    (losses, values), (again, values_again) = results
    assert losses == again
    assert all(torch.equal(value, values_again[name]) for name, value in values.items())
    step = 2 if "warmup_steps" in options else 1
    assert len(lines(caplog)) == 1
    assert lines(caplog)[0].startswith(f"canary: step {step} changed all {len(values) // 2} modules that train")


def test_experts_without_tokens_are_excepted_and_counted(checkpoint, tmp_path, caplog):
    rows = [{"input_ids": torch.tensor([5, 5]), "labels": torch.tensor([5, 5])}] * 4
    run(adapted(checkpoint()), tmp_path, rows=rows, max_steps=1, per_device_train_batch_size=1)
    (line,) = lines(caplog)
    resting = int(line.partition("excepted ")[2].split()[0])
    assert f"{resting} of 28 matrices of experts without tokens" in line  # two layers of seven experts, two matrices
    assert resting >= 12


def test_experts_whose_tokens_have_no_label_are_excepted(checkpoint, tmp_path, caplog):
    """In the last layer only the token before a label gets a gradient."""
    rows = [{"input_ids": torch.arange(2, 40), "labels": torch.tensor([-100] * 37 + [9])}] * 4
    run(adapted(checkpoint("deepseek_v2")), tmp_path, rows=rows, max_steps=1, per_device_train_batch_size=1)
    assert len(lines(caplog)) == 1


@pytest.mark.parametrize(("family", "layers"), [("deepseek_v3", 3), ("gemma4_text", 1), ("olmoe", 2)])
def test_queries_of_tokens_that_see_themselves_alone_are_excepted(checkpoint, tmp_path, caplog, family, layers):
    """The one label is that of the second token: attention has one key, and softmax no gradient."""
    rows = [{"input_ids": torch.tensor([5, 9]), "labels": torch.tensor([5, 9])}] * 4
    run(adapted(checkpoint(family)), tmp_path, rows=rows, max_steps=1, per_device_train_batch_size=1)
    (line,) = lines(caplog)
    _, _, resting = line.partition("without input or gradient: model.layers.")
    assert resting.endswith(f" and {2 * layers - 4} more") == (layers > 2)


def test_steps_without_any_gradient_are_passed_over(checkpoint, tmp_path, caplog):
    model, calls = adapted(checkpoint()), []

    def silent(module, args, output):
        calls.append(module)
        return output * (len(calls) > 2)

    model.base_model.model.lm_head.register_forward_hook(silent)
    run(model, tmp_path)
    assert lines(caplog)[0].startswith("canary: step 3 changed all")


def test_gradients_that_stay_zero_stop_the_run(checkpoint, tmp_path):
    model = adapted(checkpoint())
    model.base_model.model.lm_head.register_forward_hook(lambda module, args, output: output * 0.0)
    with pytest.raises(InertAdapter, match="canary: step 10: .* no gradient reaches its output"):
        run(model, tmp_path, max_steps=12)


def test_all_leaves_out_the_indexer_of_attention(checkpoint, tmp_path, caplog):
    """GLM-5's chooses the keys that attention sees, and no gradient passes a choice."""
    model = adapted(checkpoint("glm_moe_dsa"))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("self_attn.q_b_proj" in name for name in names)
    assert not any("indexer" in name for name in names)
    run(model, tmp_path, max_steps=1)
    assert "without input" not in lines(caplog)[0]


def test_bf16_factors_and_tiny_rates_are_no_false_alarm(checkpoint, tmp_path, caplog):
    model = adapted(checkpoint("deepseek_v2"), dtype=torch.bfloat16).to(torch.bfloat16)
    run(model, tmp_path, learning_rate=1e-7)
    assert len(lines(caplog)) == 1


def test_steps_that_16_bits_cannot_hold_are_excepted_and_said(checkpoint, tmp_path, caplog):
    """Next to 1.0 bf16 has 0.996; a warm-up begins with less, float32 would change."""
    model = adapted(checkpoint(), dtype=torch.bfloat16)
    norms = [p.requires_grad_() for name, p in model.named_parameters() if "q_norm" in name]
    assert len(norms) == 2 and norms[0].dtype == torch.bfloat16
    run(model, tmp_path, learning_rate=1e-4, max_steps=1)
    assert "changed all 12 modules" in lines(caplog)[0] and "steps too small for 16 bits" in lines(caplog)[0]


def test_parameters_in_16_bits_that_no_optimizer_has_stop_the_run(checkpoint, tmp_path):
    model = adapted(checkpoint(), dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    next(p for name, p in model.named_parameters() if "q_norm" in name).requires_grad_()
    with pytest.raises(InertAdapter, match="q_norm .* the optimiser left its parameters alone"):
        run(model, tmp_path, optimizer=optimizer)


def test_a_resumed_adapter_with_a_frozen_part_passes(checkpoint, tmp_path, caplog):
    model = parity.fill_lora(adapted(checkpoint()))
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "layers.0.mlp.experts" in name:
            parameter.requires_grad_(False)
    run(model, tmp_path, max_steps=1)
    assert len(lines(caplog)) == 1 and all(module.training for module in model.modules())
    assert not any(p.requires_grad for n, p in model.named_parameters() if "q_proj" in n)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_saved_modules_pass(checkpoint, tmp_path, caplog, target):
    run(adapted(checkpoint("deepseek_v2"), modules_to_save=[target]), tmp_path, max_steps=1)
    assert len(lines(caplog)) == 1


def test_trainable_tokens_that_do_not_occur_are_excepted(checkpoint, tmp_path, caplog):
    model = adapted(checkpoint("deepseek_v2"), trainable_token_indices={"embed_tokens": [100]})
    run(model, tmp_path, max_steps=1)
    assert "without input or gradient: model.embed_tokens" in lines(caplog)[0]


def detach_experts(model):
    """They compute with their LoRA, and no gradient comes back."""
    for _, experts in iter_routed_experts(model):
        stock = experts.lora.tensors
        experts.lora.tensors = lambda stock=stock: tuple(None if t is None else t.detach() for t in stock())


def zero_gradients(model):
    for name, parameter in model.named_parameters():
        if "layers.1.mlp.experts" in name and parameter.requires_grad:
            parameter.register_hook(torch.zeros_like)


def one_expert_without_gradient(model):
    experts = next(iter_routed_experts(model))[1]
    for factor in (experts.lora.down.a, experts.lora.down.b):

        def hook(gradient, factor=factor):
            gradient = gradient.clone()
            shape = (7, -1) if factor.layout == "expert_major" else (-1, 7)
            view = gradient.view(shape)
            (view if shape[0] == 7 else view.T)[3] = 0
            return gradient

        factor.parameter.register_hook(hook)


def detach_attention(model):
    layer = model.base_model.model.model.layers[0].self_attn.v_proj
    layer.lora_B["default"].register_forward_hook(lambda module, args, output: output.detach())


def switch_does_nothing(model):
    """The update is there, and the output does not depend on it."""
    layer = model.base_model.model.model.layers[1].self_attn.o_proj
    stock = layer.forward
    layer.forward = lambda x, *args, **kwargs: stock(x) if torch.is_grad_enabled() else layer.base_layer(x)


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (detach_experts, r"layers\.0\.mlp\.experts\.gate_up_proj .* its parameters have no gradient in experts"),
        (zero_gradients, r"layers\.1\.mlp\.experts\.gate_up_proj .* no gradient in experts 0, 1, 2"),
        (one_expert_without_gradient, r"layers\.0\.mlp\.experts\.down_proj .* no gradient in experts 3 of 7"),
        (detach_attention, r"layers\.0\.self_attn\.v_proj .* no gradient"),
        (switch_does_nothing, r"layers\.1\.self_attn\.o_proj .* the same with the adapter switched off"),
    ],
)
def test_an_inert_run_stops_with_one_line_that_names_the_module(checkpoint, tmp_path, plant, message):
    model = adapted(checkpoint())
    plant(model)
    with pytest.raises(InertAdapter, match=rf"canary: step 1: model\.{message}") as caught:
        run(model, tmp_path, weight_decay=0.1, per_device_train_batch_size=8)
    assert "\n" not in str(caught.value)


def test_an_optimizer_without_the_experts_stops_the_run(checkpoint, tmp_path):
    model = adapted(checkpoint())
    attention = [p for n, p in model.named_parameters() if p.requires_grad and "self_attn" in n]
    with pytest.raises(InertAdapter, match="experts.gate_up_proj .* the optimiser left its parameters alone"):
        run(model, tmp_path, optimizer=torch.optim.AdamW(attention, lr=1e-2))


def test_a_loss_that_ignores_the_model_stops_the_run(checkpoint, tmp_path):
    model = adapted(checkpoint())
    head = model.base_model.model.lm_head
    bias = nn.Parameter(torch.zeros(()))
    head.extra = bias
    head.register_forward_hook(lambda module, args, output: output.detach() + bias)
    with pytest.raises(InertAdapter, match="no gradient reaches its output"):
        run(model, tmp_path)


def test_other_models_are_left_alone(checkpoint, tmp_path, caplog):
    import peft

    model = peft.get_peft_model(tiny_models.load_stock(checkpoint()), LoraConfig(target_modules=["q_proj"]))
    _, canary = run(model, tmp_path, max_steps=1)
    assert canary.is_done
    assert not lines(caplog)
