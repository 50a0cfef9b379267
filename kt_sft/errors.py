"""Errors that a user can meet. Each message is one line: what, expected, found, remedy."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

GIB = 1 << 30
# A wrong, missing or swapped letter in a name of four is above it; other words with the same ending are below.
_NEAR = 0.72
_LEAST_BEGINNING = 4  # letters of a name that is only begun
# What a damaged or hostile file makes of a message stays readable: numbers of faults and names, and characters.
_MOST_FAULTS, _MOST_NAMES, _MOST_CHARACTERS, _MOST_OF_ALL, _MOST_NAME = 20, 40, 2000, 8000, 100
_MOST_KNOWN = 500  # names among which a near one is looked for, 30 us each


class KTError(Exception):
    """Base of every error that kt_sft raises for a reason outside its own code."""


class ConfigError(KTError, ValueError):
    """All faults of a configuration at once.

    Args:
        faults: one sentence per fault; `faults` keeps them apart for callers that print a list.
    """

    def __init__(self, faults: str | Iterable[str]):
        self.faults: tuple[str, ...] = tuple(map(_printable, (faults,) if isinstance(faults, str) else faults))
        if len(self.faults) == 1:
            message = self.faults[0]
        else:
            numbered = "; ".join(f"({i}) {fault}" for i, fault in enumerate(self.faults[:_MOST_FAULTS], 1))
            more = f"; and {len(self.faults) - _MOST_FAULTS} more" if len(self.faults) > _MOST_FAULTS else ""
            message = _printable(f"{len(self.faults)} faults in the configuration: {numbered}{more}", _MOST_OF_ALL)
        super().__init__(message)


class FormatError(KTError, ValueError):
    """A file or directory that is missing, damaged or not what the model needs.

    Args:
        path: the file, as the user knows it.
        what: the part of it that is wrong, with byte offset where there is one.
    """

    def __init__(self, path: object, what: str, *, expected: object = None, found: object = None, remedy: str = ""):
        self.path = str(path)
        self.found = found
        super().__init__(_sentence(f"{path}: {what}", expected, found, remedy))


class Unpackable(FormatError):
    """Weights that no packed form can hold: only another file helps."""


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


class NonFinite(ValueError):
    """A matrix of an expert with NaN or infinity in it.

    Args:
        projection: 0, 1, 2 for gate, up, down.
        found: the first such number and its place.
    """

    def __init__(self, projection: int, found: str):
        self.projection = projection
        self.found = found
        super().__init__(f"{('gate', 'up', 'down')[projection]}: expected finite numbers, found {found}")


class ExpertTensors(Protocol):
    """What an error says of a source of experts."""

    @property
    def path(self) -> object: ...

    def tensor_names(self, name: str, expert: int) -> tuple[str, str, str]: ...


@contextmanager
def as_ours(
    make: Callable[[BaseException], KTError | None],
    kinds: type[BaseException] | tuple[type[BaseException], ...] = Exception,
) -> Iterator[None]:
    """The one way in which an error that a library raises becomes one of ours; ours pass.

    Args:
        make: our error for theirs; None: theirs stays.
        kinds: of errors that are asked about.
    Raises:
        KTError: of `make`, with the library's as its cause.
    """
    try:
        yield
    except KTError:
        raise
    except kinds as error:
        if (ours := make(error)) is None:
            raise
        raise ours from error


def first_line(error: BaseException, most: int = 200) -> str:
    """What a library's error says, for a message of ours: its first line, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


def one_line(error: BaseException) -> str:
    """All that a library's error says, its lines one after the other; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def under_name(fault: str, names: Mapping[str, str]) -> str:
    """A fault of a setting, which begins with its name, under the name that it has where it was written.

    Args:
        names: setting -> name at a door; others keep theirs.
    """
    setting, colon, rest = fault.partition(":")
    return f"{names.get(setting, setting)}{colon}{rest}"


@contextmanager
def packing(source: ExpertTensors, module: str, expert: int, *, instead: str = "use method BF16") -> Iterator[None]:
    """Within it an expert is packed; why that cannot be becomes an error of its file.

    Args:
        instead: another remedy than a new download.
    Raises:
        Unpackable: for a ValueError.
    """
    with as_ours(lambda error: _unpackable(source, module, expert, error, instead), ValueError):
        yield


def _unpackable(source: ExpertTensors, module: str, expert: int, reason: BaseException, instead: str) -> Unpackable:
    if isinstance(reason, NonFinite):
        return Unpackable(
            source.path,
            f"tensor {source.tensor_names(module, expert)[reason.projection]} (expert {expert} of {module})",
            expected="finite numbers",
            found=reason.found,
            remedy="download the checkpoint again, or make it again: with these weights the model computes NaN",
        )
    return Unpackable(
        source.path,
        f"expert {expert} of {module}",
        expected="weights that can be packed",
        found=str(reason),
        remedy=f"download the checkpoint again, or {instead}",
    )


def nearest(name: object, known: Iterable[str]) -> str:
    """Hint for a misspelt name: `did you mean 'x'?`, or the known names when none is close."""
    known = list(known)
    close = near(name, known)
    more = ", ..." if len(known) > _MOST_NAMES else ""
    return f"did you mean {close!r}?" if close is not None else f"known: {', '.join(known[:_MOST_NAMES])}{more}"


def unknown_names(names: Iterable[object], hint: Callable[[object], str], what: str = "unknown key") -> list[str]:
    """A fault for each name, with a hint for as many as a message shows: looking for near ones takes milliseconds."""
    return [
        f"{name}: {what}" + (f"; {hint(name)}" if number < _MOST_FAULTS else "") for number, name in enumerate(names)
    ]


def near(name: object, known: Iterable[str]) -> str | None:
    """The known name that a misspelt one was meant to be, or the only one that begins with it; None when none is close.

    The prefix of our keys counts for nothing: it would make any two of them alike.
    """
    by_short = {each.lower().removeprefix("kt_"): each for each in known}
    short = str(name)[: _MOST_NAME + 1].lower().removeprefix("kt_")
    if len(short) > _MOST_NAME or len(by_short) > _MOST_KNOWN:
        return None
    close = difflib.get_close_matches(short, by_short, n=1, cutoff=_NEAR)
    if not close and len(short) >= _LEAST_BEGINNING:
        begun = [each for each in by_short if each.startswith(short)]
        close = begun if len(begun) == 1 else []
    return by_short[close[0]] if close else None


def _sentence(what: str, expected: object, found: object, remedy: str, *, extra: str = "") -> str:
    parts = [what]
    if extra:
        parts.append(extra)
    if expected is not None:
        parts.append(f"expected {expected}")
    if found is not None:
        parts.append(f"found {found}")
    head = f"{parts[0]}: " if len(parts) > 1 else parts[0]
    return _printable(head + ", ".join(parts[1:]) + _tail(remedy))


def _printable(text: str, most: int = _MOST_CHARACTERS) -> str:
    """Names come from files, which may be damaged: line breaks and control characters are shown as escapes."""
    if len(text) > most:
        half = most // 2
        text = f"{text[:half]} ... {text[-half:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _tail(remedy: str) -> str:
    return f"; {remedy}" if remedy else ""
