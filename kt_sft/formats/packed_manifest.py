"""The manifest of a packed container: what it may say, as dataclasses, and the strict way from JSON to them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kt_sft.errors import FormatError
from kt_sft.formats.json_object import without_repeats

FORMAT_NAME = "kt_sft packed experts"
FORMAT_VERSION = 1
LAYOUT_ID = "tiles16-panels32/1"  # of native/include/kts/packed.h
SOURCE_HASH = "sha256 of size and content; above 16 MiB first MiB, 64 times 16 KiB, last MiB"
HEADER_BYTES = 4096  # before the blobs of a file; keeps them aligned to pages
ALIGNMENT = 64
PROJECTIONS = ("gate", "up", "down")
FORMATS = ("bf16", "int8", "int4")
INT4_GROUPS = (32, 64, 128)
CONVERT_AGAIN = "convert the checkpoint again (kt-sft convert --overwrite)"

_MAX_SIDE = 1 << 15  # of the kernels
_FILE_NAME = re.compile(r"layer-[0-9]{5}\.bin")
_KINDS = {str: "text", int: "a whole number", list: "a list", dict: "an object"}


@dataclass(frozen=True)
class Blob:
    """One matrix: `[offset, offset + size)` of its layer's file, its CRC-32, and rel-L2 of its rounding."""

    offset: int
    size: int
    crc32: int
    error: float


@dataclass(frozen=True)
class PackedLayer:
    """The experts of one module; `experts[e]` are its gate, up and down."""

    name: str
    num_experts: int
    hidden: int
    inter: int
    activation: str
    file: str
    file_bytes: int
    experts: tuple[tuple[Blob, Blob, Blob], ...]

    def to_json(self) -> dict[str, Any]:
        """The entry of the manifest and of the journal."""
        values = {key: value for key, value in vars(self).items() if key != "experts"}
        rows = [[[b.offset, b.size, b.crc32, b.error] for b in blobs] for blobs in self.experts]
        return {**values, "experts": rows}


@dataclass(frozen=True)
class SourceFile:
    """A file that the experts came from; `Manifest.source_hash` says what the digest is."""

    name: str
    size: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """What a container says about itself; `layers` by module name, in the order of the model."""

    identity: str
    format: str
    group: int
    model_type: str
    source_formats: tuple[str, ...]
    source_files: tuple[SourceFile, ...]
    layers: Mapping[str, PackedLayer]
    source_hash: str = SOURCE_HASH

    def dumps(self) -> bytes:
        """The bytes of manifest.json."""
        body = {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "layout": LAYOUT_ID,
            "id": self.identity,
            "weights": {"format": self.format, "group": self.group},
            "model_type": self.model_type,
            "source": {
                "formats": list(self.source_formats),
                "hash": self.source_hash,
                "files": [[file.name, file.size, file.digest] for file in self.source_files],
            },
            "layers": [layer.to_json() for layer in self.layers.values()],
        }
        return json.dumps({**body, "checksum": _checksum(body)}, allow_nan=False).encode() + b"\n"

    def errors(self) -> dict[str, tuple[float, float]]:
        """Root mean square and largest rel-L2 of the rounding, by projection."""
        table = {}
        for index, projection in enumerate(PROJECTIONS):
            values = [blobs[index].error for layer in self.layers.values() for blobs in layer.experts]
            table[projection] = ((sum(v * v for v in values) / len(values)) ** 0.5, max(values))
        return table

    @property
    def blob_bytes(self) -> int:
        """Of all blob files."""
        return sum(layer.file_bytes for layer in self.layers.values())


def packed_bytes(format: str, group: int, n: int, k: int) -> int:
    """Bytes of one packed matrix `[n, k]`: native/include/kts/packed.h, in Python for those who only read files."""
    rows = _align(n, 32)
    if format == "bf16":
        return rows * _align(k, 32) * 2
    if format == "int8":
        return rows * _align(k, 64) + 2 * _align(rows * 4, ALIGNMENT)
    return rows * _align(k, 64) // 2 + _align(rows * -(-k // group) * 2, ALIGNMENT)


def blob_sizes(format: str, group: int, hidden: int, inter: int) -> tuple[int, int, int]:
    """Bytes of one expert's gate, up and down."""
    into = packed_bytes(format, group, inter, hidden)
    return into, into, packed_bytes(format, group, hidden, inter)


def parse_manifest(text: bytes, path: Path) -> Manifest:
    """Check the content of a manifest.

    Raises:
        FormatError: damaged, another version or layout, or at odds with itself.
    """
    try:
        values = json.loads(text, object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as error:
        raise FormatError(path, "manifest", expected="JSON", found=f"{error}", remedy=CONVERT_AGAIN) from None
    return _Parser(path).manifest(values)


def parse_layer(values: Any, path: Path, format: str, group: int) -> PackedLayer:
    """Check one layer's entry, as `PackedLayer.to_json` gave it.

    Raises:
        FormatError: it is not one.
    """
    return _Parser(path).layer(values, "", format, group)


class _Parser:
    """From plain JSON values to checked ones; every fault names the place in the manifest."""

    def __init__(self, path: Path):
        self.path = path

    def fault(self, what: str, expected: object, found: object, remedy: str = CONVERT_AGAIN) -> FormatError:
        text = found if isinstance(found, str) and len(found) <= 80 and found.isprintable() else repr(found)[:80]
        return FormatError(self.path, what, expected=expected, found=text, remedy=remedy)

    def get(self, values: Any, key: str, kind: type, what: str) -> Any:
        if not isinstance(values, dict) or type(values.get(key)) is not kind:
            found = values.get(key, "nothing") if isinstance(values, dict) else values
            raise self.fault(f"{what}{key}", _KINDS[kind], found)
        return values[key]

    def manifest(self, values: Any) -> Manifest:
        newer = "use a newer kt_sft, or convert the checkpoint again"
        for key, wanted in (("format", FORMAT_NAME), ("version", FORMAT_VERSION), ("layout", LAYOUT_ID)):
            if (found := self.get(values, key, type(wanted), "")) != wanted:
                raise self.fault(key, wanted, found, newer)
        body = {key: value for key, value in values.items() if key != "checksum"}
        if self.get(values, "checksum", str, "") != _checksum(body):
            raise self.fault("checksum", "that of the manifest's content", "another: the manifest is damaged")
        weights, source = self.get(values, "weights", dict, ""), self.get(values, "source", dict, "")
        format, group = self.weights(weights)
        layers: dict[str, PackedLayer] = {}
        files: set[str] = set()
        for index, entry in enumerate(self.get(values, "layers", list, "")):
            layer = self.layer(entry, f"layers[{index}].", format, group)
            if layer.name in layers or layer.file in files:
                again = f"{layer.name} in {layer.file} again"
                raise self.fault(f"layers[{index}]", "a layer and a file of its own", again)
            layers[layer.name] = layer
            files.add(layer.file)
        if not layers:
            raise self.fault("layers", "at least one", "none")
        formats = self.get(source, "formats", list, "source.")
        if not all(isinstance(name, str) for name in formats):
            raise self.fault("source.formats", "names", formats)
        return Manifest(
            identity=self.get(values, "id", str, ""),
            format=format,
            group=group,
            model_type=self.get(values, "model_type", str, ""),
            source_formats=tuple(formats),
            source_files=tuple(self.source_file(row) for row in self.get(source, "files", list, "source.")),
            layers=layers,
            source_hash=self.get(source, "hash", str, "source."),
        )

    def weights(self, values: dict[str, Any]) -> tuple[str, int]:
        format, group = self.get(values, "format", str, "weights."), self.get(values, "group", int, "weights.")
        if format not in FORMATS:
            raise self.fault("weights.format", f"one of {', '.join(FORMATS)}", format)
        if group not in (INT4_GROUPS if format == "int4" else (0,)):
            raise self.fault("weights.group", "32, 64 or 128 for int4, 0 for others", group)
        return format, group

    def source_file(self, row: Any) -> SourceFile:
        if not isinstance(row, list) or [type(value) for value in row] != [str, int, str]:
            raise self.fault("source.files", "[name, size, digest]", row)
        return SourceFile(*row)

    def layer(self, entry: Any, what: str, format: str, group: int) -> PackedLayer:
        texts = {key: self.get(entry, key, str, what) for key in ("name", "activation", "file")}
        numbers = {key: self.get(entry, key, int, what) for key in ("num_experts", "hidden", "inter", "file_bytes")}
        if not _FILE_NAME.fullmatch(texts["file"]):
            raise self.fault(f"{what}file", "a name such as layer-00000.bin", texts["file"])
        for key in ("num_experts", "hidden", "inter"):
            if not 1 <= numbers[key] <= _MAX_SIDE:
                raise self.fault(f"{what}{key}", f"1 to {_MAX_SIDE}", numbers[key])
        rows = self.get(entry, "experts", list, what)
        if len(rows) != numbers["num_experts"]:
            raise self.fault(f"{what}experts", f"{numbers['num_experts']} entries", len(rows))
        sizes = blob_sizes(format, group, numbers["hidden"], numbers["inter"])
        end, experts = HEADER_BYTES, []
        for index, row in enumerate(rows):
            blobs, end = self.expert(row, f"{what}experts[{index}]", sizes, end)
            experts.append(blobs)
        if end != numbers["file_bytes"]:
            raise self.fault(f"{what}file_bytes", end, numbers["file_bytes"])
        return PackedLayer(**texts, **numbers, experts=tuple(experts))

    def expert(
        self, row: Any, what: str, sizes: tuple[int, int, int], begin: int
    ) -> tuple[tuple[Blob, Blob, Blob], int]:
        """Three blobs, one after the other from `begin` on, and where they end."""
        if not isinstance(row, list) or len(row) != 3:
            raise self.fault(what, "gate, up and down", row)
        blobs = []
        for projection, values, size in zip(PROJECTIONS, row, sizes):
            kinds = [type(value) for value in values] if isinstance(values, list) else []
            if kinds not in ([int] * 4, [int, int, int, float]) or not 0 <= values[3] < 1e30:
                raise self.fault(f"{what} {projection}", "[offset, size, CRC-32, error]", values)
            if values[0] != begin or values[1] != size:
                raise self.fault(
                    f"{what} {projection}", f"{size} bytes at {begin}", f"{values[1]} bytes at {values[0]}"
                )
            blobs.append(Blob(values[0], values[1], values[2], float(values[3])))
            begin += size
        gate, up, down = blobs
        return (gate, up, down), begin


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _align(value: int, unit: int) -> int:
    return -(-value // unit) * unit
