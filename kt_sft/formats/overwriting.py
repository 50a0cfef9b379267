"""Files of a folder that may hold older ones and other things, replaced together: an adapter, a model.

As few renames as can be: a file that has not changed stays. Two files that belong together, weights and their config,
change in one step: the folder is exchanged for one with links to everything else that is in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import filecmp
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from kt_sft.errors import OutputError
from kt_sft.formats import disk, staging
from kt_sft.formats.renaming import exchange

MODEL_CARD = "README.md"  # PEFT adds to one that is there
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
# What a reader can take in either version: it says nothing of the weights.
_ALONE = (MODEL_CARD, "training_args.bin", "tokenizer", "special_tokens", "added_tokens", "vocab.", "merges.")
_COMPARED_BYTES = 256 << 20  # reading more costs more than writing saves
_LINKED_FILES = 20_000


@contextlib.contextmanager
def saved_into(folder: str | os.PathLike[str], *, kept: tuple[str, ...] = (), needed_bytes: int = 0) -> Iterator[Path]:
    """An empty folder whose files, when all has gone well, replace those of the same names in `folder`.

    Weights of an earlier model whose names are not written again are dropped with a new `config.json`.

    Args:
        kept: files that the writer adds to: it finds copies of them.
        needed_bytes: how much will be written, as far as it is known.
    Raises:
        OutputError: no room, or `folder` cannot be written.
    """
    folder = Path(os.path.realpath(folder))
    if is_staged(folder):  # of a thing that is renamed as a whole
        folder.mkdir(exist_ok=True)
        yield folder
        return
    with disk.reporting(folder):
        if os.path.lexists(folder) and not folder.is_dir():
            raise OutputError(folder, "output", expected="a directory", found="a file", remedy="choose another")
        disk.check_space(folder, needed_bytes)
        with staging.made_folder(folder), _holder(folder) as place:
            fresh = place / folder.name
            fresh.mkdir()
            for name in kept:
                if (folder / name).is_file() and not (folder / name).is_symlink():
                    shutil.copyfile(folder / name, fresh / name)
            yield fresh
            disk.share(fresh)
            disk.flush(fresh)
            with _one_at_a_time(folder):
                _commit(fresh, folder)


@contextlib.contextmanager
def _holder(folder: Path) -> Iterator[Path]:
    """Beside the folder; in it if a disk is mounted there, or nothing can be written beside it."""
    staging.recover(folder)
    with contextlib.ExitStack() as stack:
        if disk.is_mounted(folder):
            place = stack.enter_context(staging.holder(folder, folder))
        else:
            try:
                place = stack.enter_context(staging.holder(folder))
            except OSError:
                place = stack.enter_context(staging.holder(folder, folder))
        yield place


def is_staged(folder: Path) -> bool:
    """Whether a folder lies in one of staging."""
    return any(staging.HOLDER.fullmatch(part) for part in folder.parts)


def _commit(fresh: Path, folder: Path) -> None:
    """Put flushed files into their places."""
    together: list[Path] = []
    dropped = _dropped(fresh, folder)
    for path in sorted(fresh.iterdir()):
        target = folder / path.name
        if path.is_dir():
            _put_subfolder(path, target)
        elif _is_same(path, target):
            path.unlink()
        elif path.name.startswith(_ALONE):
            os.replace(path, target)
        else:
            together.append(path)
    is_held = any(staging.is_entry(path) for path in folder.iterdir())
    if is_held and len(together) + len(dropped) > 1 and _exchanged(together, dropped, folder):
        return
    if is_held and len(together) + len(dropped) > 1:
        # Half of it must not be read. Who dies from here on is finished by the next one.
        committed = fresh.parent / staging.COMMITTED
        os.rename(fresh, committed)
        disk.sync_folder(fresh.parent)
        together = [committed / path.name for path in together]
        for path in filter(staging.is_entry, together):
            (folder / path.name).unlink(missing_ok=True)
    for path in sorted(together, key=staging.is_entry):
        os.replace(path, folder / path.name)
    for name in dropped:
        (folder / name).unlink(missing_ok=True)
    disk.sync_folder(folder)


def _dropped(fresh: Path, folder: Path) -> list[str]:
    """Weights of an earlier model: beside new ones they would be read in their place."""
    names = {path.name for path in fresh.iterdir()}
    if "config.json" not in names or not any(map(_WEIGHTS.fullmatch, names)):
        return []
    return sorted(name for name in os.listdir(folder) if _WEIGHTS.fullmatch(name) and name not in names)


def _put_subfolder(path: Path, target: Path) -> None:
    """One adapter of several, whose files change together, too."""
    if not os.path.lexists(target):
        os.rename(path, target)
    elif target.is_symlink() or not target.is_dir():
        found = "a symbolic link" if target.is_symlink() else "a file"
        raise OutputError(target, "output", expected="a directory", found=found, remedy="remove it")
    else:
        with _holder(target) as place:
            os.rename(path, place / target.name)
            with _one_at_a_time(target):
                _commit(place / target.name, target)


def _is_same(path: Path, target: Path) -> bool:
    if target.is_symlink() or not target.is_file():
        return False
    size = path.stat().st_size
    return size == target.stat().st_size and size <= _COMPARED_BYTES and filecmp.cmp(path, target, shallow=False)


def _exchanged(together: list[Path], dropped: list[str], folder: Path) -> bool:
    """Exchange the folder for one in which the files are new and all others are links; False: that cannot be here.

    It cannot where a process would lose its place: its working directory in the folder, another one's staging in it;
    nor on a mounted disk, without the right to write beside it, without links, or of too many files.
    """
    is_staged_in = any(map(staging.HOLDER.fullmatch, os.listdir(folder)))
    if is_staged_in or disk.is_mounted(folder) or _holds_working_directory(folder) or _is_large(folder):
        return False
    left_out = {path.name for path in together} | set(dropped)
    with contextlib.ExitStack() as stack:
        try:
            linked = stack.enter_context(staging.holder(folder)) / folder.name
            _link(folder, linked, left_out)
            for path in together:
                os.link(path, linked / path.name)
            disk.flush(linked)
            if not exchange(linked, folder):
                return False
        except OSError:
            return False
        disk.sync_folder(folder.parent)
        _bring_along(linked, folder, left_out)
    return True


def _is_large(folder: Path) -> bool:
    count = 0
    for _, folders, names in os.walk(folder):
        count += len(folders) + len(names)
        if count > _LINKED_FILES:
            return True
    return False


def _holds_working_directory(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        here = Path.cwd()
        return any(os.path.samefile(path, folder) for path in (here, *here.parents))
    return False


def _link(folder: Path, linked: Path, left_out: set[str]) -> None:
    """A tree of the same files.

    Raises:
        shutil.Error, OSError: a file that cannot be linked, or a folder of another user.
    """

    def ignored(path: str, names: list[str]) -> set[str]:
        return left_out if path == str(folder) else set()

    found = folder.stat()
    if found.st_uid != os.geteuid():
        raise PermissionError
    shutil.copytree(folder, linked, symlinks=True, ignore=ignored, copy_function=_hard_link)
    if linked.stat().st_gid != found.st_gid:
        os.chown(linked, -1, found.st_gid)
        os.chmod(linked, stat.S_IMODE(found.st_mode))


def _hard_link(source: str, target: str, *, follow_symlinks: bool = True) -> None:
    os.link(source, target, follow_symlinks=False)


def _bring_along(old: Path, new: Path, left_out: set[str]) -> None:
    """What another process has put into the old folder since its files were linked."""
    for path in old.iterdir():
        if path.name in left_out:
            continue
        target = new / path.name
        if not os.path.lexists(target):
            os.rename(path, target)
        elif path.is_dir() and not path.is_symlink() and target.is_dir() and not target.is_symlink():
            _bring_along(path, target, set())
        elif not os.path.samestat(path.lstat(), target.lstat()) and not path.is_symlink():
            os.replace(path, target)


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Two that save into one folder do so one after the other, as far as its file system has locks."""
    while True:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            break
        os.close(descriptor)  # of the folder that the other one has exchanged
    try:
        yield
    finally:
        os.close(descriptor)
