"""Loss curves coincide: ours with plain transformers and PEFT, and quantised experts with bf16 ones."""

from __future__ import annotations

import functools

import pytest
import torch
from peft import LoraConfig
from peft import get_peft_model as plain_get_peft_model

from kt_sft.integrations import peft as kt_peft
from tests.helpers import parity, tiny_models

STEPS = 30


def curve(model) -> list[float]:
    """Loss of each step; 4 batches of 4 x 16 tokens in a fixed order, seen again and again."""
    batches = [tiny_models.token_ids(4, 16, seed=seed) for seed in range(4)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    model.train()
    losses = []
    for step in range(STEPS):
        ids = batches[step % len(batches)]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.convergence
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2"])
def test_loss_curve_equals_plain_peft(tmp_path, family):
    directory = tiny_models.build(family, tmp_path / "model", initializer_range=0.1)
    torch.manual_seed(5)
    ours = kt_peft.get_peft_model(parity.load_ours(directory), parity.all_linear(r=8, lora_alpha=16))
    chosen = ours.peft_config["default"]
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        task_type="CAUSAL_LM",
        target_modules=sorted(chosen.target_modules),
        target_parameters=chosen.target_parameters,
        exclude_modules=chosen.exclude_modules,
    )
    torch.manual_seed(5)
    plain = plain_get_peft_model(tiny_models.load_stock(directory), config)
    trainable = {name: p.detach().clone() for name, p in ours.named_parameters() if p.requires_grad}
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, trainable.pop(name)), f"{name} starts elsewhere"
    assert not trainable

    expected, found = curve(plain), curve(ours)
    assert expected[-1] < 0.7 * expected[0], "the run must learn something"
    for step, (one, other) in enumerate(zip(expected, found, strict=True)):
        assert abs(one - other) <= max(0.005, 0.01 * one), f"step {step}: {other:.4f} where plain PEFT has {one:.4f}"


SMOOTHED_STEPS = 5
# Largest relative distance of the smoothed loss from that with bf16 experts, anywhere in the run.
ALLOWED = {"INT8": 0.01, "INT4": 0.03}


def distance(losses: list[float], expected: list[float]) -> float:
    """Largest relative difference of the means over the last SMOOTHED_STEPS steps."""
    pairs = zip(
        *(torch.tensor(c).unfold(0, SMOOTHED_STEPS, 1).mean(1).tolist() for c in (losses, expected)), strict=True
    )
    return max(abs(one - other) / other for one, other in pairs)


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v2"])
def curve_of(request, tmp_path_factory):
    """Trains a fresh model with the given settings; the same adapter to start from, the same batches."""
    directory = tiny_models.build(request.param, tmp_path_factory.mktemp(request.param), initializer_range=0.1)

    @functools.cache
    def run(**config) -> list[float]:
        torch.manual_seed(5)
        model = parity.load_ours(directory, **config)
        return curve(kt_peft.get_peft_model(model, parity.all_linear(r=8, lora_alpha=16)))

    return run


@pytest.mark.convergence
@pytest.mark.parametrize(
    "config",
    [
        {"method": "INT8"},
        {"method": "INT8", "expert_activations": "int8"},
        {"method": "INT4"},
        {"method": "INT4", "int4_group_size": 128, "expert_activations": "int8"},
    ],
    ids=lambda config: "-".join(map(str, config.values())),
)
def test_quantised_experts_learn_as_bf16_ones_do(curve_of, config):
    expected, found = curve_of(method="BF16"), curve_of(**config)
    assert expected[-1] < 0.7 * expected[0], "the run must learn something"
    assert 0 < distance(found, expected) <= ALLOWED[config["method"]]
