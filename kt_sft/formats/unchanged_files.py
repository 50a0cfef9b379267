"""Whether files are still those whose headers were read."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from kt_sft.errors import FormatError

Mark = tuple[int, ...]


class UnchangedFiles:
    """Tells a file that was replaced or rewritten from the one that was opened.

    Args:
        files: as they are now, before anything of them is read; others are marked when they are first asked about.
    """

    def __init__(self, files: Iterable[Path] = ()):
        self._marks: dict[Path, Mark] = {file: mark(file) for file in files}

    def check(self, file: Path) -> None:
        """Call before every use of a file.

        Raises:
            FormatError: it is gone or no longer the one that was opened.
        """
        found = mark(file)
        if not found or self._marks.setdefault(file, found) != found:
            raise FormatError(
                file,
                "checkpoint of the experts",
                expected="as it was when the model was loaded",
                found="changed" if found else "missing",
                remedy="put the file back, or load the model again",
            )

    def all(self) -> bool:
        """Whether every file is as it was."""
        return all(mark(file) == held for file, held in self._marks.items())


def mark(file: str | os.PathLike[str]) -> Mark:
    """What changes with a file: its place, size and time; empty where it is missing."""
    try:
        now = os.stat(file)
        return (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns)
    except OSError:
        return ()


def marks(place: str | os.PathLike[str]) -> dict[str, Mark]:
    """Of a file, or of all files in a directory; none where nothing is there."""
    try:
        return {entry.name: mark(entry) for entry in os.scandir(place) if not entry.is_dir()}
    except NotADirectoryError:
        return {"": mark(place)}
    except (OSError, ValueError):
        return {}
