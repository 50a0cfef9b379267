"""Host memory of a call's tensors: used again between calls, or made for one."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Key:
    """What a piece of memory is; the first of its sides is the number of tokens."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    is_pinned: bool = False
    is_output: bool = False  # of the kernels: an input has been read when they end, an output is read after that


class Piece:
    """Memory of a key, and the event after which an output may be written again."""

    def __init__(self, key: Key):
        self.key = key
        self.tensor = torch.empty(key.shape, dtype=key.dtype, device="cpu", pin_memory=key.is_pinned)
        self.is_read: Any = None


class Memory(Protocol):
    """Where the pieces come from."""

    def take(self, key: Key) -> Piece:
        """A piece of a key, to be given back by `release`."""
        ...

    def release(self, piece: Piece) -> None:
        """Give memory back that nothing reads or writes any more."""
        ...


class OneUse:
    """Memory that lives as long as its tensor: autograd may keep it. torch's allocator has pinned blocks wait for the
    copies out of them before it gives them out again.
    """

    def take(self, key: Key) -> Piece:
        """See `Memory`."""
        return Piece(key)

    def release(self, piece: Piece) -> None:
        """See `Memory`; nothing to do."""


ONE_USE = OneUse()


class Staging:
    """Free staging memory: of chosen numbers of tokens it is kept, of others only that of the last call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: dict[Key, list[Piece]] = {}
        self._last_size = 0
        self.batch_sizes: tuple[int, ...] = ()

    def keep(self, batch_sizes: Iterable[int]) -> None:
        """Choose the numbers of tokens whose memory is kept.

        Raises:
            ValueError: not whole numbers above zero.
        """
        sizes = tuple(batch_sizes)
        wrong = [size for size in sizes if type(size) is not int or size < 1]
        if wrong:
            raise ValueError(f"batch sizes: expected whole numbers >= 1, found {wrong[0]!r}")
        with self._lock:
            self.batch_sizes = sizes
            self._drop_others()

    def take(self, key: Key) -> Piece:
        """See `Memory`."""
        with self._lock:
            self._last_size = key.shape[0]
            self._drop_others()
            if free := self._free.get(key):
                return free.pop()
        with torch.inference_mode(False):  # memory made inside that mode could not be written outside of it
            return Piece(key)

    def release(self, piece: Piece) -> None:
        """See `Memory`."""
        with self._lock:
            if self._is_kept(piece.key):
                self._free.setdefault(piece.key, []).append(piece)

    def clear(self) -> None:
        """Drop the memory that is free; what is in use comes back."""
        with self._lock:
            self._free.clear()

    @property
    def free_count(self) -> int:
        """Pieces of memory that wait for their next use."""
        return sum(map(len, self._free.values()))

    def _is_kept(self, key: Key) -> bool:
        return key.shape[0] == self._last_size or key.shape[0] in self.batch_sizes

    def _drop_others(self) -> None:
        for key in [key for key in self._free if not self._is_kept(key)]:
            del self._free[key]
