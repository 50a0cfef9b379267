"""A run's checkpoints and adapter, written aside, flushed and renamed: under a name there is a whole one or none."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from kt_sft.compat import transformers as compat
from kt_sft.errors import OutputError
from kt_sft.formats import training_checkpoint
from kt_sft.formats.disk import flush, is_write_error, reason, share
from kt_sft.formats.overwriting import MODEL_CARD, saved_into
from kt_sft.formats.staging import recover, remove_empty, replace_folder
from kt_sft.formats.training_checkpoint import STATE_NAME

logger = logging.getLogger(__name__)

# The underscore keeps `push_to_hub` from uploading it.
STAGING = "_incomplete"


def save_checkpoint(trainer: Any, stock: Callable[[], None], trial: Any) -> None:
    """The trainer's `_save_checkpoint` into the staging folder of the run, then the rename, by every rank.

    What has to see the final name waits for it: the best checkpoint's path in the state, the upload, and the deletion
    of older ones.

    Args:
        stock: the trainer's own method; its output folder, upload and deletion are diverted meanwhile.
    Raises:
        OutputError: files cannot be written and other ranks wait; a single process goes on without the checkpoint.
    """
    run_folder = compat.run_folder(trainer, trial)
    name = f"checkpoint-{trainer.state.global_step}"
    staged, target = run_folder / STAGING / name, run_folder / name
    _remove_link(run_folder / STAGING)
    with compat.diverted(trainer, run_folder / STAGING):
        try:
            stock()
            _point_to_best(trainer, run_folder, target)
            if trainer.args.should_save:
                trainer.state.save_to_json(str(staged / STATE_NAME))
                share(staged)
                flush(staged)
        except Exception as error:
            if not is_write_error(error):
                raise
            shutil.rmtree(staged, ignore_errors=True)
            remove_empty(run_folder / STAGING)
            _report(trainer, target, error)
            return
    trainer.accelerator.wait_for_everyone()  # the random states of all ranks are in it
    if trainer.args.should_save:
        try:
            replace_folder(staged, target)
        except OSError as error:
            _report(trainer, target, error)
            return
        remove_empty(run_folder / STAGING)
    trainer.accelerator.wait_for_everyone()
    if staged.is_dir() and trainer.args.local_process_index == 0:  # random states on a node with a disk of its own
        replace_folder(staged, target)
    if trainer.args.push_to_hub:
        compat.push_checkpoint(trainer, target)
    if trainer.args.should_save:
        most, best = trainer.args.save_total_limit, trainer.state.best_model_checkpoint
        compat.delete_older_checkpoints(run_folder, most=most, best=best)


def _report(trainer: Any, target: Path, error: BaseException) -> None:
    """A checkpoint that could not be written.

    Raises:
        OutputError: other ranks wait; a single process goes on without it.
    """
    fault = OutputError(target, "checkpoint not written", found=reason(error), remedy="free space there")
    if trainer.args.world_size > 1:
        raise fault from error
    logger.warning("kt_sft: %s; training goes on", fault)


def save_files(folder: Path, stock: Callable[[str], None]) -> None:
    """The trainer's `_save`, whose files then replace those of the same names.

    Raises:
        OSError, SafetensorError, RuntimeError: of the writing; nothing has been replaced then.
    """
    if folder.parent.name == STAGING:  # of a checkpoint that is renamed as a whole
        stock(str(folder))
        return
    with saved_into(folder, kept=(MODEL_CARD,)) as staged:
        stock(str(staged))


def clean(run_folder: Path, *, removes: bool) -> None:
    """Remove what a killed process left in the staging folder; a whole checkpoint that waited for its name gets it.

    Every rank calls it, so that all find the same checkpoints afterwards.

    Args:
        removes: delete the rest; one rank does.
    """
    staging = run_folder / STAGING
    _remove_link(staging)
    if removes:
        recover(run_folder)
        recover(run_folder.parent)
    with suppress(FileNotFoundError):  # another rank was faster
        for path in training_checkpoint.checkpoints(staging):
            target = run_folder / path.name
            is_named = target.exists() and training_checkpoint.find_fault(target) is None
            if not is_named and training_checkpoint.find_fault(path) is None:
                replace_folder(path, target)
    if removes and staging.is_dir():
        shutil.rmtree(staging, ignore_errors=True)


def _remove_link(staging: Path) -> None:
    """Nothing is written, and nothing removed, where a link in the place of the staging folder leads."""
    if staging.is_symlink():
        staging.unlink(missing_ok=True)


def _point_to_best(trainer: Any, run_folder: Path, target: Path) -> None:
    """The state names the best checkpoint where it will be, not in the staging folder."""
    best = trainer.state.best_global_step
    path = run_folder / f"checkpoint-{best}"
    if best and (path == target or path.exists()):
        trainer.state.best_model_checkpoint = str(path)
