"""Turns between threads that share one model: who waits longest comes next."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """A lock that is handed over in order of arrival.

    A lock of `threading` would let the holder take it again at once, and the others starve.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held = False
        self._waiting: deque[threading.Lock] = deque()  # each is released to wake its owner, who then holds the turn

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Within it, this thread computes and no other does."""
        self._acquire()
        try:
            yield
        finally:
            self._release()

    def rotate(self) -> None:
        """Let everybody who waits now have a turn; for the holder."""
        if self._waiting:  # a thread that arrives in between comes at the next rotation
            self._release()
            self._acquire()

    def _acquire(self) -> None:
        with self._lock:
            if not self._held:
                self._held = True
                return
            signal = threading.Lock()
            signal.acquire()
            self._waiting.append(signal)
        signal.acquire()

    def _release(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._held = False
