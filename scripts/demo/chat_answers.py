"""Asks a model a list of questions, greedily, in the chat format that LLaMA-Factory trained it with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Question:
    """One held-out question; a good answer contains `expects`."""

    text: str
    expects: str
    is_general: bool  # known before the training already, and still to be known after it

    def is_met_by(self, answer: str) -> bool:
        return self.expects.lower() in answer.lower()


def read_questions(path: Path) -> list[Question]:
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [Question(row["instruction"], row["expects"], row["kind"] == "general") for row in rows]


@torch.inference_mode()
def ask(model: Any, tokenizer: Any, questions: list[Question], *, system: str, max_new_tokens: int = 40) -> list[str]:
    """Greedy answers, one per question, from one left-padded batch; cut off at `max_new_tokens`."""
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "system", "content": system}, {"role": "user", "content": question.text}],
            add_generation_prompt=True,
            tokenize=False,
        )
        for question in questions
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    batch = batch.to(model.device)
    model.eval()
    ids = model.generate(
        **batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )  # [questions, prompt + answer]
    answers = []
    for row in ids[:, batch["input_ids"].shape[1] :].tolist():
        is_whole = tokenizer.eos_token_id in row
        text = " ".join(tokenizer.decode(row, skip_special_tokens=True).split())
        answers.append(text if is_whole else f"{text} ...")
    return answers
