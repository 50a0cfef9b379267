"""What deferred experts cost in quality: the demo model on its held-out rows, for d = 0 to 4.

    python scripts/demo/deferred.py [--model outputs/models/tiny_moe] [--adapter outputs/tiny_moe_lora]

Prints the table of docs/operator.md. Every row is a question and its answer in the chat format of the training, in one
pass; a token's experts are deferred in the same way when tokens come one by one.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from transformers import AutoTokenizer

import kt_sft

ROOT = Path(__file__).resolve().parents[2]
SYSTEM = "You are a helpful AI assistant."
HEADINGS = ("d", "perplexity of the answers", "KL to d = 0, nats", "same first choice as d = 0")


@dataclass(frozen=True)
class Row:
    """Token ids `[length]`, and how many of them are the question."""

    ids: Tensor
    prompt_length: int


def read_rows(path: Path, tokenizer) -> list[Row]:
    """The questions with their answers, as the training writes them."""
    rows = []
    for entry in json.loads(path.read_text(encoding="utf-8")):
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": entry["instruction"]}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(f"{prompt}{entry['output']}{tokenizer.eos_token}", add_special_tokens=False)["input_ids"]
        rows.append(Row(torch.tensor(ids), len(tokenizer(prompt, add_special_tokens=False)["input_ids"])))
    return rows


@torch.inference_mode()
def log_probabilities(model, rows: list[Row]) -> list[Tensor]:
    """Of every token that follows another one, f32 `[length - 1, vocabulary]` per row."""
    return [model(row.ids[None]).logits[0, :-1].float().log_softmax(-1) for row in rows]


def perplexity(rows: list[Row], found: list[Tensor]) -> float:
    """Of the answers' tokens."""
    losses = [
        -logs.gather(1, row.ids[1:, None])[row.prompt_length - 1 :, 0] for row, logs in zip(rows, found, strict=True)
    ]
    return math.exp(torch.cat(losses).mean().item())


def divergence(exact: list[Tensor], found: list[Tensor]) -> float:
    """Mean Kullback-Leibler divergence over all tokens."""
    return torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(exact, found, strict=True)]).mean().item()


def agreement(exact: list[Tensor], found: list[Tensor]) -> float:
    """Part of the tokens whose likeliest successor is the same."""
    same = [(p.argmax(-1) == q.argmax(-1)).float() for p, q in zip(exact, found, strict=True)]
    return torch.cat(same).mean().item()


def measure(model_path: Path, adapter: Path | None, rows: list[Row], counts: list[int]) -> list[tuple[str, ...]]:
    """Lines of the table."""
    lines, exact = [], None
    for count in counts:
        config = kt_sft.KTConfig(max_deferred_experts_per_token=count)
        model = kt_sft.load_model(model_path, config, dtype=torch.bfloat16)
        if adapter is not None:
            model = kt_sft.load_adapter(model, adapter)
        found = log_probabilities(model.eval(), rows)
        exact = found if exact is None else exact
        figures = f"{divergence(exact, found):.3f}", f"{agreement(exact, found):.1%}"
        lines.append((str(count), f"{perplexity(rows, found):.2f}", *figures))
    return lines


def main(
    model: Annotated[Path, typer.Option(help="the demo model")] = Path("outputs/models/tiny_moe"),
    adapter: Annotated[Path, typer.Option(help="its adapter")] = Path("outputs/tiny_moe_lora"),
    data: Annotated[Path, typer.Option()] = ROOT / "examples/data/kt_sft_identity_heldout.json",
    most: Annotated[int, typer.Option(help="largest d")] = 4,
) -> None:
    """Measure with the adapter and without."""
    rows = read_rows(data, AutoTokenizer.from_pretrained(model))
    tokens, answers = sum(len(row.ids) - 1 for row in rows), sum(len(row.ids) - row.prompt_length for row in rows)
    print(f"{len(rows)} rows, {tokens} tokens, {answers} of them in answers\n")
    for name, folder in (("With the adapter", adapter), ("Without", None)):
        print(f"{name}:\n\n| " + " | ".join(HEADINGS) + " |")
        print("|" + " ---: |" * len(HEADINGS))
        for line in measure(model, folder, rows, list(range(most + 1))):
            print("| " + " | ".join(line) + " |")
        print()


if __name__ == "__main__":
    typer.run(main)
