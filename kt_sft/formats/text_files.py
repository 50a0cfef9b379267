"""Small text files that a user or a download brings: configurations in JSON and YAML.

Their size is bounded before they are read, and nothing but a regular file is opened: a fifo would wait for ever.
"""

from __future__ import annotations

import json
import os
import stat
from typing import Any

from kt_sft.errors import FormatError

# The largest that are known have some 200 KB (lists of modules that are not quantised).
MOST_JSON_BYTES = 16 << 20
MOST_JSON_DEPTH = 32
_AGAIN = "download or write it again"


def read_text(
    path: str | os.PathLike[str], what: str, most_bytes: int, *, kind: str = "a file", remedy: str = _AGAIN
) -> str:
    """A whole file of UTF-8.

    Args:
        what: names it in messages.
        kind: what is expected there.
    Raises:
        FormatError: not there, no regular file, too large, or no UTF-8.
    """

    def fault(expected: str, found: object) -> FormatError:
        return FormatError(path, what, expected=expected, found=found, remedy=remedy)

    if "\0" in os.fspath(path):
        raise fault(kind, "a name with a NUL in it")
    try:
        # Without the flag opening a fifo blocks until somebody writes to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as stream:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise fault(kind, _kind(found.st_mode))
            if found.st_size > most_bytes:
                raise fault(f"at most {most_bytes} bytes", found.st_size)
            raw = stream.read(most_bytes + 1)
    except OSError as error:
        raise fault(kind, error.strerror or error) from None
    if len(raw) > most_bytes:  # it grew, or says nothing of its size, as those below /proc
        raise fault(f"at most {most_bytes} bytes", "more")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise fault("UTF-8", f"{error.reason} at byte {error.start}") from None


def read_json(path: str | os.PathLike[str], what: str, *, remedy: str = _AGAIN) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        FormatError: no such file, or something else in it: a key twice, NaN, lists inside lists without end.
    """
    text = read_text(path, what, MOST_JSON_BYTES, remedy=remedy)
    try:
        values = json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_constant)
        if not isinstance(values, dict):
            raise ValueError(f"a JSON {type(values).__name__}")
        if is_deeper(values, MOST_JSON_DEPTH):
            raise ValueError(f"more than {MOST_JSON_DEPTH} levels")
    except (ValueError, RecursionError) as error:
        found = str(error) if isinstance(error, ValueError) else "levels without end"
        raise FormatError(path, what, expected="a JSON object", found=found, remedy=remedy) from None
    return values


def is_deeper(value: Any, most: int) -> bool:
    """Whether mappings and lists lie in one another more than so many levels deep."""
    level = [value]
    for _ in range(most):
        level = [inner for outer in level for inner in _inner(outer)]
        if not level:
            return False
    return True


def _inner(value: Any) -> list[Any]:
    if isinstance(value, dict | list):
        return list(value.values() if isinstance(value, dict) else value)
    return []


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names: set[str] = set()
        twice = next(name for name, _ in pairs if name in names or names.add(name))
        raise ValueError(f"one in which {twice[:80]} is there twice")
    return values


def _constant(name: str) -> float:
    """`Infinity` is the upper limit of ranges in some models' configurations; a NaN is no value of anything."""
    if name == "NaN":
        raise ValueError("NaN")
    return float(name)


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a directory"
    return "a pipe" if stat.S_ISFIFO(mode) else "another kind of file"
