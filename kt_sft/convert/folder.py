"""The folder that a conversion writes to: one process at a time, and nothing left of a failure that has no use."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from kt_sft.convert.plan import LOCK_NAME
from kt_sft.errors import FormatError, OutputError, Unpackable
from kt_sft.formats.packed import JOURNAL_NAME, MANIFEST_NAME, read_manifest
from kt_sft.formats.staging import make_folder, remove_empty

_MAX_TRIES = 100


@contextlib.contextmanager
def output_folder(folder: Path, wait: bool) -> Iterator[None]:
    """The folder, made and locked; a failure that leaves nothing to go on with takes away what was made.

    Args:
        wait: for another process that has it; otherwise that is an error.
    Raises:
        OutputError: another process has it.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with contextlib.ExitStack() as stack:
        for attempt in range(_MAX_TRIES):
            try:
                make_folder(folder)
                stack.enter_context(locked(folder, wait))
                break
            except FileNotFoundError:  # a process that failed has taken it away
                if attempt == _MAX_TRIES - 1:
                    raise
            except BaseException:
                remove_empty(*missing)
                raise
        before = set(os.listdir(folder)) - {JOURNAL_NAME, LOCK_NAME}
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(OSError):
                _take_back(folder, before, is_useless=isinstance(error, Unpackable))
            remove_empty(*missing)
            raise


def _take_back(folder: Path, before: set[str], *, is_useless: bool) -> None:
    """Remove what a failed conversion has made, but layers that the next one goes on with, and their journal.

    Args:
        is_useless: the next one is of another source, so new layers are none of its.
    """
    names, held = set(os.listdir(folder)), files_of(folder) | {MANIFEST_NAME}
    goes_on = (before if is_useless else names) - held
    doomed = names - held - before
    if any(name.startswith("layer-") and name.endswith(".bin") for name in goes_on):
        doomed = {name for name in doomed if name.endswith(".part")}
    for name in doomed:
        (folder / name).unlink()


def files_of(folder: Path) -> set[str]:
    """Names of the layers' files of the container that is in a folder; all of them if its manifest cannot be read, as
    one of a later release.
    """
    if not os.path.lexists(folder / MANIFEST_NAME):
        return set()
    try:
        return {layer.file for layer in read_manifest(folder).layers.values()}
    except (OSError, FormatError):
        return {path.name for path in folder.glob("layer-*.bin")}


@contextlib.contextmanager
def locked(folder: Path, wait: bool) -> Iterator[None]:
    """One converting process per folder; the system lets go of the lock of one that dies.

    Raises:
        FileNotFoundError: the folder is no longer there.
        OutputError: another process has it.
    """
    # Without `fallback_to_soft` a file system without locks is an error: a soft lock would outlive who is killed.
    lock = FileLock(folder / LOCK_NAME, timeout=-1 if wait else 0, fallback_to_soft=False)
    try:
        held = lock.acquire()
    except Timeout:
        raise OutputError(
            folder, "output", found="another process converting to it", remedy="wait for it, or choose another"
        ) from None
    with held:
        yield
