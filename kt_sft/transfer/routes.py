"""The way of a call's tensors to the kernels and back: on the CPU by copies, from a GPU in the order of a stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from kt_sft.errors import UnsupportedHardware
from kt_sft.transfer.staging import Inputs, Key, Output, Staging


class Route(Protocol):
    """One call's way."""

    is_pinned: bool

    def bring(self, inputs: Inputs, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Callable[[], None]:
        """Begin to copy the tensors; gives what waits until they are there."""
        ...

    def output(self, tokens: int, hidden: int, dtype: torch.dtype) -> Tensor:
        """Where the kernels are to write."""
        ...

    def deliver(self, out: Tensor) -> Tensor:
        """The filled output, where the caller has its tensors."""
        ...


class HostRoute:
    """Tensors on the CPU."""

    is_pinned = False

    def bring(self, inputs: Inputs, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Callable[[], None]:
        """See `Route`; the copies are there at once."""
        inputs.fill(x, topk_ids, topk_weights)
        return lambda: None

    def output(self, tokens: int, hidden: int, dtype: torch.dtype) -> Tensor:
        """See `Route`; the tensor is the caller's."""
        return torch.empty((tokens, hidden), dtype=dtype, device="cpu")

    def deliver(self, out: Tensor) -> Tensor:
        """See `Route`."""
        return out


class StreamRoute:
    """Tensors on a GPU. Both copies are ordered in the caller's stream; only the kernels' thread waits for the first.

    Args:
        device: of the tensors.
        stream: the caller's.
        cuda: `torch.cuda`.
    Raises:
        UnsupportedHardware: the stream is being captured into a graph, whose replay would not reach the CPU.
    """

    is_pinned = True

    def __init__(self, staging: Staging, device: torch.device, stream: Any, cuda: Any):
        self._staging = staging
        self._device = device
        self._stream = stream
        self._cuda = cuda
        self._output: Output | None = None
        with cuda.stream(stream):
            if cuda.is_current_stream_capturing():
                raise UnsupportedHardware(
                    "KTMoEWrapper inside a CUDA graph",
                    needed="a call between graphs",
                    found="a stream that is being captured",
                    remedy="capture the parts of the model between its expert layers",
                )

    def bring(self, inputs: Inputs, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Callable[[], None]:
        """See `Route`."""
        with self._cuda.stream(self._stream):
            inputs.fill(x, topk_ids, topk_weights)
            is_there = self._cuda.Event()
            is_there.record(self._stream)
        is_read = self._output.is_read if self._output is not None else None

        def wait() -> None:
            is_there.synchronize()
            if is_read is not None:
                is_read.synchronize()

        return wait

    def output(self, tokens: int, hidden: int, dtype: torch.dtype) -> Tensor:
        """See `Route`; asked for before `bring`, which waits until an earlier call's copy out of it is done."""
        self._output = self._staging.take(Output, Key(tokens, hidden, dtype=dtype, is_pinned=True))
        return self._output.out

    def deliver(self, out: Tensor) -> Tensor:
        """See `Route`; the copy is under way when this returns."""
        with self._cuda.stream(self._stream):
            result = out.to(self._device, non_blocking=True)
            self._output.is_read = self._cuda.Event()
            self._output.is_read.record(self._stream)
        self._staging.release(self._output)
        return result


def route_of(x: Tensor, stream_handle: int, staging: Staging) -> Route:
    """The way for the device of x.

    Args:
        stream_handle: of the caller's CUDA stream; 0 is the default one. Without meaning on the CPU.
    """
    if not x.is_cuda:
        return HostRoute()
    if stream_handle == 0:
        stream = torch.cuda.default_stream(x.device)
    else:
        stream = torch.cuda.ExternalStream(stream_handle, device=x.device)
    return StreamRoute(staging, x.device, stream, torch.cuda)
