"""The way of a call's tensors to the kernels and back: none, copies on the CPU, or a stream of a device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from kt_sft.errors import UnsupportedHardware
from kt_sft.storage import check_storage
from kt_sft.transfer.staging import ONE_USE, Key, Memory, Piece

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# What a module of torch (`torch.cuda`) has to have for its devices to be reached in the order of a stream.
_NEEDED = ("stream", "current_stream", "Event", "is_current_stream_capturing")


class Route(Protocol):
    """One call's way: `bring` each input, ask for each `output`, then `arrival`; later `deliver` the outputs.

    `is_beside`: the kernels have to wait for the inputs, so they run beside the caller, who does not.
    """

    is_beside: bool

    def bring(self, tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
        """Begin to copy a tensor `[..., n]`: what it becomes on the host, `[rows, n]` of `dtype`, contiguous.

        Raises:
            ValueError: names the tensor: neither integers nor floating point numbers become the other kind.
        """
        ...

    def output(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Where the kernels are to write, on the host: shaped as another tensor, of `dtype`."""
        ...

    def arrival(self) -> Callable[[], None] | None:
        """What waits until the inputs are there and the outputs may be written; None: so it is."""
        ...

    def release(self) -> None:
        """The kernels have ended: nothing reads the inputs any more."""
        ...

    def deliver(self, out: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A filled output, or a view of one, where the caller has its tensors."""
        ...


class InPlace:
    """Tensors that the kernels read where they are. Of another type or elsewhere they are copied, and waited for.

    For work that ends before its caller goes on: nobody overwrites the tensors meanwhile.
    """

    is_beside = False

    def bring(self, tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
        """See `Route`; the very tensor where nothing has to change."""
        check_storage(tensor, name)
        if (
            tensor.dtype is dtype
            and tensor.is_cpu
            and not tensor.requires_grad
            and tensor.dim() == 2
            and tensor.is_contiguous()
        ):
            return tensor  # each step below costs a microsecond even where it does nothing
        check_kind(tensor, dtype, name)
        return as_rows(tensor.detach().to("cpu", dtype)).contiguous()

    def output(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Route`; the tensor is the caller's."""
        return torch.empty(like.shape, dtype=dtype, device="cpu")

    def arrival(self) -> None:
        """See `Route`."""

    def release(self) -> None:
        """See `Route`."""

    def deliver(self, out: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """See `Route`."""
        return out if out.dtype is dtype and device.type == "cpu" else out.to(device, dtype)


IN_PLACE = InPlace()


class HostCopies(InPlace):
    """Copies of tensors on the CPU: the caller may overwrite its own once they are made.

    Args:
        memory: of the copies.
    """

    def __init__(self, memory: Memory = ONE_USE):
        self._memory = memory
        self._pieces: list[Piece] = []

    def bring(self, tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
        """See `Route`."""
        check_kind(tensor, dtype, name)
        check_storage(tensor, name)
        piece = self._memory.take(Key(rows_shape(tensor), dtype))
        self._pieces.append(piece)
        piece.tensor.view(tensor.shape).copy_(tensor.detach())
        return piece.tensor

    def release(self) -> None:
        """See `Route`."""
        pieces, self._pieces = self._pieces, []
        for piece in pieces:
            self._memory.release(piece)


class StreamRoute:
    """Tensors of a device with streams. Copies, by pinned memory, are ordered in one; only the kernels' thread waits.

    Args:
        device: of the tensors.
        stream: in whose order; None: torch's current one, of each moment.
        memory: of the pinned copies.
        module: what torch has for the device's type, `torch.cuda`; None: looked up.
        is_pinned: False for memory of the CPU that takes the place of a device's.
    Raises:
        UnsupportedHardware: the stream is being captured into a graph, whose replay would not reach the CPU.
    """

    is_beside = True

    def __init__(
        self,
        device: torch.device,
        *,
        stream: Any = None,
        memory: Memory = ONE_USE,
        module: Any = None,
        is_pinned: bool = True,
    ):
        self._device = device
        self._given = stream
        self._memory = memory
        self._module = torch.get_device_module(device) if module is None else module
        self._is_pinned = is_pinned
        self._inputs: list[Piece] = []
        self._outputs: list[Piece] = []
        with self._module.stream(self._stream()):
            if self._module.is_current_stream_capturing():
                raise UnsupportedHardware(
                    "routed experts inside a CUDA graph",
                    needed="a call between graphs",
                    found="a stream that is being captured",
                    remedy="capture the parts of the model between its expert layers",
                )

    def bring(self, tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
        """See `Route`. It gets its type on the device: narrower ones cross faster, and a copy that converts blocks."""
        if tensor.device != self._device:  # of another stream: waited for, and copied, as the caller may overwrite it
            return HostCopies().bring(tensor, dtype, name)
        check_kind(tensor, dtype, name)
        with self._module.stream(self._stream()):
            rows = as_rows(tensor.detach().to(dtype))
            piece = self._memory.take(Key(tuple(rows.shape), dtype, is_pinned=self._is_pinned))
            piece.tensor.copy_(rows, non_blocking=True)
        self._inputs.append(piece)
        return piece.tensor

    def output(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Route`; `arrival` waits until an earlier call's copy out of it is done."""
        piece = self._memory.take(Key(tuple(like.shape), dtype, is_pinned=self._is_pinned, is_output=True))
        self._outputs.append(piece)
        return piece.tensor

    def arrival(self) -> Callable[[], None]:
        """See `Route`."""
        events = [self._recorded(), *(piece.is_read for piece in self._outputs if piece.is_read is not None)]

        def wait() -> None:
            for event in events:
                event.synchronize()

        return wait

    def release(self) -> None:
        """See `Route`."""
        pieces, self._inputs = self._inputs, []
        for piece in pieces:
            self._memory.release(piece)

    def deliver(self, out: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """See `Route`; the copy is under way when this returns."""
        piece = next((piece for piece in self._outputs if piece.tensor.data_ptr() == out.data_ptr()), None)
        if piece is None or device != self._device:
            return out.to(device, dtype)
        with self._module.stream(self._stream()):
            result = torch.empty_like(out, device=device).copy_(out, non_blocking=True)
            piece.is_read = self._recorded()
            result = result.to(dtype)
        self._outputs.remove(piece)
        self._memory.release(piece)
        return result

    def _stream(self) -> Any:
        return self._module.current_stream(self._device) if self._given is None else self._given

    def _recorded(self) -> Any:
        """An event after all that is in the stream by now."""
        event = self._module.Event()
        event.record(self._stream())
        return event


def check_kind(tensor: Tensor, dtype: torch.dtype, name: str) -> None:
    """Raise where a change of type would cut numbers to whole ones, or make others of them.

    Raises:
        ValueError: names the tensor.
    """
    if not (tensor.is_floating_point() if dtype.is_floating_point else tensor.dtype in INTEGERS):
        kind = "floating point numbers" if dtype.is_floating_point else "integers"
        raise ValueError(f"{name}: expected {kind}, got {tensor.dtype}")


def rows_shape(tensor: Tensor) -> tuple[int, int]:
    """`[rows, n]` of a tensor `[..., n]`."""
    return math.prod(tensor.shape[:-1]), tensor.shape[-1]


def as_rows(tensor: Tensor) -> Tensor:
    """The tensor as `[rows, n]`: a view, where its strides allow one."""
    return tensor if tensor.dim() == 2 else tensor.reshape(rows_shape(tensor))


def route_of(x: Tensor) -> Route:
    """The way for the device of x, in the order of torch's current stream; devices without streams are waited for."""
    if x.is_cpu:
        return IN_PLACE
    module = getattr(torch, x.device.type, None)
    return StreamRoute(x.device) if all(hasattr(module, name) for name in _NEEDED) else IN_PLACE


def copying_route_of(x: Tensor, memory: Memory = ONE_USE, stream_handle: int | None = None) -> Route:
    """The same for a caller that may overwrite its tensors at once.

    Args:
        stream_handle: of the caller's CUDA stream; 0 is the default one, None torch's current one. Without meaning on
            the CPU.
    """
    if not x.is_cuda:
        return HostCopies(memory) if x.is_cpu else route_of(x)
    if stream_handle is None:
        return StreamRoute(x.device, memory=memory)
    if stream_handle == 0:
        stream = torch.cuda.default_stream(x.device)
    else:
        stream = torch.cuda.ExternalStream(stream_handle, device=x.device)
    return StreamRoute(x.device, stream=stream, memory=memory)


def fetch(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """On the CPU, there when this returns, without gradients: the very memory where nothing has to change.

    Raises:
        ValueError: names the tensor, whose memory is gone.
    """
    if tensor.is_cpu:
        check_storage(tensor, name)
        return tensor.detach().to(dtype)
    route = route_of(tensor)
    host = route.bring(tensor if tensor.dim() else tensor[None], dtype, name)
    if (wait := route.arrival()) is not None:
        wait()
    return host.view(tensor.shape)
