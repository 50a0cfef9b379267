"""The end of a process whose model still generates in a thread of its own, as LLaMA-Factory's chats do it.

Its threads are daemons. Python unwinds a daemon that asks for the GIL while the interpreter shuts down, and the first
C++ frame of torch on the way aborts the process. So the process waits for them; none makes more than the token that it
is at.
"""

from __future__ import annotations

import atexit
import functools
import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

_WAIT_SECONDS = 30.0
_ends = threading.Event()
_generating: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


class _AtTheEnd(StoppingCriteria):
    """True for every sequence once the process ends."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """`input_ids` `[batch, length]` -> bool `[batch]`."""
        return torch.full((input_ids.shape[0],), _ends.is_set(), dtype=torch.bool, device=input_ids.device)


def guard(model: nn.Module) -> None:
    """Have the end of the process wait for this model's `generate`."""
    stock = model.generate

    @functools.wraps(stock)
    def generate(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            _generating.add(threading.current_thread())  # for good: what it holds is given back as it ends
        kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or ()), _AtTheEnd()])
        return stock(*args, **kwargs)

    model.generate = generate
    atexit.unregister(_wait)
    atexit.register(_wait)


def _wait() -> None:
    _ends.set()
    for thread in list(_generating):
        if thread.daemon:
            thread.join(_WAIT_SECONDS)
