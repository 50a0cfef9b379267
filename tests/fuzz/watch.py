"""Reads a damaged set of files under limits of time and memory, and says what came of it."""

from __future__ import annotations

import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kt_sft.errors import ConfigError, KTError
from tests.fuzz.case import Case, Subject, damaged

SECONDS = 2.0  # of the processor
CLOCK_SECONDS = 30.0  # of the clock: who waits takes none of the processor, and other processes take it, too
EXTRA_BYTES = 256 << 20  # beside the files' own
MESSAGE_CHARACTERS, LIST_CHARACTERS = 2100, 8100  # of an error, and of one that lists faults
RIGHT, REFUSED, FAILED = "right", "refused", "FAILED"
_TRIPWIRE = "tests.fuzz.tripwire"
_PAGE = resource.getpagesize()


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Args:
        detail: the error, or what is wrong.
        place: where, to tell one fault from another.
    """

    kind: str
    detail: str = ""
    place: str = ""
    seconds: float = 0.0


class Hang(BaseException):
    """The time is up."""


class Forbidden(BaseException):
    """Something that no reader does: a process, a connection."""


class _Formats(logging.Handler):
    """What is logged can be formatted and is one line."""

    def emit(self, record: logging.LogRecord) -> None:
        record.getMessage()


def prepare() -> None:
    """Settings of a process that reads damaged files: nothing is shown, and nothing leaves the machine."""
    warnings.simplefilter("ignore")
    root = logging.getLogger()
    root.handlers[:] = [_Formats()]
    for name in list(logging.root.manager.loggerDict):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    os.environ["TQDM_DISABLE"] = "1"
    for owner, name in ((os, "system"), (os, "posix_spawn"), (socket, "create_connection")):
        setattr(owner, name, _forbidden(name))
    subprocess.Popen = _OwnChild  # type: ignore[misc]


class _OwnChild(subprocess.Popen):
    """Python may be started, to try a regular expression with a time limit."""

    def __init__(self, args: Any, *rest: Any, **kwargs: Any):
        if isinstance(args, str) or args[0] != sys.executable:
            raise Forbidden("Popen")
        super().__init__(args, *rest, **kwargs)


def _forbidden(name: str):
    def refuse(*_: object, **__: object) -> None:
        raise Forbidden(name)

    return refuse


def attempt(case: Case, subject: Subject, folder: Path) -> Outcome:
    """Damage the folder, read it, and compare with what is there."""
    with damaged(case, subject, folder) as file_bytes:
        begin = time.process_time()
        kind, detail, place = RIGHT, "", ""
        try:
            with _limits(file_bytes):
                result = subject.read(folder)
        except KTError as error:
            kind, detail = REFUSED, str(error)
            limit = LIST_CHARACTERS if isinstance(error, ConfigError) else MESSAGE_CHARACTERS
            if "\n" in detail or len(detail) > limit or not detail.strip():
                what = "no line" if "\n" in detail or not detail.strip() else f"a line of {len(detail)} characters"
                kind, place, detail = FAILED, _place(error), f"{type(error).__name__} is {what}: {detail[:200]!r}"
        except (Exception, Hang, Forbidden, KeyboardInterrupt, SystemExit) as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            kind, detail, place = FAILED, f"{type(error).__name__}: {str(error)[:300]}", _place(error)
        seconds = time.process_time() - begin
        if kind == RIGHT:
            try:
                subject.check(folder, result)
            except Exception as error:
                kind, detail, place = FAILED, f"another result: {type(error).__name__}: {str(error)[:300]}", "check"
    if _TRIPWIRE in sys.modules:
        del sys.modules[_TRIPWIRE]
        kind, detail = FAILED, f"code that a file names was run ({kind}: {detail})"
    return Outcome(kind, detail, place, seconds)


@contextmanager
def _limits(file_bytes: int) -> Iterator[None]:
    """Within it, time of the processor and address space are bounded."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split(" ", 1)[0]) * _PAGE
    before = {number: signal.signal(number, _time_is_up) for number in (signal.SIGPROF, signal.SIGALRM)}
    resource.setrlimit(resource.RLIMIT_AS, (used + EXTRA_BYTES + file_bytes, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, CLOCK_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        for number, handler in before.items():
            signal.signal(number, handler)


def _time_is_up(number: int, _: object) -> None:
    is_clock = number == signal.SIGALRM
    raise Hang(f"more than {CLOCK_SECONDS if is_clock else SECONDS:g} s of the {'clock' if is_clock else 'processor'}")


def _place(error: BaseException) -> str:
    """The last lines of kt_sft and of all that the traceback goes through, with the kind of error."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if f"{os.sep}kt_sft{os.sep}" in frame.filename]
    found = [ours[-1]] if ours else []
    if frames and frames[-1] is not (found or [None])[0]:
        found.append(frames[-1])
    parts = [f"{Path(frame.filename).parent.name}/{Path(frame.filename).name}:{frame.lineno}" for frame in found]
    return f"{type(error).__name__} at {' < '.join(parts)}"
