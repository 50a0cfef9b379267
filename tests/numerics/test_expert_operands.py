"""LoRA factors between the optimizer and the kernels: steps that nobody announces, and the precision of gradients."""

from __future__ import annotations

import pytest
import torch

from kt_sft.nn import expert_lora
from tests.numerics.test_routed_experts import EXPERTS, HIDDEN, fresh, make_experts


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(1)
    ids = torch.arange(18).reshape(9, 2) % EXPERTS
    return torch.randn(9, HIDDEN, generator=g), ids, torch.rand(9, 2, generator=g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("which", range(4))
def test_steps_between_the_sampled_values_are_seen_after_backward(which, dtype, inputs):
    """Through `.data`, as DeepSpeed writes, and beside the values that tell a copy from its parameter."""
    experts, parameters = make_experts(dtype)
    experts(*inputs).sum().backward()
    values = parameters[which].data.view(-1)
    step = values.numel() // expert_lora._SAMPLES + 1
    assert step > 2
    unseen = torch.ones(values.numel(), dtype=torch.bool)
    unseen[::step] = False
    with torch.no_grad():
        before = fresh(experts, inputs)
        experts(*inputs)
    experts(*inputs).sum().backward()
    values[unseen] += 0.5
    with torch.no_grad():
        after = experts(*inputs)
    assert not torch.equal(after, before)
    assert torch.equal(after, fresh(experts, inputs))


def test_gradients_of_f32_parameters_keep_their_bits(inputs):
    """Sums are f32 to the end: rounded to bf16 on the way out, an optimizer would add up too little."""
    experts, parameters = make_experts(torch.float32)
    weights = inputs[2].clone().requires_grad_()
    x = inputs[0].clone().requires_grad_()
    experts(x, inputs[1], weights).square().sum().backward()
    for number, gradient in enumerate((*(p.grad for p in parameters), weights.grad, x.grad)):
        assert gradient.dtype == torch.float32
        rounded = gradient.bfloat16().float()
        changed = (rounded != gradient).double().mean()
        assert changed > 0.9, f"{number}: {changed:.0%} of the values are more than bf16"
