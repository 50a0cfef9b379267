"""Experts in the tensors of a caller."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kt_sft.errors import ConfigError
from kt_sft.models.layout import ExpertsSpec
from kt_sft.storage import check_storage

if TYPE_CHECKING:
    from kt_sft.models.layout import Formats, Matrices
    from kt_sft.sources.protocol import ExpertLayer


class TensorExperts:
    """An `ExpertSource` over the tensors of one layer; nothing of them is kept by what they are loaded into.

    Args:
        gate, up: `[experts, inter, hidden]`, of any floating point type and device.
        down: `[experts, hidden, inter]`.
        name: of the layer's module.
    Raises:
        TypeError: no tensors.
        ValueError: a shape or type that does not fit.
    """

    kind = "tensors"
    is_packed = False
    is_mapped = False
    int4_group = None

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, *, hidden: int, inter: int, name: str):
        for argument, tensor in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{argument}: expected a torch.Tensor, found {type(tensor).__name__}")
        self.path = Path("tensors")
        self.files: tuple[Path, ...] = ()
        self.spec = ExpertsSpec(gate.shape[0] if gate.dim() else 0, hidden, inter)
        into, out = (self.spec.num_experts, inter, hidden), (self.spec.num_experts, hidden, inter)
        for argument, tensor, shape in (("gate_proj", gate, into), ("up_proj", up, into), ("down_proj", down, out)):
            if tuple(tensor.shape) != shape or not tensor.is_floating_point():
                raise ValueError(
                    f"{argument}: expected floating point {list(shape)}, found {tensor.dtype} {list(tensor.shape)}"
                )
        self._projections = (gate, up, down)
        self.formats = {name: (str(gate.dtype), str(up.dtype), str(down.dtype))}

    def native_formats(self, name: str, method: str, group: int) -> Formats:
        """See `ExpertSource`; what is packed is rounded here."""
        if method in ("RAWINT4", "GGUF"):
            raise ConfigError(
                f"method {method}: its weights are taken from files as they are stored; use load_weights, or "
                "method BF16, INT8 or INT4"
            )
        return method.lower()

    def load(self, experts: ExpertLayer, name: str, expert: int, *, slot: int) -> None:
        """See `ExpertSource`."""
        experts.load_expert(slot, *self.read(name, expert))

    def read(self, name: str, expert: int) -> Matrices:
        """See `ExpertSource`; on the CPU."""
        for argument, tensor in zip(self.tensor_names(name, expert), self._projections, strict=True):
            check_storage(tensor, argument)
        gate, up, down = (t[expert].detach().to("cpu", torch.bfloat16).contiguous() for t in self._projections)
        return gate, up, down

    def tensor_names(self, name: str, expert: int) -> tuple[str, str, str]:
        """See `ExpertSource`; the arguments of the caller."""
        return "gate_proj", "up_proj", "down_proj"

    def close(self) -> None:
        """See `ExpertSource`; nothing is open."""
