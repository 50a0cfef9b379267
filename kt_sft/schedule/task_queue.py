"""Tasks of the expert kernels, one after another in the order in which they were submitted.

One thread serves the process: the kernels have one pool of threads, which one pass takes as a whole.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

_executor: ThreadPoolExecutor | None = None
_lock = threading.Lock()  # of making it


class Result(Protocol):
    """What becomes of work."""

    def result(self) -> Any:
        """Waits for the work; what it returned, or an exception of it."""
        ...


class Finished:
    """The result of work that has ended; a future would cost a lock and a condition."""

    __slots__ = ("_error", "_value")

    def __init__(self, value: Any, error: BaseException | None):
        self._value = value
        self._error = error

    def result(self) -> Any:
        """See `Result`."""
        if self._error is None:
            return self._value
        try:
            raise self._error
        finally:
            self = None  # the error holds this frame: without an end of the circle, tensors of the work would stay


def submit(work: Callable[[], T]) -> Future[T]:
    """Have the worker thread run `work`; the future's `result()` waits for it and rethrows what it raised."""
    global _executor
    with _lock:
        if _executor is None:
            _executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kt-experts")
        return _executor.submit(work)


def run_now(work: Callable[[], Any]) -> Finished:
    """The same in the calling thread, which is free to run ahead of the queue."""
    try:
        return Finished(work(), None)
    except BaseException as error:
        return Finished(None, error)


def _forget() -> None:
    global _executor, _lock
    _executor, _lock = None, threading.Lock()  # which another thread may have held


os.register_at_fork(after_in_child=_forget)  # threads do not survive a fork
