"""What a loss of power would show: names whose data or folders had not been flushed when they were given."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kt_sft.formats import renaming

_Stamp = tuple[int, int]


class Recorder:
    """The order of flushes and renames of this process.

    Attributes:
        faults: renames of files that were written after their last flush, or not flushed at all.
        renames: the targets, in order.
    """

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.renames: list[Path] = []
        self._flushed: dict[tuple[int, int], _Stamp] = {}
        self._open: dict[str, str] = {}  # folder in which a name has changed since its flush -> the name

    def flush(self, descriptor: int) -> None:
        found = os.fstat(descriptor)
        if stat.S_ISDIR(found.st_mode):
            self._open.pop(os.path.realpath(f"/proc/self/fd/{descriptor}"), None)
        self._flushed[found.st_dev, found.st_ino] = (found.st_mtime_ns, found.st_size)

    def rename(self, source: Path, target: Path) -> None:
        """Look at everything below `source` before it gets its name."""
        if any(part.startswith(".kt_sft-") for part in target.parts):
            return  # into staging: nobody looks for it there
        self.renames.append(target)
        paths = [source, *source.rglob("*")] if source.is_dir() and not source.is_symlink() else [source]
        for path in paths:
            found = path.lstat()
            stamp = self._flushed.get((found.st_dev, found.st_ino))
            if stamp != (found.st_mtime_ns, found.st_size):
                self.faults.append(f"{path} got its name {target} before it was flushed")
        self._open[os.path.realpath(target.parent)] = target.name

    def unflushed(self) -> list[str]:
        """Folders in which names have changed and that were not flushed afterwards."""
        return [f"{folder}: {name}" for folder, name in self._open.items() if os.path.isdir(folder)]


@contextlib.contextmanager
def recorded() -> Iterator[Recorder]:
    """Within it, every flush and rename of this process is recorded."""
    recorder = Recorder()
    real = {name: getattr(os, name) for name in ("fsync", "replace", "rename")}
    real_rename = renaming._rename

    def fsync(descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        real["fsync"](number)
        recorder.flush(number)

    def hooked(name: str):
        def call(source: Any, target: Any, **kwargs: Any) -> None:
            recorder.rename(Path(source), Path(target))
            real[name](source, target, **kwargs)

        return call

    def rename2(source: Path, target: Path, flags: int) -> bool:
        recorder.rename(source, target)
        return real_rename(source, target, flags)

    os.fsync, os.replace, os.rename, renaming._rename = fsync, hooked("replace"), hooked("rename"), rename2
    try:
        yield recorder
    finally:
        for name, function in real.items():
            setattr(os, name, function)
        renaming._rename = real_rename
