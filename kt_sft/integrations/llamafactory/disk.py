"""The output directory: whether it can be written and has room, before training; a full disk, at its end."""

from __future__ import annotations

import logging
import math
import os
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kt_sft.errors import GIB, OutputError
from kt_sft.formats import training_checkpoint
from kt_sft.formats.disk import free_bytes, is_write_error, reason
from kt_sft.formats.staging import new_path

logger = logging.getLogger(__name__)

# State bytes per trained element; every other optimizer is counted as Adam with two numbers of the parameter's type.
_STATES = {"sgd": 0, "adagrad": 1, "adafactor": 0, "lion": 1, "rmsprop": 1, "lomo": 0}
_NAME_LENGTH = 50  # of the output directory, in the name of another place
_SMALL_FILES_BYTES = 32 << 20  # tokenizer, logs, states of the trainer


def check_writable(output_dir: str, key: str = "output_dir") -> None:
    """Whether a run can write where it is told to; nothing stays there.

    Args:
        key: names the folder in messages.
    Raises:
        OutputError: a file is there, or the folder cannot be made or written.
    """
    folder = Path(output_dir)
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise OutputError(folder, key, expected="a directory", found=f"a file at {existing}", remedy="choose another")
    try:
        with tempfile.TemporaryFile(dir=existing):
            return
    except OSError as error:
        raise OutputError(
            folder, f"{key} cannot be written", found=error.strerror or str(error),
            remedy="choose another, or correct its permissions",
        ) from error  # fmt: skip


def check_room(output_dir: str, numel: int, training_args: Any, finetuning_args: Any) -> None:
    """Whether the disk has room for the adapter at the end and for the checkpoints that are sure to come.

    Args:
        numel: trained elements.
    Raises:
        OutputError: it has not; names the bytes needed and available.
    """
    folder = Path(output_dir)
    element_bytes = 2 if finetuning_args.pure_bf16 else 4
    adapter_bytes = numel * element_bytes
    state_bytes = 0 if training_args.save_only_model else numel * _state_bytes(training_args.optim, element_bytes)
    num = _further_checkpoints(folder, training_args)
    needed = adapter_bytes + num * (adapter_bytes + state_bytes) + _SMALL_FILES_BYTES
    available = free_bytes(folder)
    if available < needed:
        parts = f"the adapter of {adapter_bytes / GIB:.2f} GiB"
        if num:
            each = (adapter_bytes + state_bytes) / GIB
            parts += f" and {num} checkpoint{'s' if num > 1 else ''} of {each:.2f} GiB"
        fewer = ", set save_total_limit or a larger save_steps" if num > 1 else ""
        only = ", set save_only_model: true" if num and state_bytes else ""
        raise OutputError(
            folder, f"output_dir has no room for {parts}", expected=f"{needed / GIB:.2f} GiB",
            found=f"{available / GIB:.2f} GiB available", remedy=f"free space, choose another disk{fewer}{only}",
        )  # fmt: skip


def save_or_rescue(trainer: Any, stock: Callable[[], None]) -> None:
    """The trainer's `save_model` at the end; where it cannot write, the adapter goes where there is room.

    Raises:
        OutputError: always when the output directory could not be written; says where the adapter is.
    """
    try:
        stock()
    except Exception as error:
        if not is_write_error(error):
            raise
        output = trainer.args.output_dir
        if not trainer.args.should_save:
            raise OutputError(output, "saving", found=reason(error)) from error
        kept = _rescue(trainer)
        where = f"the adapter is in {kept}" if kept else f"no other place took it; last checkpoint: {_last(output)}"
        raise OutputError(output, "saving the adapter", found=reason(error), remedy=where) from error


def _rescue(trainer: Any) -> Path | None:
    """The adapter, without anything else, in the first other place that takes it."""
    output = Path(trainer.args.output_dir).absolute()
    for place in (output, output.parent, Path.cwd(), Path.home(), Path(tempfile.gettempdir())):
        folder = place / f"{output.name[:_NAME_LENGTH]}-adapter-{secrets.token_hex(4)}"
        try:
            with new_path(folder, is_file=False) as staging:
                trainer.model.save_pretrained(str(staging))
            return folder
        except Exception as error:
            if not is_write_error(error):
                raise
    return None


def _last(output_dir: str) -> str:
    found, _ = training_checkpoint.newest_whole(Path(output_dir))
    return str(found) if found else "missing"


def _state_bytes(optim: Any, element_bytes: int) -> int:
    name = str(getattr(optim, "value", optim)).lower()
    num = next((num for word, num in _STATES.items() if word in name), 2)
    small = 1 if "8bit" in name else element_bytes
    return num * small


def _further_checkpoints(folder: Path, training_args: Any) -> int:
    """Checkpoints that will be there besides those that are, as far as that is known before the data is."""
    strategy = str(getattr(training_args.save_strategy, "value", training_args.save_strategy))
    planned, every = 1, training_args.save_steps
    if strategy == "no" or (strategy == "steps" and every <= 0):
        return 0
    if strategy == "steps" and training_args.max_steps > 0:
        planned = math.ceil(training_args.max_steps / every if every >= 1 else 1 / every)  # below 1: a share of all
    limit, there = training_args.save_total_limit, len(training_checkpoint.checkpoints(folder))
    at_once = min(planned, limit + 1) if limit else planned  # the next one is written before the oldest goes
    return max(1, at_once - there)
