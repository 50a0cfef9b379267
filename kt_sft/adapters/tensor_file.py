"""The tensors of an adapter directory by name: adapter_model.safetensors, or adapter_model.bin of older releases, and
KTransformers' file of the experts beside it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kt_sft.adapters.folder import EXPERTS_NAME, weights_file
from kt_sft.errors import FormatError
from kt_sft.formats.file_names import ADAPTER_WEIGHTS
from kt_sft.formats.finite import is_finite
from kt_sft.formats.safetensors_index import SafetensorsIndex
from kt_sft.formats.safetensors_writer import DTYPE_NAMES, PlannedTensor, write
from kt_sft.formats.torch_file import read_tensors

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "base_model.model."
_MAX_NAME = 1024  # characters; searching in longer ones takes its time
_DTYPES = ("F32", "BF16", "F16", "F64", "F8_E4M3", "F8_E5M2")
_DEFAULT = re.compile(r"\.lora_([AB])\.default\.")


class TensorFile:
    """Names without PEFT's prefix, shapes from the header, tensors on demand.

    Args:
        name: of the file; None: PEFT's, whichever is there. Without one, beside KTransformers' file, there are none.
    Raises:
        FormatError: no such file, a damaged one, or others with tensors that are not read.
    """

    def __init__(self, folder: Path, name: str | None = None):
        file = weights_file(folder) if name is None else folder / name
        self.path = file or folder / ADAPTER_WEIGHTS
        self._index: SafetensorsIndex | None = None
        self._tensors: dict[str, Tensor] = {}
        self._keys: dict[str, str] = {}
        if self.path.suffix == ".safetensors":
            self._index = SafetensorsIndex.from_files([file]) if file else SafetensorsIndex({}, folder)
        else:
            self._tensors = read_tensors(self.path)
        for key in self._index if self._index is not None else self._tensors:
            self._check_entry(key)
            plain = _DEFAULT.sub(r".lora_\1.", key.removeprefix(PREFIX))
            if plain in self._keys:
                what, found = f"tensor {key}", f"{self._keys[plain]}, too, which means the same"
                raise FormatError(self.path, what, expected="one of a name", found=found)
            self._keys[plain] = key

    def _check_entry(self, key: str) -> None:
        """A name that could be one, and numbers with a point."""
        if len(key) > _MAX_NAME:
            raise FormatError(self.path, f"tensor {key[:80]}", expected="a name", found=f"{len(key)} characters")
        if (dtype := self._dtype(key)) not in _DTYPES:
            expected, found = f"one of {', '.join(_DTYPES)}", dtype
            raise FormatError(self.path, f"tensor {key}: element type", expected=expected, found=found)

    def _dtype(self, key: str) -> str:
        if self._index is not None:
            return self._index.info(key).dtype
        return DTYPE_NAMES.get(str(self._tensors[key].dtype), str(self._tensors[key].dtype))

    @classmethod
    def of_experts(cls, folder: Path) -> TensorFile | None:
        """KTransformers' LoRA of the routed experts; None if there is none."""
        return cls(folder, EXPERTS_NAME) if (folder / EXPERTS_NAME).is_file() else None

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

    def check_finite(self) -> None:
        """Look at every number.

        Raises:
            FormatError: names the first tensor with NaN or infinity.
        """
        import torch

        bad = [name for name in self if not is_finite(self.read(name), torch.float32)]
        if bad:
            raise not_finite(self.path, self._keys[bad[0]], len(bad) - 1)

    def dtypes(self) -> set[str]:
        """Element types by their names in safetensors files."""
        return {self._dtype(key) for key in self._keys.values()}


def not_finite(path: Path, name: str, others: int = 0) -> FormatError:
    """An adapter that would make every weight it touches NaN."""
    more = f" (and in {others} more tensors)" if others else ""
    remedy = "take an earlier checkpoint of the training"
    return FormatError(path, f"tensor {name}", expected="finite numbers", found=f"NaN or infinity{more}", remedy=remedy)


def write_tensors(path: Path, tensors: Callable[[], Iterator[tuple[str, Tensor]]]) -> None:
    """Write a safetensors file from tensors that are made twice: for the header, and for the data."""
    plan = [PlannedTensor(name, str(_writable(tensor).dtype), tuple(tensor.shape)) for name, tensor in tensors()]
    write(path, plan, (_writable(tensor) for _, tensor in tensors()))


def _writable(tensor: Tensor) -> Tensor:
    import torch

    return tensor if tensor.dtype in (torch.float32, torch.bfloat16, torch.float16) else tensor.float()
