"""A simulated device: the CPU's memory behind a stream whose copies to the host happen as late as they may.

It is what `transfer.StreamRoute` asks of torch's module for a device, and the memory of the route's copies. A copy
into that memory leaves NaN (of integers their lowest) there until somebody waits for an event after it: whoever reads
too early computes with it. Copies out of it happen at once, as work that is queued behind them could not tell.
Everything is written down in order.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kt_sft.transfer.routes import StreamRoute
from kt_sft.transfer.staging import Key, Piece


class LateCopies(TorchDispatchMode):
    """The device; copies are late within `with device:`. `log` has what happened on it."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []
        self._lock = threading.Lock()
        self._pieces: dict[int, Piece] = {}
        self._copies: list[Callable[[], None]] = []
        self._done = 0

    def route(self, stream: str | None = None) -> StreamRoute:
        """A route over this device, in the order of a stream."""
        return StreamRoute(torch.device("cpu"), stream=stream, memory=self, module=self, is_pinned=False)

    # --- as torch.cuda
    def is_current_stream_capturing(self) -> bool:
        return False

    def current_stream(self, device: torch.device) -> str:
        return "current"

    @contextlib.contextmanager
    def stream(self, name: str) -> Iterator[None]:
        self.log.append(f"enter {name}")
        yield
        self.log.append(f"leave {name}")

    def Event(self) -> Event:
        return Event(self)

    # --- as Memory
    def take(self, key: Key) -> Piece:
        piece = Piece(key)
        self._pieces[piece.tensor.data_ptr()] = piece
        return piece

    def release(self, piece: Piece) -> None:
        self._pieces.pop(piece.tensor.data_ptr(), None)

    # --- copies
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_copy = func is torch.ops.aten.copy_.default and len(args) > 2 and args[2]
        if is_copy and args[0].numel() and args[0].data_ptr() in self._pieces:
            into, source = args[0], args[1].clone()
            into.fill_(torch.nan if into.is_floating_point() else torch.iinfo(into.dtype).min)
            self.log.append("in")
            self._copies.append(lambda: into.data.copy_(source))  # of a device it counts as a write when it is queued
            return into
        if is_copy:
            self.log.append("out")
        return func(*args, **(kwargs or {}))

    def position(self) -> int:
        """In the stream: so many copies are queued before."""
        return len(self._copies)

    def catch_up(self, position: int) -> None:
        """Do what is queued up to a position; in any thread."""
        with self._lock:
            for copy in self._copies[self._done : position]:
                copy()
            self._done = max(self._done, position)
        self.log.append("wait")


class Event:
    """A place in the device's stream."""

    def __init__(self, device: LateCopies):
        self._device = device
        self._position = 0

    def record(self, stream: str) -> None:
        self._position = self._device.position()
        self._device.log.append(f"record on {stream}")

    def synchronize(self) -> None:
        self._device.catch_up(self._position)


class Beside:
    """A native layer whose passes wait until other work is done: `forward` and `backward` gates that a test opens."""

    def __init__(self, layer, log: list[str]):
        self._layer = layer
        self._log = log
        self.gates = {name: threading.Event() for name in ("forward", "backward")}

    def __getattr__(self, name: str):
        return getattr(self._layer, name)

    def forward(self, *args, **kwargs) -> None:
        self._pass("forward", *args, **kwargs)

    def backward(self, *args, **kwargs) -> None:
        self._pass("backward", *args, **kwargs)

    def _pass(self, name: str, *args: Tensor, **kwargs) -> None:
        if not self.gates[name].wait(20):
            raise TimeoutError(f"{name}: nothing was computed beside the kernels")
        getattr(self._layer, name)(*args, **kwargs)
        self._log.append(f"kernels {name}")
