"""Errors that a user can meet. Each message is one line: what, expected, found, remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

GIB = 1 << 30


class KTError(Exception):
    """Base of every error that kt_sft raises for a reason outside its own code."""


class ConfigError(KTError, ValueError):
    """All faults of a configuration at once.

    Args:
        faults: one sentence per fault; `faults` keeps them apart for callers that print a list.
    """

    def __init__(self, faults: str | Iterable[str]):
        self.faults: tuple[str, ...] = (faults,) if isinstance(faults, str) else tuple(faults)
        if len(self.faults) == 1:
            message = self.faults[0]
        else:
            numbered = "; ".join(f"({i}) {fault}" for i, fault in enumerate(self.faults, 1))
            message = f"{len(self.faults)} faults in the configuration: {numbered}"
        super().__init__(message)


class FormatError(KTError, ValueError):
    """A file or directory that is missing, damaged or not what the model needs.

    Args:
        path: the file, as the user knows it.
        what: the part of it that is wrong, with byte offset where there is one.
    """

    def __init__(self, path: object, what: str, *, expected: object = None, found: object = None, remedy: str = ""):
        self.path = str(path)
        super().__init__(_sentence(f"{path}: {what}", expected, found, remedy))


class UnsupportedModel(KTError, ValueError):
    """A model whose routed experts these kernels cannot compute."""

    def __init__(self, what: str, *, expected: object = None, found: object = None, remedy: str = ""):
        super().__init__(_sentence(what, expected, found, remedy))


class UnsupportedHardware(KTError, RuntimeError):
    """A machine that lacks what was asked of it."""

    def __init__(self, what: str, *, needed: object, found: object, remedy: str = ""):
        super().__init__(_sentence(what, None, None, "", extra=f"needed {needed}, found {found}") + _tail(remedy))


class NotEnoughMemory(KTError, MemoryError):
    """The model does not fit; raised before anything is read."""

    def __init__(self, what: str, *, needed_bytes: int, available_bytes: int, limited_by: str, remedy: str = ""):
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes
        extra = (
            f"needed {needed_bytes / GIB:.2f} GiB, available {available_bytes / GIB:.2f} GiB (limited by {limited_by})"
        )
        super().__init__(_sentence(what, None, None, "", extra=extra) + _tail(remedy))


class InertAdapter(KTError, RuntimeError):
    """Training in which a part of the adapter has no effect."""


class OutputError(KTError, OSError):
    """Files that cannot be written: no space left, no permission, or something else in their place."""

    def __init__(self, path: object, what: str, *, expected: object = None, found: object = None, remedy: str = ""):
        self.path = str(path)
        super().__init__(_sentence(f"{path}: {what}", expected, found, remedy))


def unpackable(path: object, module: str, expert: int, reason: ValueError, *, instead: str) -> FormatError:
    """What the native layer said when it was given an expert, as an error of the file.

    Args:
        reason: what it raised.
        instead: another remedy than a new download.
    """
    return FormatError(
        path,
        f"expert {expert} of {module}",
        expected="weights that can be packed",
        found=str(reason),
        remedy=f"download the checkpoint again, or {instead}",
    )


def nearest(name: object, known: Iterable[str]) -> str:
    """Hint for a misspelt name: `did you mean 'x'?`, or the known names when none is close."""
    known = list(known)
    by_lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(str(name).lower(), by_lower, n=1, cutoff=0.5)
    if close:
        return f"did you mean {by_lower[close[0]]!r}?"
    return f"known: {', '.join(known)}"


def _sentence(what: str, expected: object, found: object, remedy: str, *, extra: str = "") -> str:
    parts = [what]
    if extra:
        parts.append(extra)
    if expected is not None:
        parts.append(f"expected {expected}")
    if found is not None:
        parts.append(f"found {found}")
    head = f"{parts[0]}: " if len(parts) > 1 else parts[0]
    return _one_line(head + ", ".join(parts[1:]) + _tail(remedy))


def _one_line(text: str) -> str:
    """Names come from files, which may be damaged: line breaks and control characters are shown as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _tail(remedy: str) -> str:
    return f"; {remedy}" if remedy else ""
