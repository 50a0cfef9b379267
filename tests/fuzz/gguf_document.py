"""GGUF files as documents: metadata and directory as a tree, written as well as its values allow."""

from __future__ import annotations

import pickle
import random
import struct
from collections.abc import Sequence
from typing import Any

from kt_sft.formats.ggml_types import GGML_TYPES
from tests.fuzz import blobs, trees

_LAYOUTS = dict(enumerate(("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<B"))) | {10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_KINDS = (*range(14), 255, 2**31)
_TYPES = (*sorted(kind.number for kind in GGML_TYPES.values()), 4, 5, 31, 32, 38, 99, 2**31)
_SIZES = (0, 1, 2, 31, 32, 33, 63, 64, 65, 255, 256, 257, 512, 2**31, 2**32, 2**40, 2**63, 2**64 - 1)


class Gguf:
    """A little endian file of version 3; `words` are further keys and values that mean something to the reader."""

    def __init__(self, good: bytes, words: Sequence[Any] = ()):
        self.good = good
        tree, data, near = parse(good)
        self._pickled, self._data, self._near = pickle.dumps(tree), data, near
        self.words = (*words, *(key for key, _, _ in tree["metadata"]), *(name for name, *_ in tree["tensors"]))

    def edited(self, edits: Sequence[random.Random]) -> bytes:
        tree, data, late, changed = pickle.loads(self._pickled), self._data, [], False
        for rng in edits:
            if rng.random() < 0.7:
                data = self._tree_edit(tree, data, rng)
                changed = True
            else:
                late.append(rng)
        whole = write(tree, data) if changed else self.good
        for rng in late:
            whole = blobs.edit(whole, rng, self._near)
        return whole

    def _tree_edit(self, tree: dict[str, Any], data: bytes, rng: random.Random) -> bytes:
        """One edit of the tree; returns the tensors' bytes."""
        kind, metadata, tensors = rng.randrange(16), tree["metadata"], tree["tensors"]
        if kind < 6 and metadata:
            entry = rng.choice(metadata)
            what = rng.randrange(6)
            if what == 0:
                entry[0] = rng.choice((*(w for w in self.words if isinstance(w, str)), *trees.TEXTS))
            elif what == 1:
                entry[1] = rng.choice(_KINDS)
            else:
                entry[2] = trees.edit(entry[2], rng, self.words)
        elif kind == 6 and metadata:
            metadata.remove(rng.choice(metadata))
        elif kind == 7:
            entry = (
                [rng.choice(trees.TEXTS), *rng.choice(_VALUES)] if rng.random() < 0.5 else _copy(rng.choice(metadata))
            )
            metadata.insert(rng.randrange(len(metadata) + 1), entry)
        elif kind < 12 and tensors:
            self._tensor_edit(rng.choice(tensors), tensors, rng)
        elif kind == 12 and tensors:
            tensor = rng.choice(tensors)
            tensors.remove(tensor)
        elif kind == 13:
            rng.shuffle(tensors if rng.random() < 0.5 else metadata)
        elif kind == 14:
            tree["counts"][rng.randrange(2)] += rng.choice((1, -1, 2**20, 2**31, 2**62))
        else:
            tree["version"] = rng.choice((0, 1, 2, 3, 4, 0x03000000, 2**32 - 1))
        return data if rng.random() < 0.95 else blobs.edit(data, rng)

    def _tensor_edit(self, tensor: list[Any], tensors: list[list[Any]], rng: random.Random) -> None:
        what = rng.randrange(8)
        if what == 0:
            tensor[0] = rng.choice((*(w for w in self.words if isinstance(w, str)), *trees.TEXTS))
        elif what == 1:
            tensor[2] = rng.choice(_TYPES)
        elif what == 2:
            rng.shuffle(tensor[1])
        elif what == 3 and tensor[1]:
            tensor[1][rng.randrange(len(tensor[1]))] = rng.choice(_SIZES)
        elif what == 4:
            tensor[1].insert(rng.randrange(len(tensor[1]) + 1), rng.choice((1, 1, *_SIZES)))
        elif what == 5:
            tensor[3] = rng.choice((tensor[3] + 32, tensor[3] - 32, tensor[3] + 1, 0, *_SIZES))
        elif what == 6:
            other = rng.choice(tensors)
            tensor[3], other[3] = other[3], tensor[3]
        else:
            tensors.append([rng.choice((tensor[0], "new", "")), *_copy(tensor)[1:]])


_VALUES: tuple[tuple[int, Any], ...] = (
    (0, 255), (4, 2**32 - 1), (5, -1), (6, float("nan")), (7, 1), (8, "x"), (8, ""), (9, [8, ["a", "b"]]),
    (9, [4, [1, 2]]), (9, [7, [0, 1]]), (9, [9, [[4, [1]], [4, [2]]]]), (9, [4, []]), (10, 2**64 - 1), (12, 1e308),
)  # fmt: skip


def _copy(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def parse(data: bytes) -> tuple[dict[str, Any], bytes, list[int]]:
    """Tree, bytes behind the header, and places of the numbers of a good file, read step by step.

    Metadata is `[key, kind, value]`, an array's value `[kind, values]`; tensors are `[name, extents as stored, type
    number, offset]`.
    """
    at, near = 24, [0, 4, 8, 16]

    def number(layout: str) -> Any:
        nonlocal at
        near.append(at)
        value = struct.unpack_from(layout, data, at)[0]
        at += struct.calcsize(layout)
        return value

    def text() -> str:
        nonlocal at
        length = number("<Q")
        at += length
        return data[at - length : at].decode("utf-8", "replace")

    def value_of(kind: int) -> Any:
        if kind == _STRING:
            return text()
        if kind != _ARRAY:
            return number(_LAYOUTS[kind])
        inner = number("<I")
        return [inner, [value_of(inner) for _ in range(number("<Q"))]]

    version, num_tensors, num_keys = struct.unpack_from("<IQQ", data, 4)
    metadata = [[text(), kind := number("<I"), value_of(kind)] for _ in range(num_keys)]
    tensors = [
        [text(), [number("<Q") for _ in range(number("<I"))], number("<I"), number("<Q")] for _ in range(num_tensors)
    ]
    alignment = next((value for key, _, value in metadata if key == "general.alignment"), 32)
    start = -(-at // alignment) * alignment
    tree = {"version": version, "counts": [0, 0], "metadata": metadata, "tensors": tensors}
    return tree, data[start:], near


def write(tree: dict[str, Any], data: bytes) -> bytes:
    """The file of a tree; `counts` are added to the numbers of entries."""
    tensors, metadata = tree["tensors"], tree["metadata"]
    counts = [(len(part) + more) % 2**64 for part, more in zip((tensors, metadata), tree["counts"])]
    out = bytearray(b"GGUF" + struct.pack("<IQQ", tree["version"], *counts))
    for key, kind, value in metadata:
        out += _text(key) + struct.pack("<I", kind) + _value(kind, value, 0)
    for name, extents, number, offset in tensors:
        out += _text(name) + struct.pack("<I", len(extents))
        out += b"".join(struct.pack("<Q", extent % 2**64) for extent in extents)
        out += struct.pack("<IQ", number, offset % 2**64)
    alignment = next(
        (v for key, _, v in metadata if key == "general.alignment" and type(v) is int and 0 < v < 2**16), 32
    )
    return bytes(out) + b"\0" * (-len(out) % alignment) + data


def _text(value: Any) -> bytes:
    raw = (value.text if isinstance(value, trees.Raw) else str(value)).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def _value(kind: int, value: Any, depth: int) -> bytes:
    """A value as its kind stores it, or some bytes of that width."""
    if kind == _STRING:
        return _text(value)
    if kind == _ARRAY:
        is_array = isinstance(value, list) and len(value) == 2 and type(value[0]) is int and isinstance(value[1], list)
        inner, values = value if is_array else (4, value if isinstance(value, list) else [value])
        if depth == 6:
            return struct.pack("<IQ", 4, 0)
        body = b"".join(_value(inner, each, depth + 1) for each in values)
        return struct.pack("<IQ", inner % 2**32, len(values)) + body
    layout = _LAYOUTS.get(kind, "<I")
    try:
        if layout in ("<f", "<d"):
            return struct.pack(layout, float(value))
        bits = 8 * struct.calcsize(layout)
        return (int(value) % (1 << bits)).to_bytes(bits // 8, "little")
    except (TypeError, ValueError, OverflowError):
        return struct.pack(layout, 1)
