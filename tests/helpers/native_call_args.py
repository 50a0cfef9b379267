"""Arguments of random calls of the bindings: what is right, in every form that a tensor can have, and what is wrong."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

HUGE = (2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64, 2**70)
SMALL = (-(2**63), -(2**31), -2, -1, 0)
_GUARD = 64  # bytes before and behind what a call may write


def plain(value: object) -> object:
    """The values of a tensor or an array in memory of their own; anything else, and what has none, as it is."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.array(value, order="C"))
    if not isinstance(value, Tensor):
        return value
    try:
        if value.numel() and not value.untyped_storage().nbytes():
            return value  # torch itself would read from there
        return value.detach().resolve_neg().clone(memory_format=torch.contiguous_format)
    except (RuntimeError, MemoryError):
        return value


class Random(random.Random):
    """A source of arguments; none of a call is odd while `is_calm`."""

    is_calm = False

    def chance(self, p: float) -> bool:
        return self.random() < p

    def floats(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Mostly plain numbers; sometimes with NaN, infinity, huge and denormal ones."""
        values = torch.randn(shape)
        if not self.is_calm and self.chance(0.04) and values.numel():
            odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, 1e-40, -0.0])
            values.view(-1)[torch.randint(values.numel(), (3,))] = odd[torch.randint(len(odd), (3,))]
        return values.to(dtype)

    def bytes_of(self, *shape: int) -> Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8)

    def number(self, *right: int) -> int:
        """One of the right numbers, or one that no size or index can be."""
        return self.choice(right) if self.is_calm or self.chance(0.9) else self.choice((*HUGE, *SMALL))


# --- tensors that are read ---


def _in_wider_rows(rng: Random, t: Tensor) -> Tensor:
    wide = torch.zeros((*t.shape[:-1], t.shape[-1] + rng.choice((1, 3, 16))), dtype=t.dtype)
    wide[..., : t.shape[-1]] = t
    return wide[..., : t.shape[-1]]


def _transposed(rng: Random, t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def _expanded(rng: Random, t: Tensor) -> Tensor:
    return t[:1].expand(t.shape)


def _overlapping(rng: Random, t: Tensor) -> Tensor:
    strides = [1] * t.dim()
    return torch.as_strided(t.contiguous().view(-1).repeat(2), t.shape, strides)


def _negated(rng: Random, t: Tensor) -> Tensor:
    return torch._neg_view(-t)


def _imaginary(rng: Random, t: Tensor) -> Tensor:
    if t.dtype is not torch.float32:
        return _negated(rng, t)
    return torch.complex(torch.zeros_like(t), -t).conj().imag


def _unaligned(rng: Random, t: Tensor) -> Tensor:
    moved = torch.frombuffer(bytearray(t.nbytes + 1), dtype=t.dtype, offset=1, count=t.numel()).view(t.shape)
    return moved.copy_(t)


def _with_gradient(rng: Random, t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_(t.is_floating_point())


def _view_with_gradient(rng: Random, t: Tensor) -> Tensor:
    return _with_gradient(rng, t).view(t.shape)


def _inference(rng: Random, t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


def _array(rng: Random, t: Tensor) -> object:
    return t.detach().numpy() if t.dtype is not torch.bfloat16 else t


def _flipped_array(rng: Random, t: Tensor) -> object:
    return t.detach().numpy()[::-1] if t.dtype is not torch.bfloat16 else t


# --- what no argument may be; some of it is right by chance ---


def _other_dtype(rng: Random, t: Tensor) -> Tensor:
    kinds = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8)
    return t.to(rng.choice((*kinds, torch.bool, torch.complex64, torch.float8_e4m3fn)))


def _same_bits(rng: Random, t: Tensor) -> Tensor:
    return t.contiguous().view(torch.float16 if t.element_size() == 2 else torch.uint8)


def _cut(rng: Random, t: Tensor) -> Tensor:
    return t.narrow(rng.randrange(t.dim()), 0, 0) if rng.chance(0.3) else t[..., :-1]


def _longer(rng: Random, t: Tensor) -> Tensor:
    return torch.cat([t, t], dim=rng.randrange(t.dim()))


def _other_dims(rng: Random, t: Tensor) -> Tensor:
    return rng.choice((t.reshape(-1), t[None], t[None, None, None, None, None], t.sum()))


def _endless(rng: Random, t: Tensor) -> Tensor:
    return rng.choice((t.new_empty(1).expand(2**31, 2**31), t.new_empty(2**62, 0), t.new_empty(1).expand(2**50)))


def _gone(rng: Random, t: Tensor) -> Tensor:
    gone = t.clone()
    gone.untyped_storage().resize_(0)
    return gone


def _fake(rng: Random, t: Tensor) -> Tensor:
    with FakeTensorMode() as mode:
        return mode.from_tensor(t)


def _without_memory(rng: Random, t: Tensor) -> object:
    kinds: tuple[Callable[[], object], ...] = (
        lambda: t.to("meta"),
        lambda: t.float().to_sparse(),
        lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]),
        lambda: torch.quantize_per_tensor(torch.ones(t.shape), 1.0, 0, torch.quint8),
    )
    return rng.choice(kinds)()


def _no_tensor(rng: Random, t: Tensor) -> object:
    return rng.choice((None, 0, 3.5, "x", (), [1.0, 2.0], object(), b"bytes", float("nan"), t.shape, type(t)))


_SAME = (
    _in_wider_rows, _transposed, _expanded, _overlapping, _negated, _imaginary, _unaligned, _with_gradient,
    _view_with_gradient, _inference, _array, _flipped_array,
)  # fmt: skip
_OTHER = (
    _other_dtype, _same_bits, _cut, _longer, _other_dims, _endless, _gone, _fake, _without_memory, _no_tensor,
)  # fmt: skip


def read(rng: Random, t: Tensor) -> object:
    """A tensor for a call to read: as it is, in another form, or another one."""
    if rng.is_calm or not rng.chance(0.15):
        return t
    change = rng.choice(_SAME if rng.chance(0.6) else _OTHER)
    t = t.detach()
    return change(rng, t) if t.dim() and (t.numel() or change in (_no_tensor, _other_dtype)) else t


# --- tensors that are written ---


@dataclass
class Written:
    """A tensor for a call to fill, and the bytes around it."""

    tensor: object
    canvas: Tensor | None = None
    before: Tensor | None = field(default=None, repr=False)

    def is_intact(self) -> bool:
        """Whether nothing but the tensor was written."""
        if self.canvas is None:
            return True
        mask = torch.zeros_like(self.canvas)
        t = self.tensor.detach()
        over_mask = torch.empty(0, dtype=t.dtype).set_(mask.untyped_storage(), t.storage_offset(), t.shape, t.stride())
        over_mask.view(torch.int16 if t.element_size() == 2 else torch.int32).fill_(-1)
        return torch.equal(self.canvas[mask == 0], self.before[mask == 0])


def write(rng: Random, shape: tuple[int, ...], dtype: torch.dtype, rows_may_be_wide: bool = False) -> Written:
    """Memory to be filled, most often the right one."""
    item = torch.empty(0, dtype=dtype).element_size()
    strides = list(torch.empty(shape, device="meta").stride())
    if not rng.is_calm and rng.chance(0.15) and len(shape) > 1:
        strides = _strides(rng, shape, strides, rows_may_be_wide)
    count = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides)) if 0 not in shape else 0
    canvas = torch.randint(0, 256, (2 * _GUARD + max(count, 1) * item,), dtype=torch.uint8)
    offset = _GUARD // item
    tensor = torch.empty(0, dtype=dtype).set_(canvas.untyped_storage(), offset, shape, strides)
    if rng.is_calm:
        return Written(tensor, canvas, canvas.clone())
    if rng.chance(0.05):
        return Written(rng.choice(_OTHER)(rng, torch.zeros(shape, dtype=dtype) if shape else torch.zeros(1)))
    if rng.chance(0.03) and 0 not in shape:
        return Written(
            rng.choice((_negated, _unaligned, _with_gradient, _expanded))(rng, torch.zeros(shape, dtype=dtype))
        )
    return Written(tensor, canvas, canvas.clone())


def _strides(rng: Random, shape: tuple[int, ...], strides: list[int], rows_may_be_wide: bool) -> list[int]:
    if rows_may_be_wide and rng.chance(0.7):
        return [stride + 5 if i == len(shape) - 2 else stride for i, stride in enumerate(strides)]
    return rng.choice(([0] * len(shape), [1] * len(shape), strides[::-1], [2 * stride for stride in strides]))
