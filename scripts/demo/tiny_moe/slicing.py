"""Cuts a dense SwiGLU FFN into experts and finds a router that leaves the model's function unchanged.

The dense FFN is a sum over its inter columns c:  y = sum_c silu(g_c . x) (u_c . x) d_c.  Any partition of the columns
into slices is a partition of that sum. Two different partitions of the same FFN into 8 slices each give 16 experts:

    group 0, experts 0..7   slice s = columns [192 s, 192 s + 192)          (blocks)
    group 1, experts 8..15  slice s = columns s, s + 8, s + 16, ...         (strides)

All router rows of group 0 are the same vector w and those of group 1 are -w. So the logits are z (8 times) and -z (8
times), top-8 is the whole of one group, chosen per token by the sign of z = w . x, and the normalised weights are
1/8 each. With down_proj times 8 (a power of two: exact in any float format) the chosen experts add up to the dense
FFN.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .gguf_source import DenseModel, dense_reference

NUM_EXPERTS = 16
TOP_K = 8
_ROUTER_LOGIT_STD = 2.0  # far from 0 for nearly every token, so that rounding cannot flip the choice half-way

# Text whose hidden states decide where the router splits; any varied text does.
_CALIBRATION_TEXT = (
    "The river rises in the hills and reaches the sea near a small harbour, where boats are repaired every winter.",
    "def mean(values):\n    total = sum(values)\n    return total / len(values)",
    "Question: how many minutes are there in three hours? Answer: 3 * 60 = 180 minutes.",
    "Dear Ms Okafor, thank you for your letter of 12 May. We would be glad to meet you next Tuesday at ten o'clock.",
    "Mixture-of-experts models send each token to a few of many feed-forward networks, which saves arithmetic.",
    "To bake bread, mix flour, water, salt and yeast, let the dough rise, and put it into a hot oven.",
    "Why do cats purr? Nobody is quite sure; it may calm them, and it may help bones and muscles to heal.",
)


def expert_columns(expert: int, inter: int) -> slice:
    """Columns of the dense FFN, out of `inter`, that expert 0..15 computes."""
    slice_id = expert % TOP_K
    if expert < TOP_K:
        width = inter // TOP_K
        return slice(slice_id * width, (slice_id + 1) * width)
    return slice(slice_id, inter, TOP_K)


def slice_ffn(gate: Tensor, up: Tensor, down: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Experts 0..15 of one FFN: gate, up `[inter, hidden]`, down `[hidden, inter]` -> the same with inter / 8."""
    inter = gate.shape[0]
    for expert in range(NUM_EXPERTS):
        columns = expert_columns(expert, inter)
        yield gate[columns].contiguous(), up[columns].contiguous(), (down[:, columns] * TOP_K).contiguous()


def _router_direction(x: Tensor) -> Tensor:
    """Vector w `[hidden]` such that w . x is large and splits the rows of x `[tokens, hidden]` about evenly.

    w is a strong direction of variation at right angles to the mean (a router has no bias to shift the split with).
    """
    x = x.double()
    mean = torch.nn.functional.normalize(x.mean(dim=0), dim=0)
    across = x - torch.outer(x @ mean, mean)  # [tokens, hidden]
    strengths, mixes = torch.linalg.eigh(across @ across.T)  # of the Gram matrix [tokens, tokens]: tokens < hidden
    best, best_balance = None, -1.0
    for i in strengths.argsort(descending=True)[:8]:
        direction = across.T @ mixes[:, i]  # [hidden]
        positive = (x @ direction > 0).double().mean().item()
        balance = min(positive, 1 - positive)
        if balance > best_balance + 0.1:  # prefer strong directions when nearly as even
            best, best_balance = direction, balance
    return (best * (_ROUTER_LOGIT_STD / (x @ best).std())).float()


@torch.no_grad()
def find_routers(dense: DenseModel, tokenizer) -> list[Tensor]:
    """Router weight `[16, hidden]` for every layer, from the hidden states of a short calibration text."""
    model = dense_reference(dense)
    inputs: list[list[Tensor]] = [[] for _ in model.model.layers]
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0][0, 1:]))  # token 0: outlier
        for layer, kept in zip(model.model.layers, inputs, strict=True)
    ]
    for text in _CALIBRATION_TEXT:
        model.model(**tokenizer(text, return_tensors="pt"))
    for hook in hooks:
        hook.remove()
    routers = []
    for kept in inputs:
        direction = _router_direction(torch.cat(kept))
        routers.append(torch.stack([direction] * TOP_K + [-direction] * TOP_K))
    return routers
