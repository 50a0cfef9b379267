"""transformers' Trainer on a tiny model of ours, in this process, with the methods that a LLaMA-Factory run has."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import Trainer, TrainerCallback, TrainingArguments

import kt_sft
from kt_sft.integrations.llamafactory import trainer as patches
from tests.helpers import tiny_models


@contextmanager
def patched() -> Iterator[None]:
    """Within it Trainer has our methods."""
    before = {name: getattr(Trainer, name) for name in patches._METHODS}
    patches.install()
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(Trainer, name, method)


def rows(num: int = 16, length: int = 6) -> list[dict[str, Any]]:
    """Random rows of token ids, the same at every call."""
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(3, 60, (num, length), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(
    base: Path,
    output: Path,
    *callbacks: TrainerCallback,
    rank: int = 2,
    alpha: int = 4,
    targets: Any = "all",
    **settings: Any,
) -> Trainer:
    """A Trainer for 6 steps with a checkpoint at every second one; `settings` go to TrainingArguments."""
    torch.manual_seed(3)
    model = kt_sft.load_model(base)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
    model = kt_sft.get_peft_model(model, config)
    values = {"max_steps": 6, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2, **settings}
    values = {"learning_rate": 1e-2, "report_to": "none", "use_cpu": True, "disable_tqdm": True, **values}
    arguments = TrainingArguments(output_dir=str(output), **values)
    return Trainer(model=model, args=arguments, train_dataset=rows(), eval_dataset=rows(4), callbacks=list(callbacks))


def losses(folder: Path) -> list[float]:
    """Of every step, from a checkpoint."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def base_model(directory: Path, **overrides: Any) -> Path:
    """The checkpoint of the tiny model."""
    return tiny_models.build("qwen3_moe", directory / "base", **overrides)
