"""What the indexes of all checkpoint formats have in common: entries by tensor name, over files that are mapped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Generic, Self, TypeVar

from kt_sft.formats.tensor_errors import missing_tensor
from kt_sft.formats.unchanged_files import UnchangedFiles

Entry = TypeVar("Entry")


class TensorIndex(ABC, Generic[Entry]):
    """Tensors of a checkpoint by name; close it, or use it as a context manager, to drop the file mappings.

    Args:
        source: file or directory, as the user knows it.
        tensors: entry of each tensor, in the order of iteration.
        unchanged: its files as they were before their headers were read.
    """

    def __init__(self, source: Path, tensors: dict[str, Entry], unchanged: UnchangedFiles | None = None):
        self.source = source
        self.unchanged = UnchangedFiles() if unchanged is None else unchanged
        self._tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __len__(self) -> int:
        return len(self._tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def info(self, name: str) -> Entry:
        """Entry of a tensor.

        Raises:
            FormatError: the checkpoint has no such tensor.
        """
        try:
            return self._tensors[name]
        except KeyError:
            raise missing_tensor(self.source, name) from None

    @abstractmethod
    def close(self) -> None:
        """Drop the file mappings; tensors already returned stay valid."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
