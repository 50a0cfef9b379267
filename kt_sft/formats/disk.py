"""The disk below a folder: room on it, having it keep what was written, and its faults in one line."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from kt_sft.errors import GIB, OutputError, as_ours, first_line

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def share(folder: Path) -> None:
    """Give files below a new folder the rights that the folder has by the umask: some libraries make theirs private."""
    rights = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for root, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(root, name)
            mode = os.lstat(path).st_mode
            if stat.S_ISREG(mode) and rights & ~mode:
                os.chmod(path, stat.S_IMODE(mode) | rights)


def flush(folder: Path) -> None:
    """Have the system write every file below a folder to the disk, and their names."""
    for root, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(root, name)
            if stat.S_ISREG(os.lstat(path).st_mode):
                descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        sync_folder(Path(root))


def sync_folder(folder: Path) -> None:
    """Have names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_file(stream: IO[bytes]) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def is_mounted(folder: Path) -> bool:
    """Whether a disk, or another folder, is mounted in a folder's place: nothing is renamed over it, into it or out."""
    if os.path.ismount(folder):
        return True
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", "rb") as stream:
        places = {line.split()[4].decode("unicode_escape").encode("latin-1") for line in stream}
        return os.fsencode(os.path.realpath(folder)) in places
    return False


def free_bytes(folder: Path) -> int:
    """What an ordinary user may still write on the disk of a folder, or of the nearest one above that is there; some
    network file systems do not say.
    """
    folder = Path(os.path.abspath(folder))
    system = os.statvfs(next(path for path in (folder, *folder.parents) if path.is_dir()))
    return system.f_bavail * system.f_frsize if system.f_blocks else 1 << 62


def check_space(target: Path, needed_bytes: int, remedy: str = "free space, or choose another disk") -> None:
    """Raise unless the disk of the target has room.

    Raises:
        OutputError: needed and free bytes.
    """
    if needed_bytes > (free := free_bytes(target)):
        needed, found = f"{needed_bytes / GIB:.2f} GiB", f"{free / GIB:.2f} GiB free"
        raise OutputError(target, "disk space", expected=needed, found=found, remedy=remedy)


@contextlib.contextmanager
def reporting(
    target: object, what: str = "writing", then: str = ", then again", *, libraries: bool = True
) -> Iterator[None]:
    """Faults of the file system, those of torch's and safetensors' writers too, as one line.

    Args:
        libraries: False where those libraries read, and write nothing.
        then: what to do once the cause is gone.
    Raises:
        OutputError: instead of them.
    """

    def ours(error: BaseException) -> OutputError | None:
        if not (is_write_error(error) if libraries else isinstance(error, OSError)):
            return None
        cure = "free space" if getattr(error, "errno", None) in _FULL else "correct that"
        path = getattr(error, "filename", None) or target
        return OutputError(path, what, found=reason(error), remedy=f"{cure}{then}")

    with as_ours(ours):
        yield


def is_write_error(error: BaseException) -> bool:
    """Whether an exception of saving is the file system's: torch and safetensors have types of their own for it."""
    words = ("PytorchStreamWriter", "inline_container")
    of_torch = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError" or of_torch


def reason(error: Any) -> str:
    """The file system's words, without the path; torch has none."""
    if isinstance(error, OutputError) and error.__cause__ is not None:
        return reason(error.__cause__)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, RuntimeError):
        return "torch could not write its file to the end"
    return first_line(error, 160)
