"""An `nn.Linear` that is frozen and computed by our kernels from one packed copy of its weight."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from kt_sft.autograd.linear import packed_linear
from kt_sft.native import native
from kt_sft.storage import check_storage
from kt_sft.transfer.routes import fetch

logger = logging.getLogger(__name__)

# Properties of a tensor that give its values.
_VALUES = frozenset(getattr(torch.Tensor, name) for name in ("data", "T", "mT", "H", "mH", "real", "imag"))
_METADATA = frozenset(
    getattr(torch.Tensor, name)
    for name in (
        *("__hash__", "__len__", "dim", "ndimension", "size", "stride", "numel", "nelement", "element_size"),
        *("is_floating_point", "is_complex", "is_contiguous", "get_device", "storage_offset"),
    )
) | {torch.is_floating_point, torch.is_complex, torch.numel}


class PackedLinear(nn.Linear):
    """A frozen linear layer on the CPU. `pack_linear` makes one out of an `nn.Linear`, in place.

    `weight` is no parameter but a `PackedWeight`: a placeholder of one element with stride zero, which shows shape,
    dtype and device, as PEFT asks for them. Whatever needs its values (merging an adapter, resizing a vocabulary,
    moving to another device or dtype) turns the layer back into an ordinary `nn.Linear` with the stored weight, by
    itself or through `restore`.
    """

    layer: object  # kt_sft._native.PackedLinear
    format: str
    activations: str

    def __init__(self, *args, **kwargs):
        raise TypeError("PackedLinear: expected pack_linear(linear), which makes one of a layer with weights")

    def rows(self) -> str:
        """Activations of a forward pass that starts now, by the rule of `RoutedExperts.rows`."""
        if self.format == "bf16":
            return "bf16"
        if self.activations != "auto":
            return self.activations
        if self.training or torch.is_grad_enabled():
            return "bf16"
        return native().default_rows(self.format)

    @torch.compiler.disable
    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features]` -> `[..., out_features]` in input's dtype, under autocast in autocast's."""
        device = input.device.type
        if torch.is_autocast_enabled(device) and input.is_floating_point():
            check_storage(input, "x")
            input = input.to(torch.get_autocast_dtype(device))
        bias = self.bias
        if bias is None or not (bias.requires_grad and torch.is_grad_enabled()):
            operand = None if bias is None else fetch(bias, torch.float32, "bias").contiguous()
            return packed_linear(input, self.layer, operand, rows=self.rows())
        return packed_linear(input, self.layer, rows=self.rows()) + bias.to(input.dtype)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weight."""
        return self.layer.packed_bytes

    def stored_weight(self) -> Tensor:
        """A bf16 copy of the weight as it is stored: what was packed (bf16), or that rounded to integers (int8)."""
        weight = torch.empty((self.out_features, self.in_features), dtype=torch.bfloat16, device="cpu")
        self.layer.unpack(weight)
        return weight

    def restore(self) -> nn.Linear:
        """Become an ordinary frozen `nn.Linear` again, in place; the packed copy is released."""
        weight = self.__dict__.pop("weight")
        bias = self._parameters.pop("bias")
        weight.become(self.stored_weight())
        self.__class__ = nn.Linear
        self._parameters.update(weight=weight, bias=bias)  # in nn.Linear's order
        for name in ("layer", "format", "activations", "_saves_weight"):
            self.__dict__.pop(name, None)
        return self

    def _apply(self, fn, recurse=True):
        """A move to another device or dtype is one of an ordinary layer; others leave the packed weight alone."""
        probe = fn(torch.empty(0, dtype=torch.bfloat16, device="cpu"))
        if probe.device.type != "cpu" or probe.dtype != torch.bfloat16:
            self.restore()
        return nn.Linear._apply(self, fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """Without the weight, which would be unpacked at every save of an adapter; see `saving_packed_weights`."""
        if self.__dict__.get("_saves_weight"):
            destination[f"{prefix}weight"] = self.stored_weight()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """A weight in the state dict is packed; without one the weight stays."""
        name = f"{prefix}weight"
        if name in state_dict:
            shape, found = list(self.weight.shape), list(state_dict[name].shape)
            if found == shape:
                self.layer.load(fetch(state_dict[name], torch.bfloat16, name).contiguous())
            else:
                *_, errors = args
                errors.append(f"size mismatch for {name}: expected {shape}, found {found}")
            state_dict = {key: value for key, value in state_dict.items() if key != name}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __deepcopy__(self, memo):
        """An ordinary `nn.Linear` of its own: PEFT copies layers to train them (`modules_to_save`)."""
        weight = self.stored_weight()
        copied = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        copied.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            copied.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        copied.train(self.training)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol):
        raise TypeError(
            "PackedLinear: a packed weight cannot be pickled; save with model.save_pretrained, or call restore() first"
        )

    def extra_repr(self) -> str:
        rows = "" if self.format == "bf16" else f", activations={self.activations}"
        return f"{super().extra_repr()}, packed {self.format}{rows}"


class PackedWeight(nn.Parameter):
    """What `PackedLinear.weight` is: metadata at once; asked for values, it becomes the weight.

    The same device as torch's own lazy modules, whose parameters change their class when they materialise.
    """

    @staticmethod
    def of(owner: PackedLinear, shape: tuple[int, int]) -> PackedWeight:
        """A placeholder; NaN, so that a way past `__torch_function__` cannot go unnoticed."""
        one = torch.full((1, 1), float("nan"), dtype=torch.bfloat16, device="cpu")
        placeholder = torch.Tensor._make_subclass(PackedWeight, one.expand(shape), False)
        placeholder.__dict__["owner"] = owner
        return placeholder

    def become(self, values: Tensor) -> None:
        """Turn into an ordinary frozen parameter that holds `values`."""
        with torch._C.DisableTorchFunctionSubclass():
            self.__dict__.pop("owner")
            self.data = values
        self.__class__ = nn.Parameter

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        descriptor = getattr(func, "__self__", None) if type(func).__name__ == "method-wrapper" else None
        is_metadata = func in _METADATA if descriptor is None else descriptor not in _VALUES
        if is_metadata and descriptor is torch.Tensor.requires_grad and func.__name__ == "__set__":
            is_metadata = not args[1]
        if not is_metadata:
            for value in tree_leaves((args, kwargs or {})):
                if isinstance(value, PackedWeight):
                    _tell_once(getattr(descriptor, "__name__", None) or getattr(func, "__name__", str(func)))
                    value.__dict__["owner"].restore()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


@functools.cache
def _tell_once(operation: str) -> None:
    logger.info("weights of packed linear layers are used by %r: torch computes those layers from now on", operation)


def pack_linear(linear: nn.Linear, format: str = "bf16", *, activations: str = "auto") -> PackedLinear:
    """Turn a linear layer into a frozen packed one, in place; its own weight is released.

    Args:
        linear: an `nn.Linear` with a bf16 weight on the CPU that no other module shares.
        format: `bf16` (exact) or `int8` (one scale per output).
        activations: `bf16`, `int8` (only with int8 weights) or `auto`, see `PackedLinear.rows`.
    Raises:
        ValueError: another layer, or a weight that is not finite and to be quantised; the layer is then unchanged.
    """
    weight = linear.weight
    if type(linear) is not nn.Linear or weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        found = f"{type(linear).__name__} in {weight.dtype} on {weight.device}"
        raise ValueError(f"linear: expected an nn.Linear with a bfloat16 weight on the CPU, found {found}")
    check_storage(weight, "weight")
    layer = native().PackedLinear(linear.out_features, linear.in_features, format)
    layer.load(weight.detach().contiguous())
    del linear.weight
    linear.__class__ = PackedLinear
    linear.__dict__.update(layer=layer, format=format, activations=activations)
    linear.__dict__["weight"] = PackedWeight.of(linear, (linear.out_features, linear.in_features))
    return linear


def has_rounded_linears(model: nn.Module) -> bool:
    """Whether a linear layer no longer has the weight that it was packed from."""
    return any(isinstance(module, PackedLinear) and module.format != "bf16" for module in model.modules())


@contextmanager
def saving_packed_weights(model: nn.Module) -> Iterator[None]:
    """Within it, `model.state_dict()` holds unpacked copies of the weights of packed linear layers."""
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    for layer in layers:
        layer.__dict__["_saves_weight"] = True
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("_saves_weight", None)
