"""Safetensors checkpoints, sharded or not: headers up front, tensors lazily from the file mapping.

Opening reads headers only and finds every damaged or missing file. Tensors that `read` returns are views of the
mapped file (page cache, not anonymous memory) until someone copies them; a slice of a fused tensor costs its own
pages only.
"""

from __future__ import annotations

import json
import reprlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kt_sft.errors import FormatError
from kt_sft.formats.json_object import without_repeats
from kt_sft.formats.tensor_errors import check_shape, repeated_tensor
from kt_sft.formats.tensor_index import TensorIndex
from kt_sft.formats.unchanged_files import UnchangedFiles

if TYPE_CHECKING:
    from torch import Tensor

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_AGAIN = "download or copy the file again"
# The format's own limit; a larger number means that the file is not safetensors.
_MAX_HEADER_BYTES = 100_000_000
# Of every filesystem; longer ones are an OSError instead of an absent file.
_MAX_FILE_NAME = 200
# torch has room for more, checkpoints have not; a product of many would take minutes.
_MAX_AXES = 8
# Others may exist; what they hold is not checked here, and no model of ours needs them.
DTYPE_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8}
DTYPE_BITS |= {"U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32}
DTYPE_BITS |= {"U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what its header says; `dtype` in safetensors names (`BF16`, `F32`, ...)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    def expect(self, name: str, shape: Sequence[int], dtypes: Sequence[str] = ()) -> None:
        """Check against the shape (and the dtypes, if any) that the model needs; `name` is for the message.

        Raises:
            FormatError: another shape or dtype.
        """
        check_shape(self.file, name, shape, self.shape)
        if dtypes and self.dtype not in dtypes:
            raise FormatError(
                self.file,
                f"tensor {name}",
                expected=f"dtype {' or '.join(dtypes)}",
                found=self.dtype,
                remedy="convert the checkpoint to bf16 first; this form of quantisation is not read",
            )


class SafetensorsIndex(TensorIndex[TensorInfo]):
    """All tensors of a checkpoint by name, in file order; use `from_directory` or `from_files`."""

    def __init__(self, tensors: dict[str, TensorInfo], source: Path, unchanged: UnchangedFiles | None = None):
        super().__init__(source, tensors, unchanged)
        self._open: dict[Path, Any] = {}

    @classmethod
    def from_directory(cls, directory: str | Path, *, needs_metadata: bool = False) -> SafetensorsIndex:
        """Open `model.safetensors`, or `model.safetensors.index.json` with its shards; where both are there the former,
        as transformers does.

        Args:
            needs_metadata: transformers will read the index, too, and reads none without `metadata`.
        Raises:
            FormatError: directory or shard missing, no safetensors, file damaged, index and shard disagree.
        """
        directory = Path(directory)
        if not directory.is_dir():
            found = "a file" if directory.exists() else "nothing"
            raise FormatError(
                directory, "model directory", expected="a directory", found=found, remedy="correct the path"
            )
        if (directory / SINGLE_NAME).is_file():
            return cls.from_files([directory / SINGLE_NAME], directory)
        index_path = directory / INDEX_NAME
        if index_path.is_file():
            weight_map = _read_weight_map(index_path, needs_metadata)
            index = cls.from_files([directory / name for name in sorted(set(weight_map.values()))], directory)
            index._check_weight_map(index_path, weight_map)
            return index
        others = sorted(
            p.name for p in directory.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".gguf", ".safetensors"}
        )
        raise FormatError(
            directory,
            "weights",
            expected=f"{SINGLE_NAME} or {INDEX_NAME}",
            found=", ".join(others[:4]) or "no weight file",
            remedy="use a checkpoint in safetensors format (save_pretrained writes one)",
        )

    @classmethod
    def from_files(cls, files: Iterable[str | Path], source: str | Path | None = None) -> SafetensorsIndex:
        """Open a list of safetensors files as one checkpoint; `source` names it in messages.

        Raises:
            FormatError: file missing, damaged, truncated, or not safetensors.
        """
        files = [Path(file) for file in files]
        if not files:
            raise FormatError(source, "weights", expected="safetensors files", found="none")
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise FormatError(
                missing[0],
                "shard",
                expected=f"{len(files)} shards",
                found=f"{len(files) - len(missing)} (missing: {_first_names(p.name for p in missing)})",
                remedy="download the missing files",
            )
        tensors: dict[str, TensorInfo] = {}
        unchanged = UnchangedFiles(files)
        for file in files:
            for name, info in _read_header(file):
                if name in tensors:
                    raise repeated_tensor(file, name, tensors[name].file)
                tensors[name] = info
        return cls(tensors, Path(source) if source is not None else files[0].parent, unchanged)

    @property
    def files(self) -> list[Path]:
        """All files that hold tensors."""
        return sorted({info.file for info in self._tensors.values()})

    def expect(self, name: str, shape: Sequence[int], dtypes: Sequence[str] = ()) -> TensorInfo:
        """Check a tensor's header against the shape (and storage dtypes) that the model needs.

        Raises:
            FormatError: missing, wrong shape, wrong dtype.
        """
        info = self.info(name)
        info.expect(name, shape, dtypes)
        return info

    def read(self, name: str, rows: tuple[int | slice, ...] = ()) -> Tensor:
        """Tensor, or the part of it that `rows` selects on its leading axes; a view of the mapped file.

        Raises:
            FormatError: the checkpoint has no such tensor, or the installed library does not know its dtype.
        """
        from safetensors import SafetensorError

        info = self.info(name)
        if info.file not in self._open:
            self._open[info.file] = _map(info.file)
        part = self._open[info.file].get_slice(name)
        try:
            return part[rows] if rows else part[...]
        except SafetensorError as error:
            expected = "a dtype that the installed safetensors library reads"
            raise FormatError(info.file, f"tensor {name}", expected=expected, found=str(error)[:200]) from None

    def close(self) -> None:
        while self._open:
            _, handle = self._open.popitem()
            handle.__exit__(None, None, None)

    def _check_weight_map(self, index_path: Path, weight_map: dict[str, str]) -> None:
        for name, file in weight_map.items():
            if name not in self._tensors:
                raise FormatError(
                    index_path.parent / file,
                    f"tensor {name}",
                    expected=f"listed by {INDEX_NAME}",
                    found="missing",
                    remedy=_AGAIN,
                )


def _read_weight_map(index_path: Path, needs_metadata: bool) -> dict[str, str]:
    try:
        values = json.loads(index_path.read_text(encoding="utf-8"))
        weight_map, metadata = values["weight_map"], values.get("metadata", None if needs_metadata else {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(
            index_path,
            "index",
            expected="JSON with a weight_map",
            found=f"{type(error).__name__}: {error}"[:200],
            remedy=_AGAIN,
        ) from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(
            index_path, "weight_map", expected="tensor name -> file", found=repr(weight_map)[:40], remedy=_AGAIN
        )
    if not isinstance(metadata, dict):
        raise FormatError(index_path, "metadata", expected="an object", found=reprlib.repr(metadata), remedy=_AGAIN)
    for name, file in weight_map.items():
        if not isinstance(file, str) or "\0" in file or Path(file).name != file or not 0 < len(file) <= _MAX_FILE_NAME:
            what = f"weight_map, tensor {name[:80]}"
            raise FormatError(
                index_path, what, expected="a file beside the index", found=repr(file)[:80], remedy=_AGAIN
            )
    return weight_map


def _map(file: Path, framework: str = "pt") -> Any:
    """The file in the safetensors library, which refuses all of it for one dtype that it does not know, and JSON of
    which Python is more tolerant; transformers opens files by it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework=framework, device="cpu").__enter__()
    except (SafetensorError, OSError) as error:
        what, found = "header at byte 8", str(error)[:200]
        expected = "what the installed safetensors library reads"
        raise FormatError(file, what, expected=expected, found=found, remedy=_AGAIN) from None


def _read_header(file: Path) -> Iterator[tuple[str, TensorInfo]]:
    """Parse one file's header and check that its data is all there.

    The file is: 8 bytes header length (little endian), the JSON header, then the data; offsets count from the data.
    """
    try:
        file_bytes = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if 2 <= header_bytes <= min(_MAX_HEADER_BYTES, file_bytes - 8):
                text = stream.read(header_bytes)
    except OSError as error:
        raise FormatError(file, "weights", expected="a readable file", found=str(error), remedy=_AGAIN) from None
    if not 2 <= header_bytes <= _MAX_HEADER_BYTES:
        raise FormatError(
            file,
            "header length at byte 0",
            expected="a safetensors file",
            found=prefix.hex() or "an empty file",
            remedy=_AGAIN,
        )
    if 8 + header_bytes > file_bytes:
        raise _wrong_length(file, 8 + header_bytes, file_bytes)
    try:
        header = json.loads(text, object_pairs_hook=without_repeats)
        entries = [(name, *_entry(name, entry)) for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(
            file,
            "header at byte 8",
            expected="a safetensors header",
            found=f"{type(error).__name__}: {error}"[:200],
            remedy=_AGAIN,
        ) from None
    data_bytes = 0
    for name, _, _, begin, end in sorted(entries, key=lambda entry: entry[3:]):
        if begin != data_bytes:
            what = f"offset of tensor {name[:80]}"
            raise FormatError(file, what, expected=f"{data_bytes}, where the one before it ends", found=begin)
        data_bytes = end
    if 8 + header_bytes + data_bytes != file_bytes:
        raise _wrong_length(file, 8 + header_bytes + data_bytes, file_bytes)
    _map(file, "numpy").__exit__(None, None, None)
    for name, dtype, shape, _, _ in entries:
        yield name, TensorInfo(file, dtype, shape)


def _entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, begin and end of a header entry; ValueError where they do not fit together."""
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = [*shape, begin, end]
    if not isinstance(dtype, str) or not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"tensor {name[:80]!r} has no dtype, shape and offsets of whole numbers")
    if len(shape) > _MAX_AXES or any(extent >= 1 << 63 for extent in shape):
        raise ValueError(f"tensor {name[:80]!r} has {len(shape)} axes, {max(shape)} long at most")
    elements = 1
    for extent in shape:
        elements *= extent
    bits = DTYPE_BITS.get(dtype)
    if bits is not None and elements * bits != 8 * (end - begin):
        raise ValueError(f"tensor {name[:80]!r} of {dtype} {shape[:8]} has {end - begin} bytes")
    return dtype, tuple(shape), begin, end


def _wrong_length(file: Path, expected_bytes: int, found_bytes: int) -> FormatError:
    return FormatError(
        file,
        "truncated file" if found_bytes < expected_bytes else "file longer than its header says",
        expected=f"{expected_bytes} bytes",
        found=f"{found_bytes} bytes",
        remedy=_AGAIN,
    )


def _first_names(names: Iterable[str], limit: int = 3) -> str:
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
