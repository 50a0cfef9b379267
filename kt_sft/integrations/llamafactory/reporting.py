"""What a run of LLaMA-Factory shows of ours: one line for an error, and one for each warning, once a machine."""

from __future__ import annotations

import errno
import io
import logging
import signal
import sys
import time
from typing import Any

from kt_sft import env
from kt_sft.errors import KTError
from kt_sft.integrations.llamafactory import interrupts

_PREFIX = "kt_sft"
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_MOMENT_SECONDS = 10.0  # torchrun ends the other ranks within a tenth of a second after one has ended


class _Lines(logging.Handler):
    """Warnings as lines that say where they come from; silent where the program has handlers of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        if logging.getLogger().handlers or (env.local_rank() > 0 and record.levelno < logging.ERROR):
            return
        message = self.format(record)
        sys.stderr.write(f"{message if message.startswith(_PREFIX) else f'{_PREFIX}: {message}'}\n")
        sys.stderr.flush()


def show_lines() -> None:
    """Show our warnings, once in a process; without it Python would write them without a name, by every rank."""
    ours = logging.getLogger(_PREFIX)
    if not any(isinstance(handler, _Lines) for handler in ours.handlers):
        ours.addHandler(_Lines(logging.WARNING))


def report_errors_in_one_line() -> None:
    """Show our own errors as one line and leave with status 2; KT_SFT_TRACEBACK=1 shows the traceback instead."""
    previous = sys.excepthook

    def leave(message: str, status: int) -> None:
        # In a rank torch's own hook collects what this one writes, to print it afterwards; there is no afterwards.
        stream = sys.__stderr__ if isinstance(sys.stderr, io.StringIO) else sys.stderr
        if message:
            stream.write(f"{_PREFIX}: {message}\n")
            stream.flush()
        raise SystemExit(status)

    def excepthook(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
        is_first = env.local_rank() == 0
        if isinstance(error, KeyboardInterrupt) and not env.traceback():
            leave("stopped" if is_first else "", 128 + signal.SIGINT)
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS and not env.traceback():
            leave(f"error: {error.filename or 'writing'}: {error.strerror}; free space there", 2)
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, KTError):
            cause = cause.__cause__
        if cause is None or env.traceback():
            previous(kind, error, traceback)
            return
        if isinstance(cause, interrupts.Interrupted):
            leave(str(cause) if is_first else "", cause.status)
        if not is_first:
            time.sleep(_MOMENT_SECONDS)  # a fault that the first rank has as well ends this process meanwhile
        leave(f"error: {cause}", 2)

    sys.excepthook = excepthook
