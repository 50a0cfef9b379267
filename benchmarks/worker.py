"""A process that works for a benchmark: requests and answers are lines of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from benchmarks.harness import ROOT


class Worker:
    """`python -m benchmarks.MODULE ARGUMENTS`; a context manager that ends it.

    Args:
        environment: instead of this process's.
    """

    def __init__(self, module: str, *arguments: object, environment: Mapping[str, str] | None = None):
        command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
        env = dict(os.environ if environment is None else environment)
        self._what, pipe = " ".join(command[1:]), subprocess.PIPE
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, **request: object) -> Any:
        """The answer to one request.

        Raises:
            RuntimeError: the process has died.
        """
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        """What it says next.

        Raises:
            RuntimeError: the process has died.
        """
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise RuntimeError(f"a worker died with status {status}; to see why: python {self._what}")
        return json.loads(line)

    def close(self) -> None:
        """Ends its input, and waits for its end."""
        self._process.stdin.close()
        self._process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
