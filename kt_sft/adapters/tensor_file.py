"""The tensors of an adapter directory by name: adapter_model.safetensors, or adapter_model.bin of older releases."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kt_sft.errors import FormatError
from kt_sft.formats.safetensors_index import SafetensorsIndex
from kt_sft.formats.safetensors_writer import PlannedTensor, write

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
PREFIX = "base_model.model."
_DEFAULT = re.compile(r"\.lora_([AB])\.default\.")


class TensorFile:
    """Names without PEFT's prefix, shapes from the header, tensors on demand.

    Raises:
        FormatError: no such file, or a damaged one.
    """

    def __init__(self, folder: Path):
        self.path = folder / WEIGHTS_NAME
        self._index: SafetensorsIndex | None = None
        self._tensors: dict[str, Tensor] = {}
        self._keys: dict[str, str] = {}
        if self.path.is_file():
            self._index = SafetensorsIndex.from_files([self.path])
            keys = list(self._index)
        elif (folder / PICKLE_NAME).is_file():
            self.path = folder / PICKLE_NAME
            self._tensors = _unpickle(self.path)
            keys = list(self._tensors)
        else:
            raise FormatError(folder, "no adapter weights", expected=WEIGHTS_NAME, found="none")
        for key in keys:
            self._keys[_DEFAULT.sub(r".lora_\1.", key.removeprefix(PREFIX))] = key

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __contains__(self, name: str) -> bool:
        return name in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor that is there."""
        key = self._keys[name]
        return self._index.info(key).shape if self._index is not None else tuple(self._tensors[key].shape)

    def read(self, name: str) -> Tensor:
        """The tensor; a view of the mapped file, but fp8 as bf16: nothing computes with it."""
        key = self._keys[name]
        tensor = self._index.read(key) if self._index is not None else self._tensors[key]
        return tensor.bfloat16() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor

    def dtypes(self) -> set[str]:
        """Names of the element types."""
        if self._index is not None:
            return {self._index.info(key).dtype for key in self._index}
        return {str(tensor.dtype).removeprefix("torch.") for tensor in self._tensors.values()}


def _unpickle(path: Path) -> dict[str, Tensor]:
    import pickle

    import torch

    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise FormatError(path, f"damaged ({reason})", remedy="save or copy the adapter again") from None
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise FormatError(path, "adapter weights", expected="tensors by name", found=type(tensors).__name__)
    return tensors


def write_tensors(path: Path, tensors: Callable[[], Iterator[tuple[str, Tensor]]]) -> None:
    """Write a safetensors file from tensors that are made twice: for the header, and for the data."""
    plan = [PlannedTensor(name, str(_writable(tensor).dtype), tuple(tensor.shape)) for name, tensor in tensors()]
    write(path, plan, (_writable(tensor) for _, tensor in tensors()))


def _writable(tensor: Tensor) -> Tensor:
    import torch

    return tensor if tensor.dtype in (torch.float32, torch.bfloat16, torch.float16) else tensor.float()
