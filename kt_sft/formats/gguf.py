"""GGUF files, split or not: metadata and tensor directory up front, tensors as raw blocks from the file mapping.

Format: docs/gguf.md of the ggml project, versions 2 and 3, little endian. The reader of PyPI's `gguf` is not used:
it trusts declared counts (a flipped bit makes it loop or allocate without end), takes a truncated array for a shorter
one, and makes several objects per vocabulary entry. Here every count is held against the bytes that are left and
against fixed limits, tensors must lie one after the other as ggml itself demands, and every fault is a FormatError.
"""

from __future__ import annotations

import mmap
import re
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from kt_sft.errors import FormatError
from kt_sft.formats.ggml_types import GGML_TYPE_BY_NUMBER, GGML_TYPES, GgmlType
from kt_sft.formats.tensor_errors import check_shape, repeated_tensor
from kt_sft.formats.tensor_index import TensorIndex
from kt_sft.formats.unchanged_files import UnchangedFiles
from kt_sft.native import native

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SUFFIX = ".gguf"
_AGAIN = "download or copy the file again"
_MAGIC = b"GGUF"
_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
# Far above what any model needs; they keep a damaged file from being read as millions of entries.
_MAX_HEADER_BYTES = 1 << 30
_MAX_TENSORS = 1 << 17
_MAX_KEYS = 1 << 14
_MAX_STRINGS = 1 << 21
_MAX_STRING_BYTES = 1 << 24
_MAX_PARTS = 4096
_MAX_DIMS = 4
_MAX_DEPTH = 3
_MAX_ALIGNMENT = 1 << 20
# Value type -> numpy; 8 and 9 are strings and arrays.
_SCALARS = dict(enumerate(("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?"))) | {10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """Directory entry: file, type, shape (outer axis first, as torch writes it) and where the data begins."""

    file: Path
    type: GgmlType
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes along the last axis."""
        return self.type.row_bytes(self.shape[-1])

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows."""
        rows = 1
        for extent in self.shape[:-1]:
            rows *= extent
        return rows * self.row_bytes


class GgufIndex(TensorIndex[GgufTensor]):
    """Metadata and tensors of a GGUF file or of a set of split files.

    `metadata` maps keys to int, float, bool, str, or for arrays to a numpy array or a list.
    """

    kind = "gguf"

    def __init__(
        self,
        source: Path,
        files: list[Path],
        metadata: dict[str, Any],
        tensors: dict[str, GgufTensor],
        unchanged: UnchangedFiles | None = None,
    ):
        super().__init__(source, tensors, unchanged)
        self.files = files
        self.metadata = metadata
        self._maps: dict[Path, np.ndarray] = {}

    @classmethod
    def from_path(cls, path: str | Path) -> GgufIndex:
        """Open a file, any file of a split set, or a directory that holds one of these and no other.

        Raises:
            FormatError: nothing or several models there, a part missing, a file damaged or not GGUF.
        """
        path = Path(path)
        files = _set_of(path)
        unchanged = UnchangedFiles(files)
        metadata: dict[str, Any] = {}
        tensors: dict[str, GgufTensor] = {}
        for number, file in enumerate(files):
            part = _Header(file)
            if len(files) > 1:
                _check_split(file, part.metadata, number, len(files))
            for name, tensor in part.tensors.items():
                if name in tensors:
                    raise repeated_tensor(file, name, tensors[name].file)
                tensors[name] = tensor
            metadata = {**part.metadata, **metadata}
        total = metadata.get("split.tensors.count", len(tensors))
        if len(files) > 1 and (type(total) is not int or total != len(tensors)):
            expected = str(total)[:80]
            raise FormatError(files[0], "tensors of all parts", expected=expected, found=len(tensors), remedy=_AGAIN)
        return cls(path, files, metadata, tensors, unchanged)

    def text(self, key: str, default: str | None = None) -> str | None:
        """A text of the metadata.

        Raises:
            FormatError: the file has something else under that key.
        """
        value = self.metadata.get(key, default)
        if not isinstance(value, str | None):
            found = f"{type(value).__name__} {str(value)[:60]}"
            raise FormatError(self.source, f"metadata {key}", expected="a text", found=found, remedy=_AGAIN)
        return value

    def expect(self, name: str, shape: Sequence[int]) -> GgufTensor:
        """Check a tensor against the shape that the model needs.

        Raises:
            FormatError: missing or of another shape.
        """
        info = self.info(name)
        check_shape(info.file, name, shape, info.shape)
        return info

    def blocks(self, name: str, index: tuple[int, ...] = ()) -> Tensor:
        """Raw blocks of a tensor, or of the part that `index` selects on its leading axes: uint8 `[rows, row_bytes]`.

        A view of the mapped file, read-only: writing to it ends the process.

        Raises:
            FormatError: there is no such tensor, or its file cannot be mapped any more.
        """
        import torch

        info = self.info(name)
        if info.file not in self._maps:
            self._maps[info.file] = _map(info.file)
        data = self._maps[info.file][info.offset : info.offset + info.num_bytes]
        if len(data) != info.num_bytes:
            raise FormatError(info.file, f"data of tensor {name}", expected=info.num_bytes, found=len(data))
        part = data.reshape(*info.shape[:-1], info.row_bytes)[index].reshape(-1, info.row_bytes)
        with warnings.catch_warnings():  # torch has no read-only tensors and says so
            warnings.simplefilter("ignore", UserWarning)
            return torch.from_numpy(part)

    def expect_numbers(self, name: str) -> None:
        """Check that a tensor is of a type that `dequantize` reads.

        Raises:
            FormatError: integers, or a type that is only for computing.
        """
        info = self.info(name)
        if not native().can_dequantize_gguf(info.type.name):
            expected, remedy = "a floating point or quantised type", "use another quantisation of the model"
            raise FormatError(info.file, f"tensor {name}", expected=expected, found=info.type.name, remedy=remedy)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """All numbers of a tensor in its shape, bf16 or (None) f32.

        Raises:
            FormatError: there is no such tensor, or it is of a type without numbers.
        """
        import torch

        self.expect_numbers(name)
        info = self.info(name)
        return dequantize(info.type.name, self.blocks(name), dtype or torch.float32).view(info.shape)

    def close(self) -> None:
        self._maps.clear()


def dequantize(kind: str, blocks: Tensor, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
    """Numbers of raw blocks uint8 `[rows, row_bytes]` of a GGUF type, (None) bf16 or f32 `[rows, cols]`.

    Args:
        scale: what they are times; the product is rounded once.
    """
    import torch

    if scale != 1.0:
        return dequantize(kind, blocks, torch.float32).mul_(scale).to(dtype or torch.bfloat16)
    size = GGML_TYPES[kind]
    columns = blocks.shape[1] // size.block_bytes * size.block_elements
    # transformers builds models under a meta-device context, in which files are opened
    out = torch.empty(blocks.shape[0], columns, dtype=dtype or torch.bfloat16, device="cpu")
    native().dequantize_gguf(kind, blocks, out)
    return out


class _Header:
    """One file's metadata and directory, parsed on construction."""

    def __init__(self, file: Path):
        self.file = file
        self._data = memoryview(_map(file))
        self._at = 0
        self._strings_left = _MAX_STRINGS
        self._end = min(len(self._data), _MAX_HEADER_BYTES)
        if bytes(self._data[:4]) != _MAGIC:
            self._fail("magic at byte 0", "GGUF", repr(bytes(self._data[:4])))
        self._at = 4
        self._check_version(self._number("<I", "version"))
        tensors = self._count("tensors", _MAX_TENSORS, 8 + 4 + 8 + 4 + 8)
        keys = self._count("metadata keys", _MAX_KEYS, 8 + 4 + 1)
        self.metadata: dict[str, Any] = {}
        for _ in range(keys):
            self._read_key()
        entries = [self._read_entry() for _ in range(tensors)]
        self.tensors = self._place(entries)
        del self._data

    def _fail(self, what: str, expected: object, found: object) -> NoReturn:
        raise FormatError(self.file, what, expected=expected, found=found, remedy=_AGAIN)

    def _take(self, count: int, what: str) -> memoryview:
        """The next bytes of the header."""
        if count > self._end - self._at:
            left = self._end - self._at
            self._fail(f"{what} at byte {self._at}", f"{count} bytes", f"{left} left (truncated or damaged file)")
        begin, self._at = self._at, self._at + count
        return self._data[begin : self._at]

    def _number(self, layout: str, what: str) -> int:
        return struct.unpack(layout, self._take(struct.calcsize(layout), what))[0]

    def _count(self, what: str, limit: int, min_bytes: int) -> int:
        """A declared count, held against a limit and against the bytes that so many entries need at least."""
        at, count = self._at, self._number("<Q", f"number of {what}")
        if count > min(limit, (self._end - self._at) // min_bytes):
            left = self._end - self._at
            self._fail(f"number of {what} at byte {at}", f"at most {limit}, in {left} bytes", count)
        return count

    def _string(self, what: str) -> str:
        at = self._at
        length = self._number("<Q", f"length of {what}")
        if length > _MAX_STRING_BYTES:
            self._fail(f"length of {what} at byte {at}", f"at most {_MAX_STRING_BYTES}", length)
        if self._strings_left == 0:
            self._fail(f"{what} at byte {at}", f"at most {_MAX_STRINGS} strings", "more")
        self._strings_left -= 1
        # Vocabularies of byte tokens are not always UTF-8; names that matter are compared, and then differ.
        return self._take(length, what).tobytes().decode("utf-8", errors="replace")

    def _strings(self, count: int, what: str) -> list[str]:
        """Many of them: vocabularies have hundreds of thousands."""
        unpack, data, at, end = struct.Struct("<Q").unpack_from, self._data, self._at, self._end
        found: list[str] = []
        for _ in range(count):
            begin = at + 8
            stop = begin + unpack(data, at)[0] if begin <= end else end + 1
            if stop > end or stop - begin > _MAX_STRING_BYTES:
                self._at = at
                self._string(what)  # says what is wrong
            found.append(str(data[begin:stop], "utf-8", "replace"))
            at = stop
        self._at, self._strings_left = at, self._strings_left - count
        return found

    def _check_version(self, version: int) -> None:
        if version in (2, 3):
            return
        if version & 0xFFFF == 0 and version:
            self._fail("byte order", "little endian", "big endian")
        self._fail("version at byte 4", "2 or 3", version)

    def _read_key(self) -> None:
        at, key = self._at, self._string("metadata key")
        if not key or key in self.metadata:
            self._fail(f"metadata key at byte {at}", "a new name", repr(key[:80]))
        self.metadata[key] = self._value(self._number("<I", f"type of {key[:80]}"), key[:80], 0)

    def _value(self, kind: int, what: str, depth: int) -> Any:
        if kind == _STRING:
            return self._string(what)
        if kind in _SCALARS:
            return self._scalars(kind, 1, what)[0].item()
        if kind != _ARRAY or depth == _MAX_DEPTH:
            self._fail(f"type of {what} before byte {self._at}", "0 to 12, arrays at most three deep", kind)
        inner = self._number("<I", f"type of {what}")
        if inner in _SCALARS:
            size = np.dtype(_SCALARS[inner]).itemsize
            return self._scalars(inner, self._count(f"elements of {what}", _MAX_HEADER_BYTES, size), what).copy()
        count = self._count(f"elements of {what}", self._strings_left, 8)
        if inner == _STRING:
            return self._strings(count, what)
        return [self._value(inner, what, depth + 1) for _ in range(count)]

    def _scalars(self, kind: int, count: int, what: str) -> np.ndarray:
        at, dtype = self._at, np.dtype(_SCALARS[kind])
        raw = np.frombuffer(self._take(count * dtype.itemsize, what), dtype=np.uint8)
        if kind == 7 and raw.size and raw.max() > 1:
            self._fail(f"{what} at byte {at}", "true (1) or false (0)", int(raw.max()))
        return raw.view(dtype)

    def _read_entry(self) -> tuple[str, GgmlType, tuple[int, ...], int]:
        """(name, type, shape, offset from the start of the data)."""
        at, name = self._at, self._string("tensor name")
        what = f"tensor {name[:80]} at byte {at}"
        num_dims = self._number("<I", f"{what}, number of axes")
        if not 1 <= num_dims <= _MAX_DIMS:
            self._fail(f"{what}, number of axes", f"1 to {_MAX_DIMS}", num_dims)
        extents = struct.unpack(f"<{num_dims}Q", self._take(8 * num_dims, what))
        number = self._number("<I", f"{what}, type")
        if number not in GGML_TYPE_BY_NUMBER:
            self._fail(f"{what}, type", "a type number that ggml has", number)
        kind = GGML_TYPE_BY_NUMBER[number]
        if min(extents) < 1 or max(extents) > len(self._data) * kind.block_elements:
            self._fail(f"{what}, axes", f"sizes that fit in {len(self._data)} bytes", list(extents))
        if extents[0] % kind.block_elements:
            self._fail(f"{what}, inner axis", f"a multiple of {kind.block_elements} ({kind.name})", extents[0])
        return name, kind, tuple(reversed(extents)), self._number("<Q", f"{what}, offset")

    def _place(self, entries: list[tuple[str, GgmlType, tuple[int, ...], int]]) -> dict[str, GgufTensor]:
        """The directory with absolute offsets; tensors lie one after the other, each at a multiple of the alignment."""
        alignment = self.metadata.get("general.alignment", 32)
        is_power = type(alignment) is int and 8 <= alignment <= _MAX_ALIGNMENT and alignment & (alignment - 1) == 0
        if not is_power:
            self._fail("general.alignment", f"a power of two from 8 to {_MAX_ALIGNMENT}", str(alignment)[:80])
        start = -(-self._at // alignment) * alignment
        end = 0
        tensors: dict[str, GgufTensor] = {}
        for name, kind, shape, offset in sorted(entries, key=lambda entry: entry[3]):
            if name in tensors:
                self._fail(f"tensor {name[:80]}", "once", "twice")
            expected = -(-end // alignment) * alignment
            if offset != expected:
                self._fail(f"offset of tensor {name[:80]}", f"{expected}, where the one before it ends", offset)
            tensor = GgufTensor(self.file, kind, shape, start + offset)
            end = offset + tensor.num_bytes
            if start + end > len(self._data):
                self._fail(f"data of tensor {name[:80]} (truncated file)", f"{start + end} bytes", len(self._data))
            tensors[name] = tensor
        return {name: tensors[name] for name, *_ in entries}


def _map(file: Path) -> np.ndarray:
    """The whole file as uint8, mapped read-only."""
    try:
        with file.open("rb") as stream:
            return np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
    except (OSError, ValueError) as error:  # mmap refuses an empty file by a ValueError
        found = "an empty file" if isinstance(error, ValueError) else str(error)
        raise FormatError(file, "GGUF file", expected="a readable file", found=found, remedy=_AGAIN) from None


def _set_of(path: Path) -> list[Path]:
    """All files of the model at `path`, in order."""
    if path.is_dir():
        path = _only_model(path)
    elif not path.is_file():
        found = "another kind of file" if path.exists() else "nothing"
        raise FormatError(path, "GGUF file", expected="a file", found=found, remedy="correct the path")
    split = _SPLIT_NAME.fullmatch(path.name)
    if split is None:
        return [path]
    count = int(split["count"])
    if count > _MAX_PARTS:
        raise FormatError(path, "split GGUF file", expected=f"at most {_MAX_PARTS} parts", found=count)
    files = [path.with_name(f"{split['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    missing = [file.name for file in files if not file.is_file()]
    if missing or path not in files:
        raise FormatError(
            path,
            "split GGUF file",
            expected=f"{count} parts beside each other",
            found=f"{len(missing)} missing, first {missing[0]}" if missing else "a number outside them",
            remedy="download the missing files",
        )
    return files


def _only_model(directory: Path) -> Path:
    found = sorted(file for file in directory.iterdir() if file.suffix == SUFFIX and file.is_file())
    firsts = [file for file in found if not (m := _SPLIT_NAME.fullmatch(file.name)) or int(m["number"]) == 1]
    if len(firsts) != 1:
        names = ", ".join(file.name for file in (firsts or found)[:4]) or "none"
        raise FormatError(
            directory, "GGUF files", expected="one model", found=names, remedy="name the file instead of the directory"
        )
    return firsts[0]


def _check_split(file: Path, metadata: dict[str, Any], number: int, count: int) -> None:
    found = (metadata.get("split.no"), metadata.get("split.count"))
    if any(type(value) is not int for value in found) or found != (number, count):
        raise FormatError(
            file,
            "split.no and split.count",
            expected=f"{number} and {count}, as its name says",
            found=f"{found[0]} and {found[1]}"[:80],
            remedy="download the parts again, under their own names",
        )
