"""The only way to write: beside the target on the same disk, flushed, renamed, the folder flushed.

Under a name there is the old thing or the new one at any moment, for readers and after a power cut. Staging happens in
a hidden folder `.kt_sft-<16 hex>` that only its writer can enter and whose lock the system drops when the writer dies:
the next one in the same place removes what the dead have left, and nothing else. docs/files.md says what a reader sees.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from kt_sft.errors import OutputError
from kt_sft.formats.disk import check_space, flush, flush_file, is_mounted, reporting, share, sync_folder
from kt_sft.formats.file_names import ENTRIES
from kt_sft.formats.renaming import exchange, rename_new

HOLDER = re.compile(r"\.kt_sft-[0-9a-f]{16}")
COMMITTED = ".kt_sft-committed"  # in a holder: flushed files that were about to be renamed one by one
_LOCK = ".kt_sft-lock"
_REPLACED = ".kt_sft-replaced"
_MAX_TRIES = 100


@contextlib.contextmanager
def new_file(target: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file that becomes the target, in place of an older one, when all has gone well.

    A symbolic link in the target's place is replaced; what it points to is left alone.

    Raises:
        OutputError: it cannot be written.
    """
    target = Path(os.path.abspath(target))
    with reporting(target), made_folder(target.parent), holder(target) as place:
        staged = place / target.name
        with open_new(staged) as stream:
            yield stream
            flush_file(stream)
        os.replace(staged, target)
        sync_folder(target.parent)


def write_text(target: str | os.PathLike[str], text: str) -> None:
    """Write a small file; see `new_file`."""
    with new_file(target) as stream:
        stream.write(text.encode())


@contextlib.contextmanager
def new_path(target: Path, *, is_file: bool, replaces: bool = False, needed_bytes: int = 0) -> Iterator[Path]:
    """A place for a file, or an empty folder, which becomes the target when all has gone well.

    Args:
        replaces: an older folder of that name; otherwise something there, an empty folder apart, is an error.
        needed_bytes: how much will be written, as far as it is known.
    Raises:
        OutputError: the target is there, there is no room, or the folder cannot be written.
    """
    target = Path(os.path.abspath(target))
    with reporting(target):
        check_free(target, is_file=is_file, replaces=replaces)
        check_space(target, needed_bytes)
        with made_folder(target.parent), holder(target) as place:
            staged = place / target.name
            if not is_file:
                staged.mkdir()
            yield staged
            if is_file:
                with staged.open("rb") as stream:
                    os.fsync(stream.fileno())
                _rename_new(staged, target)
            else:
                share(staged)
                flush(staged)
                _put_folder(staged, target, place / _REPLACED, replaces=replaces)
            sync_folder(target.parent)


def replace_folder(staged: Path, target: Path) -> None:
    """Give a flushed folder a name on the same disk that may be taken; what was there is gone afterwards.

    Raises:
        OutputError: a file or a symbolic link has the name.
    """
    check_free(target, is_file=False, replaces=True)
    _put_folder(staged, target, staged.parent / f"replaced-{target.name}", replaces=True)
    sync_folder(target.parent)
    sync_folder(staged.parent)


def check_free(target: Path, *, is_file: bool, replaces: bool = False) -> None:
    """Raise unless the target can become a new file or folder.

    Raises:
        OutputError: something is there.
    """
    if not os.path.lexists(target):
        return
    if not is_file and target.is_dir() and not target.is_symlink():
        recover(target)
        if replaces or not os.listdir(target):
            return
    found = "a symbolic link" if target.is_symlink() else "something there"
    raise OutputError(target, "output", expected="a new path", found=found, remedy="choose another")


def _put_folder(staged: Path, target: Path, replaced: Path, *, replaces: bool) -> None:
    """Rename to the target. Readers find the old one until the new one is there.

    Where the file system cannot exchange two names, the name is free for an instant; who dies in it is finished by
    `recover`, or the next one who writes there.
    """
    if not os.path.lexists(target):
        return _rename_new(staged, target)
    if target.is_symlink() or not target.is_dir():
        raise _taken(target)
    os.chmod(staged, stat.S_IMODE(target.stat().st_mode))
    if not replaces or not os.listdir(target):
        if is_mounted(target):
            return _fill(staged, target)
        return os.rename(staged, target)  # fails where files came into it meanwhile
    if exchange(staged, target):
        shutil.rmtree(staged, ignore_errors=True)
        return None
    shutil.rmtree(replaced, ignore_errors=True)
    os.rename(target, replaced)
    os.rename(staged, target)
    shutil.rmtree(replaced, ignore_errors=True)
    return None


def _rename_new(staged: Path, target: Path) -> None:
    try:
        rename_new(staged, target)
    except FileExistsError:
        raise _taken(target) from None


def _taken(target: Path) -> OutputError:
    found = "something that came there meanwhile"
    return OutputError(target, "output", expected="a new path", found=found, remedy="choose another")


def _fill(staged: Path, target: Path) -> None:
    """A disk that is mounted there cannot be renamed over; config.json last, by which readers know a model."""
    for path in sorted(staged.iterdir(), key=lambda path: path.name.endswith("config.json")):
        with contextlib.suppress(OSError):
            os.rename(path, target / path.name)
            continue
        if path.is_dir():
            shutil.copytree(path, target / path.name)
            flush(target / path.name)
        else:
            with path.open("rb") as source, new_file(target / path.name) as stream:
                shutil.copyfileobj(source, stream)
    sync_folder(target)


@contextlib.contextmanager
def holder(target: Path, parent: Path | None = None) -> Iterator[Path]:
    """A private, locked folder beside the target, or in `parent`; nothing of it stays.

    Raises:
        OSError: it cannot be made.
    """
    parent = target.parent if parent is None else parent
    recover(parent)
    place, lock = _locked_holder(target, parent)
    try:
        yield place
    finally:
        _remove(place)
        os.close(lock)


def _locked_holder(target: Path, parent: Path) -> tuple[Path, int]:
    for _ in range(_MAX_TRIES):
        place = parent / f".kt_sft-{secrets.token_hex(8)}"
        lock = None
        try:
            place.mkdir(0o700)
            lock = os.open(place / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            if _lock(lock) is False:
                raise FileNotFoundError  # another process took it for left behind, and removes it
            os.write(lock, json.dumps({"target": target.name, "is_inside": parent == target}).encode())
            if os.path.samestat(os.fstat(lock), os.lstat(place / _LOCK)):
                return place, lock
        except (FileExistsError, FileNotFoundError):
            if lock is not None:
                os.close(lock)
            if not parent.is_dir():
                raise
        except BaseException:
            if lock is not None:
                os.close(lock)
            _remove(place)
            raise
    raise OSError(errno.EAGAIN, "no folder for staging can be made", str(parent))


def _lock(descriptor: int, *, wait: bool = False) -> bool | None:
    """True: it is ours now; False: another one's; None: the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def recover(parent: Path) -> None:
    """Remove what killed writers have left in a folder; renames that they had begun are finished first.

    Only folders of our name that belong to this user and whose lock is free; where the file system has no locks,
    nothing is removed.
    """
    with contextlib.suppress(OSError):
        for name in sorted(filter(HOLDER.fullmatch, os.listdir(parent))):
            with contextlib.suppress(OSError, ValueError):
                _recover(parent / name)


def _recover(place: Path) -> None:
    found = place.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        return
    if not os.listdir(place):
        return place.rmdir()
    lock = os.open(place / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)  # the first in it and the last
    try:
        if _lock(lock) is not True or not os.path.samestat(os.fstat(lock), os.lstat(place / _LOCK)):
            return
        with contextlib.suppress(ValueError):
            values = json.loads(os.read(lock, 1 << 16) or b"{}")
            name = values.get("target") if isinstance(values, dict) else None
            if isinstance(name, str) and name == os.path.basename(name) and name not in ("", ".", ".."):
                _finish(place, place.parent if values.get("is_inside") is True else place.parent / name)
        _remove(place)
    finally:
        os.close(lock)


def _finish(place: Path, target: Path) -> None:
    """The renames that a killed writer had begun; all was flushed before the first of them."""
    committed = place / COMMITTED
    if committed.is_dir() and target.is_dir() and not target.is_symlink():
        for path in sorted(committed.iterdir(), key=is_entry):
            os.replace(path, target / path.name)
        sync_folder(target)
    elif (place / _REPLACED).is_dir() and not os.path.lexists(target):
        os.rename(place / (target.name if (place / target.name).is_dir() else _REPLACED), target)
        sync_folder(target.parent)


def _remove(place: Path) -> None:
    """A staging folder, its lock last: until then it is recognised as one."""
    with contextlib.suppress(OSError):
        for path in place.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != _LOCK:
                path.unlink(missing_ok=True)
        (place / _LOCK).unlink(missing_ok=True)
        place.rmdir()


def is_entry(path: Path) -> bool:
    """Whether a file is the one by which readers know that an adapter or a model is there."""
    return path.name in ENTRIES


def open_new(path: str | os.PathLike[str]) -> IO[bytes]:
    """A file that was not there: nothing is followed and nothing written over.

    Raises:
        FileExistsError: something is there.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o666), "wb")


def put_json(path: Path, values: Any) -> None:
    """A small file in a folder of staging, which is flushed with all the others there."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def put_copy(source: Path, folder: Path) -> None:
    """A copy of a file in a folder of staging, which is flushed with all the others there."""
    shutil.copyfile(source, folder / source.name)


@contextlib.contextmanager
def part_of(target: Path) -> Iterator[IO[bytes]]:
    """As `new_file`, for who holds the only right to write to the folder: a `.part` that was left is written anew."""
    part = target.with_name(f"{target.name}.part")
    part.unlink(missing_ok=True)
    with open_new(part) as stream:
        yield stream
        flush_file(stream)
    os.replace(part, target)
    sync_folder(target.parent)


def read_own(path: Path) -> bytes:
    """A small file of ours; what is no ordinary file is not read.

    Raises:
        OSError: missing, a symbolic link, a pipe or the like.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not an ordinary file", str(path))
        return stream.read()


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """The folder, made with those above it; after a failure those that were made and are empty are gone again."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        make_folder(folder)
        yield
    except BaseException:
        remove_empty(*missing)
        raise


def make_folder(folder: Path) -> None:
    """`mkdir -p`, of which a power cut takes nothing back."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        sync_folder(path.parent)


def remove_empty(*folders: Path) -> None:
    """Remove folders, the inner ones first, as far as nothing is in them."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()
