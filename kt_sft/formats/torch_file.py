"""Files of `torch.save` that hold plain tensors by name, and nothing else.

A pickle is a program. torch's restricted reader runs no foreign code, but it makes what the program asks for: byte
arrays of any size, tuples that take exponential time to hash, records that unpack to a thousand times their size. So
the program is looked at first, instruction by instruction: it may do what saving a dict of dense tensors needs.
"""

from __future__ import annotations

import os
import pickletools
import zipfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kt_sft.errors import FormatError, as_ours, first_line
from kt_sft.formats.regular_file import open_regular

if TYPE_CHECKING:
    from torch import Tensor

_AGAIN = "save it again as adapter_model.safetensors, which PEFT writes by default"
_FLOATS = ("Float", "Half", "BFloat16", "Double")
_GLOBALS = {f"torch._utils _rebuild_{what}" for what in ("tensor_v2", "tensor_v3", "parameter")}
_GLOBALS |= {"collections OrderedDict", "torch.storage UntypedStorage", "torch Size"}
_GLOBALS |= {f"torch {kind}Storage" for kind in (*_FLOATS, "Int", "Long", "Short", "Char", "Byte", "Bool")}
_GLOBALS |= {"torch float8_e4m3fn", "torch float8_e5m2"}
_TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
_INSTRUCTIONS = {
    "PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1",
    "BINFLOAT", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "SETITEM", "SETITEMS", "APPEND", "APPENDS", "GLOBAL",
    "BINPERSID", "REDUCE", "BUILD", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", *_TUPLES,
}  # fmt: skip


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name, on the CPU.

    Raises:
        FormatError: no regular file, damaged, or anything but dense tensors by name.
    """
    import torch

    handle = open_regular(path, "file")
    # Readers of zip files, pickles and torch's own records raise what they like.
    with os.fdopen(handle, "rb") as stream, as_ours(partial(_damaged, path)):
        _check_program(path, _program(path, zipfile.ZipFile(stream), os.fstat(handle).st_size))
        stream.seek(0)
        tensors = torch.load(stream, map_location="cpu", weights_only=True)
    if not isinstance(tensors, dict):
        raise FormatError(path, "content", expected="tensors by name", found=type(tensors).__name__)
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise FormatError(path, "content", expected="tensors by name", found=f"{name!r:.80} as a name")
        if (found := _not_plain(tensor)) is not None:
            raise FormatError(path, f"tensor {name}", expected="a dense tensor", found=found, remedy=_AGAIN)
    return {name: tensor.detach().resolve_neg() for name, tensor in tensors.items()}


def _damaged(path: Path, error: BaseException) -> FormatError:
    return FormatError(path, f"damaged ({first_line(error, 120)})", remedy="save or copy the adapter again")


def _program(path: Path, archive: zipfile.ZipFile, file_bytes: int) -> bytes:
    """The pickle of an archive whose records are stored as they are."""
    records = archive.infolist()
    packed = next((each for each in records if each.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None or sum(each.file_size for each in records) > file_bytes:
        found = "compressed ones" if packed is not None else "records of more bytes than the file has"
        raise FormatError(path, "archive", expected="records as torch.save stores them", found=found, remedy=_AGAIN)
    pickles = [each for each in records if each.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise FormatError(path, "archive", expected="one record data.pkl", found=len(pickles), remedy=_AGAIN)
    return archive.read(pickles[0])


def _check_program(path: Path, program: bytes) -> None:
    """Raise unless a pickle makes nothing but dicts of tensors.

    Raises:
        FormatError: names what it makes, and the tensor.
    """
    name = previous = None
    tuples: set[int] = set()
    for instruction, argument, position in pickletools.genops(program):
        kind = instruction.name
        if kind == "BINUNICODE":
            name = argument
        elif kind in ("BINPUT", "LONG_BINPUT") and previous in _TUPLES:
            tuples.add(argument)
        is_shared_tuple = kind in ("BINGET", "LONG_BINGET") and argument in tuples
        is_foreign = kind == "GLOBAL" and argument not in _GLOBALS
        if kind not in _INSTRUCTIONS or is_shared_tuple or is_foreign:
            found = argument.replace(" ", ".") if is_foreign else f"the instruction {kind} at byte {position}"
            what = "content" if name is None else f"tensor {name}"
            raise FormatError(path, what, expected="a dense tensor", found=found, remedy=_AGAIN)
        previous = kind


def _not_plain(value: Any) -> str | None:
    """What a value is, if it is no dense tensor with memory of its own."""
    import torch

    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        return type(value).__name__
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        return f"a {'quantised' if value.is_quantized else str(value.layout).removeprefix('torch.')} one"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"shape {list(value.shape)} over {value.untyped_storage().nbytes()} bytes"
    return None
