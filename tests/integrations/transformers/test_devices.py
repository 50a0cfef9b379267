"""Activations and LoRA on another device than the experts: results come back where the tensors live."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

import kt_sft
from tests.helpers import tiny_models
from tests.helpers.layers import LayerCase, MoeCall, lora_inputs, make_layer, make_problem, moe, run

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_layer_results_equal_those_of_the_cpu_bitwise(device):
    problem = make_problem(LayerCase(p=0.2, seed=50))
    layer = make_layer(problem)
    want = run(problem, layer)
    x = problem.x.float().to(device).requires_grad_()
    weights = problem.weights.float().to(device).requires_grad_()
    lora = tuple(None if t is None else t.detach().to(device).requires_grad_() for t in lora_inputs(problem)[0])
    call = MoeCall(layer, scales=(1.5, 1.5, 0.7), dropout=problem.p, seed=problem.seed)
    out = moe(x, problem.ids.to(device), weights, lora, call)
    out.backward(problem.dout.float().to(device))
    got = {"out": out, "dx": x.grad, "dweights": weights.grad, "dgate_a": lora[0].grad, "ddown_b": lora[5].grad}
    for name, value in got.items():
        assert value.device.type == device, name
        assert torch.equal(value.detach().cpu(), want[name]), name


@pytest.mark.parametrize("device", DEVICES)
def test_a_training_step_with_the_rest_of_the_model_on_the_device(device, tmp_path):
    model = kt_sft.load_model(tiny_models.build("qwen3_moe", tmp_path / "model"), dtype=torch.float32)
    model = kt_sft.get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).to(device)
    ids = tiny_models.token_ids().to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert all(p.grad is not None and p.grad.device.type == device for p in trained.values())
        assert any("experts" in name for name in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
