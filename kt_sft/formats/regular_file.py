"""Opening what others have made: regular files only, so that no pipe and no device makes a reader wait."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from kt_sft.errors import FormatError


def open_regular(path: Path, what: str, *, remedy: str = "") -> int:
    """A handle of a regular file (symbolic links are followed); devices and pipes are not even opened.

    Args:
        what: part of the messages, as `manifest`.
    Raises:
        FormatError: missing, unreadable, or no regular file.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise FormatError(path, what, expected="a regular file", found="something else", remedy=remedy)
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise FormatError(path, what, expected="a readable file", found=reason, remedy=remedy) from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise FormatError(path, what, expected="a regular file", found="something else", remedy=remedy)
    return handle
