"""Copies of a call's inputs, in memory that is used again: the caller may overwrite its own once submit returns."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Key:
    """Size and kind of staging memory; `dtype` of an output, None of inputs."""

    tokens: int
    hidden: int
    top_k: int = 0
    dtype: torch.dtype | None = None
    is_pinned: bool = False


class Inputs:
    """Hidden states bf16 `[tokens, hidden]`, ids int64 and weights f32 `[tokens, k]`, on the CPU."""

    def __init__(self, key: Key):
        self.key = key
        kind = {"device": "cpu", "pin_memory": key.is_pinned}
        self.x = torch.empty(key.tokens, key.hidden, dtype=torch.bfloat16, **kind)
        self.topk_ids = torch.empty(key.tokens, key.top_k, dtype=torch.int64, **kind)
        self.topk_weights = torch.empty(key.tokens, key.top_k, dtype=torch.float32, **kind)

    def fill(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> None:
        """Copy; on the current stream, and without waiting for it, where the tensors are on a GPU.

        Args:
            x: `[..., hidden]`, of any strides.
        """
        self.x.view(x.shape).copy_(x, non_blocking=True)
        self.topk_ids.copy_(topk_ids, non_blocking=True)
        self.topk_weights.copy_(topk_weights, non_blocking=True)


class Output:
    """What the kernels write for a GPU: `out` `[tokens, hidden]`, and the event after which it may be written again."""

    def __init__(self, key: Key):
        self.key = key
        self.out = torch.empty(key.tokens, key.hidden, dtype=key.dtype, device="cpu", pin_memory=key.is_pinned)
        self.is_read: Any = None


class Staging:
    """Free staging memory: of chosen numbers of tokens it is kept, of others only that of the last call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: dict[Key, list[Any]] = {}
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

    def take(self, make: Callable[[Key], Any], key: Key) -> Any:
        """`Inputs` or `Output` of a key, to be given back by `release`."""
        with self._lock:
            self._last_size = key.tokens
            self._drop_others()
            if free := self._free.get(key):
                return free.pop()
        with torch.inference_mode(False):  # memory made inside that mode could not be written outside of it
            return make(key)

    def release(self, memory: Inputs | Output) -> None:
        """Give memory back that nothing reads or writes any more."""
        with self._lock:
            if self._is_kept(memory.key):
                self._free.setdefault(memory.key, []).append(memory)

    def clear(self) -> None:
        """Drop the memory that is free; what is in use comes back."""
        with self._lock:
            self._free.clear()

    @property
    def free_count(self) -> int:
        """Pieces of memory that wait for their next use."""
        return sum(map(len, self._free.values()))

    def _is_kept(self, key: Key) -> bool:
        return key.tokens == self._last_size or key.tokens in self.batch_sizes

    def _drop_others(self) -> None:
        for key in [key for key in self._free if not self._is_kept(key)]:
            del self._free[key]
