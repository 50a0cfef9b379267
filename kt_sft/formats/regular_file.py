"""Files that others have made: regular ones only, so that no pipe and no device makes a reader wait."""

from __future__ import annotations

import os
import stat

from kt_sft.errors import FormatError


def open_regular(path: str | os.PathLike[str], what: str, *, kind: str = "a regular file", remedy: str = "") -> int:
    """A handle of a regular file (symbolic links are followed); devices and pipes are not even opened.

    Args:
        what: part of the messages, as `manifest`.
        kind: what is expected there.
    Raises:
        FormatError: missing, unreadable, or no regular file.
    """
    try:
        _check_kind(os.stat(path).st_mode, path, what, kind, remedy)
        # It may have become another one since: without the flag, opening a pipe waits for somebody who writes to it.
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise FormatError(path, what, expected=kind, found=error.strerror or error, remedy=remedy) from None
    except ValueError as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(path, what, expected=kind, found="a name with a NUL in it", remedy=remedy) from None
    try:
        _check_kind(os.fstat(handle).st_mode, path, what, kind, remedy)
    except FormatError:
        os.close(handle)
        raise
    return handle


def read_text(
    path: str | os.PathLike[str], what: str, most_bytes: int, *, kind: str = "a regular file", remedy: str = ""
) -> str:
    """A whole file of UTF-8.

    Args:
        what, kind: see `open_regular`.
    Raises:
        FormatError: not there, no regular file, too large, or no UTF-8.
    """
    handle = open_regular(path, what, kind=kind, remedy=remedy)
    with os.fdopen(handle, "rb") as stream:
        size = os.fstat(handle).st_size
        try:
            raw = stream.read(most_bytes + 1) if size <= most_bytes else b""
        except OSError as error:
            raise FormatError(path, what, expected=kind, found=error.strerror or error, remedy=remedy) from None
    if max(size, len(raw)) > most_bytes:  # files below /proc say nothing of their size
        found = size if size > most_bytes else "more"
        raise FormatError(path, what, expected=f"at most {most_bytes} bytes", found=found, remedy=remedy)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"{error.reason} at byte {error.start}"
        raise FormatError(path, what, expected="UTF-8", found=found, remedy=remedy) from None


def _check_kind(mode: int, path: str | os.PathLike[str], what: str, kind: str, remedy: str) -> None:
    if stat.S_ISREG(mode):
        return
    found = "a directory" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "another kind of file"
    raise FormatError(path, what, expected=kind, found=found, remedy=remedy)
