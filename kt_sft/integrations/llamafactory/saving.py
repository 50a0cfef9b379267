"""A run's checkpoints and adapter, written aside, flushed and renamed: under a name there is a whole one or none."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer_utils import rotate_checkpoints

from kt_sft.errors import OutputError
from kt_sft.formats import training_checkpoint
from kt_sft.formats.training_checkpoint import ADAPTER_CONFIG, ADAPTER_NAME, STATE_NAME

logger = logging.getLogger(__name__)

# The underscore keeps `push_to_hub` from uploading it.
STAGING = "_incomplete"
_REPLACED = "replaced-"
_MODEL_CARD = "README.md"


def save_checkpoint(trainer: Any, stock: Callable[[], None], trial: Any) -> None:
    """The trainer's `_save_checkpoint` into the staging folder of the run, then the rename, by every rank.

    What has to see the final name waits for it: the best checkpoint's path in the state, the upload, and the deletion
    of older ones.

    Args:
        stock: the trainer's own method; its output folder, upload and deletion are diverted meanwhile.
    Raises:
        OutputError: files cannot be written and other ranks wait; a single process goes on without the checkpoint.
    """
    run_folder = Path(trainer._get_output_dir(trial=trial))
    name = f"checkpoint-{trainer.state.global_step}"
    staged, target = run_folder / STAGING / name, run_folder / name
    with _diverted(trainer, run_folder / STAGING):
        try:
            stock()
            _point_to_best(trainer, run_folder, target)
            if trainer.args.should_save:
                trainer.state.save_to_json(str(staged / STATE_NAME))
                flush(staged)
        except Exception as error:
            if not is_write_error(error):
                raise
            shutil.rmtree(staged, ignore_errors=True)
            fault = OutputError(target, "checkpoint not written", found=reason(error), remedy="free space there")
            if trainer.args.world_size > 1:
                raise fault from error
            logger.warning("kt_sft: %s; training goes on", fault)
            return
    trainer.accelerator.wait_for_everyone()  # the random states of all ranks are in it
    if trainer.args.should_save:
        replace_folder(staged, target)
        remove_empty(run_folder / STAGING)
    trainer.accelerator.wait_for_everyone()
    if staged.is_dir() and trainer.args.local_process_index == 0:  # random states on a node with a disk of its own
        replace_folder(staged, target)
    if trainer.args.push_to_hub:
        trainer._push_from_checkpoint(str(target))
    if trainer.args.should_save:
        rotate_checkpoints(
            output_dir=str(run_folder),
            save_total_limit=trainer.args.save_total_limit,
            best_model_checkpoint=trainer.state.best_model_checkpoint,
            use_mtime=True,
        )


def save_files(folder: Path, stock: Callable[[str], None]) -> None:
    """The trainer's `_save` into the staging folder below `folder`; its files then replace those of the same names.

    The weights come last: as long as the older ones are there, so is what belongs to them, but for the instant between
    two renames.

    Raises:
        OSError, SafetensorError, RuntimeError: of the writing; nothing has been replaced then.
    """
    if folder.parent.name == STAGING:  # of a checkpoint that is renamed as a whole
        stock(str(folder))
        return
    staged = folder / STAGING / "model"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        if (folder / _MODEL_CARD).is_file():
            shutil.copyfile(folder / _MODEL_CARD, staged / _MODEL_CARD)  # PEFT adds to a card that is there
        stock(str(staged))
        flush(staged)
        order = {ADAPTER_CONFIG: 1, ADAPTER_NAME: 2}
        for path in sorted(staged.iterdir(), key=lambda path: order.get(path.name, 0)):
            if path.is_dir():
                replace_folder(path, folder / path.name)
            else:
                path.replace(folder / path.name)
        _flush_folder(folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        remove_empty(folder / STAGING)


def clean(run_folder: Path, *, removes: bool) -> None:
    """Remove what a killed process left in the staging folder; a whole checkpoint that waited for its name gets it.

    Every rank calls it, so that all find the same checkpoints afterwards.

    Args:
        removes: delete the rest; one rank does.
    """
    staging = run_folder / STAGING
    with suppress(FileNotFoundError):  # another rank was faster
        for path in training_checkpoint.checkpoints(staging):
            target = run_folder / path.name
            is_named = target.exists() and training_checkpoint.find_fault(target) is None
            if not is_named and training_checkpoint.find_fault(path) is None:
                replace_folder(path, target)
    if removes and staging.is_dir():
        shutil.rmtree(staging, ignore_errors=True)


def replace_folder(staged: Path, target: Path) -> None:
    """Rename a folder to a name that may be taken; what was there is gone afterwards."""
    replaced = staged.parent / f"{_REPLACED}{target.name}"
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        target.replace(replaced)
    staged.replace(target)
    _flush_folder(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_empty(folder: Path) -> None:
    """Remove a folder if nothing is in it."""
    try:
        folder.rmdir()
    except OSError:
        return


def flush(folder: Path) -> None:
    """Have the system write every file below a folder to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            _flush_folder(path)
    _flush_folder(folder)


def is_write_error(error: BaseException) -> bool:
    """Whether an exception of saving is the file system's: torch and safetensors have types of their own for it."""
    words = ("PytorchStreamWriter", "inline_container")
    of_torch = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return isinstance(error, OSError | SafetensorError) or of_torch


def reason(error: BaseException) -> str:
    """The file system's words, without the path; torch has none."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, RuntimeError):
        return "torch could not write its file to the end"
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _diverted(trainer: Any, folder: Path) -> Iterator[None]:
    """Within it the trainer saves into another folder, and so finds no older ones to delete; it uploads nothing."""
    trainer._get_output_dir = lambda trial: str(folder)
    trainer._push_from_checkpoint = lambda checkpoint: None
    try:
        yield
    finally:
        del trainer._get_output_dir, trainer._push_from_checkpoint


def _point_to_best(trainer: Any, run_folder: Path, target: Path) -> None:
    """The state names the best checkpoint where it will be, not in the staging folder."""
    best = trainer.state.best_global_step
    path = run_folder / f"checkpoint-{best}"
    if best and (path == target or path.exists()):
        trainer.state.best_model_checkpoint = str(path)
