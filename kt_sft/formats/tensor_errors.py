"""What every index of tensors says where the files and the model disagree."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kt_sft.errors import FormatError

INCOMPLETE = "the checkpoint is incomplete or belongs to another model; download it again"
SAME_MODEL = "config.json and weights must come from the same model"


def missing_tensor(source: Path, name: str) -> FormatError:
    """The model needs a tensor that no file holds."""
    return FormatError(source, f"tensor {name}", expected="present", found="missing", remedy=INCOMPLETE)


def repeated_tensor(file: Path, name: str, first: Path) -> FormatError:
    """A second file holds the same tensor."""
    return FormatError(file, f"tensor {name}", expected="one file holds it", found=f"also in {first.name}")


def check_shape(file: Path, name: str, shape: Sequence[int], found: tuple[int, ...]) -> None:
    """Raise unless a tensor has the shape that the model needs.

    Raises:
        FormatError: names both.
    """
    if found != tuple(shape):
        what, expected = f"tensor {name}", f"shape {list(shape)}"
        raise FormatError(file, what, expected=expected, found=list(found), remedy=SAME_MODEL)
