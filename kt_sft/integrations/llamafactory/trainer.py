"""The patch points in transformers' Trainer; a model that kt_sft did not load stays with the stock code."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from kt_sft.errors import ConfigError
from kt_sft.integrations.canary.callback import Canary
from kt_sft.integrations.llamafactory import disk, interrupts, resuming, saving

_METHODS = ("train", "save_model", "_save", "_save_checkpoint", "_load_optimizer_and_scheduler")
_DIVERTED = ("_get_output_dir", "_push_from_checkpoint")
_CPU_WITH_INDEX = 15  # behind torch's own readers, which know `cpu` alone


def install() -> None:
    """Replace the methods, once in a process.

    Raises:
        ConfigError: another release of transformers, without one of them.
    """
    if missing := [name for name in (*_METHODS, *_DIVERTED) if not hasattr(Trainer, name)]:
        raise ConfigError(f"use_kt: transformers' Trainer has no {', '.join(missing)}; install the release of setup")
    if hasattr(Trainer.train, "of_kt_sft"):
        return
    for name, ours in zip(_METHODS, (_train, _save_model, _save, _save_checkpoint, _load_optimizer), strict=True):
        setattr(Trainer, name, _for_our_models(getattr(Trainer, name), ours))
    _let_torch_load_onto_ranks()


def _for_our_models(stock: Any, ours: Any) -> Any:
    @functools.wraps(stock)
    def method(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(trainer.model, "kt_config"):
            return stock(trainer, *args, **kwargs)
        return ours(functools.partial(stock, trainer), trainer, *args, **kwargs)

    method.of_kt_sft = True
    return method


def _train(stock: Any, trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
    if not any(isinstance(callback, Canary) for callback in trainer.callback_handler.callbacks):
        trainer.add_callback(Canary())
    with interrupts.stopping(trainer):
        return stock(*args, **kwargs)


def _save_model(stock: Any, trainer: Trainer, output_dir: str | None = None, _internal_call: bool = False) -> None:
    if _internal_call:
        stock(output_dir, _internal_call)
    else:
        disk.save_or_rescue(trainer, lambda: stock(output_dir, _internal_call))


def _save(stock: Any, trainer: Trainer, output_dir: str | None = None, state_dict: dict | None = None) -> None:
    folder = Path(trainer.args.output_dir if output_dir is None else output_dir)
    saving.save_files(folder, lambda place: stock(place, state_dict))


def _save_checkpoint(stock: Any, trainer: Trainer, model: Any, trial: Any) -> None:
    saving.save_checkpoint(trainer, lambda: stock(model, trial), trial)


def _load_optimizer(stock: Any, trainer: Trainer, checkpoint: str | None) -> None:
    state = resuming.read_optimizer(Path(checkpoint)) if checkpoint is not None else None
    if state is not None and not trainer.is_deepspeed_enabled:
        shapes = resuming.trained_shapes(trainer.optimizer.param_groups)
        resuming.check_optimizer(Path(checkpoint), state, shapes, is_ordered=True)
    stock(checkpoint)


@functools.cache
def _let_torch_load_onto_ranks() -> None:
    """torch cannot load onto `cpu:0`, as accelerate calls the CPU of a rank; there is only one."""
    torch.serialization.register_package(
        _CPU_WITH_INDEX,
        lambda storage: None,
        lambda storage, location: storage if location.startswith("cpu:") else None,
    )
