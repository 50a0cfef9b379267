"""gpt-oss: weights `[experts, in, out]`, gate and up alternating, biases, and a clamped gate function.

    gate = min(gate, limit), up = clamp(up, -limit, limit), h = (up + 1) * gate * sigmoid(alpha * gate)

alpha and limit are attributes of transformers' module (1.702 and 7).
"""

from __future__ import annotations

from torch import nn

from kt_sft.models.layout import ExpertsSpec

EXPERTS_CLASS = "GptOssExperts"


def experts_spec(module: nn.Module) -> ExpertsSpec:
    """The spec of a `GptOssExperts`."""
    num_experts, inter, hidden = module.down_proj.shape
    return ExpertsSpec(
        num_experts,
        hidden,
        inter,
        activation="clamped_swiglu",
        is_transposed=True,
        is_interleaved=True,
        has_bias=True,
        alpha=module.alpha,
        limit=module.limit,
    )
