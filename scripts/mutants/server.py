"""Runs tests in forks of a process that has the heavy libraries imported: these take longer than most tests.

One line of JSON asks for a run, one answers it. `kt_sft` itself is not imported here, so that each fork reads its files
as they are then, with the fault of the moment.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from typing import IO, Any

_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"  # `import torch` would import kt_sft


def main() -> None:
    os.environ[_AUTOLOAD] = "0"
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    del os.environ[_AUTOLOAD]
    assert not any(name.partition(".")[0] == "kt_sft" for name in sys.modules)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        answers.write(json.dumps(run(**json.loads(line))) + "\n")
        answers.flush()


def run(words: list[str], timeout_s: float) -> dict[str, Any]:
    """Exit status, None after a time-out, and output of pytest."""
    with tempfile.TemporaryFile() as log:
        child = os.fork()
        if child == 0:
            _test(words, log)
        status = _wait(child, timeout_s)
        log.seek(0)
        return {"status": status, "output": log.read().decode("utf-8", "replace")}


def _test(words: list[str], log: IO[bytes]) -> None:
    """In the fork: never returns."""
    status = 70
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        import pytest

        status = int(pytest.main(words))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _wait(child: int, timeout_s: float) -> int | None:
    """Exit status of a fork, below zero that of a signal; what it has started ends with it."""
    until, ended, status = time.monotonic() + timeout_s, 0, 0
    while ended == 0 and time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if ended == 0:
        os.waitpid(child, 0)
        return None
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    main()
