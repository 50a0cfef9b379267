"""Where two greedy answers to one prompt part, and whether rounding explains it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Divergence:
    """The first step at which two answers differ.

    Args:
        step: tokens that agree before it.
        margin: between the two best logits of the reference, in bf16.
        bound: twice the largest difference of the reference's logits between bf16 and f32 at this step.
    """

    question: str
    step: int
    ours: str
    reference: str
    margin: float
    bound: float


@dataclass(frozen=True)
class Pair:
    """Two answers that differ; `prompt` is all that the model was given, with special tokens."""

    question: str
    prompt: str
    ours: str
    reference: str


def explain(model: Path, adapter: Path, pairs: list[Pair]) -> list[Divergence]:
    """Where each pair parts.

    The reference is transformers' model with PEFT's adapter, neither with anything of kt_sft.
    """
    if not pairs:
        return []
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    low, high = (_reference(model, adapter, dtype) for dtype in (torch.bfloat16, torch.float32))
    return [_divergence(tokenizer, low, high, pair) for pair in pairs]


def _reference(model: Path, adapter: Path, dtype: torch.dtype) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    return PeftModel.from_pretrained(stock, adapter).eval()


def _divergence(tokenizer: Any, low: Any, high: Any, pair: Pair) -> Divergence:
    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    mine, theirs = (ids(text) + [tokenizer.eos_token_id] for text in (pair.ours, pair.reference))
    step = next(i for i, (a, b) in enumerate(zip(mine, theirs)) if a != b)
    prefix = torch.tensor([ids(pair.prompt) + theirs[:step]])
    rounded, exact = _last_logits(low, prefix), _last_logits(high, prefix)
    best = rounded.topk(2).values
    return Divergence(
        question=pair.question,
        step=step,
        ours=tokenizer.decode([mine[step]]),
        reference=tokenizer.decode([theirs[step]]),
        margin=(best[0] - best[1]).item(),
        bound=2 * (rounded - exact).abs().max().item(),
    )


@torch.inference_mode()
def _last_logits(model: Any, prefix: Tensor) -> Tensor:
    """`[vocabulary]`, f32."""
    return model(prefix).logits[0, -1].float()
