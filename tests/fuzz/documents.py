"""Files that can be damaged with regard to what is in them: JSON, YAML, safetensors, torch archives, plain bytes.

A document has its good bytes and makes damaged ones; each edit has a generator of its own, so that leaving one out
leaves the others as they are. What an edit does to the structure comes before what others do to the bytes.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
import random
import struct
import warnings
import zipfile
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import yaml

from tests.fuzz import blobs, trees


class Document(Protocol):
    """Bytes of a file, and damaged ones."""

    good: bytes

    def edited(self, edits: Sequence[random.Random]) -> bytes:
        """The bytes after one edit by each generator."""
        ...


class Plain:
    """Bytes without a structure; `near`: places of numbers that lead far when they lie."""

    def __init__(self, good: bytes, near: Sequence[int] = ()):
        self.good, self.near = good, near

    def edited(self, edits: Sequence[random.Random]) -> bytes:
        data = self.good
        for rng in edits:
            data = blobs.edit(data, rng, self.near)
        return data


class Json:
    """JSON text.

    Args:
        words: values and keys that mean something to the reader.
        finish: what is done to the tree after all edits, to get past a check such as a checksum.
    """

    def __init__(self, good: bytes, words: Sequence[Any] = (), finish: Callable[[Any], Any] | None = None):
        self.good, self.words, self.finish = good, words, finish
        self._pickled = pickle.dumps(json.loads(good))

    def edited(self, edits: Sequence[random.Random]) -> bytes:
        tree, late = pickle.loads(self._pickled), []
        for rng in edits:
            if rng.random() < 0.85:
                tree = trees.edit(tree, rng, self.words)
            else:
                late.append(rng)
        data = (
            self.good if len(late) == len(edits) else trees.dumps(self.finish(tree) if self.finish else tree, edits[0])
        )
        for rng in late:
            data = _text_edit(data, rng)
        return data


class Lines:
    """JSON texts one a line, as in a journal."""

    def __init__(self, good: bytes, words: Sequence[Any] = ()):
        self.good = good
        self._lines = [Json(line, words) for line in good.split(b"\n") if line]

    def edited(self, edits: Sequence[random.Random]) -> bytes:
        lines = [line.good for line in self._lines]
        for rng in edits:
            kind, at = rng.randrange(8), rng.randrange(len(lines) or 1)
            if kind < 4 and at < len(self._lines):
                lines[at : at + 1] = [self._lines[at].edited([rng])]
            elif kind == 4:
                del lines[at:]
            elif kind == 5:
                lines.insert(at, rng.choice(lines) if lines else b"")
            elif kind == 6:
                rng.shuffle(lines)
            else:
                return blobs.edit(b"\n".join(lines) + b"\n", rng)
        return b"\n".join(lines) + b"\n"


_YAML_RAW = (
    "&a [*a]", "*a", "*b", "<<: *a", "!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!x y",
    "!!int a",
    "!!python/object/new:tests.fuzz.tripwire.spring []", "!!binary '&&&'", "!!binary =", "!!timestamp 2001-99-99",
    "!!float x",
    "!!set {a, b}", "!!omap [a: 1, a: 2]", "!!pairs [1, 2]", "2001-02-30", "2001-12-14t21:59:43.10-05:00",
    "2001-02-30 25:61:61",
    "9999-12-31T23:59:59+99:99", "0o17", "0b1", "0x", "1_0", "190:20:30", ".inf", "-.INF", ".nan", "~", "y", "Off", "|",
    ">-",
    "| \n  a", "? a", "- -", "%TAG", "---", "...", "@", "`", "\t", "'", '"\\x"', '"\\U00110000"', "[a, b", "{a: b",
    "{? a}",
    "{[a]: 1}", "{{a: 1}: 2}", "!!null x", "!!bool 2", "!!str", "!!map []", "!!seq {}", "!<tag:yaml.org,2002:int> 1.5",
    "=",
)  # fmt: skip


class Yaml:
    """YAML text: edited as a tree, which is written as JSON is, or line by line."""

    def __init__(self, good: bytes, words: Sequence[Any] = ()):
        self.good, self.words = good, words
        self._pickled = pickle.dumps(yaml.safe_load(good))

    def edited(self, edits: Sequence[random.Random]) -> bytes:
        data = self.good
        first, *rest = edits
        if first.random() < 0.6:
            tree = pickle.loads(self._pickled)
            for rng in edits:
                tree = trees.edit(tree, rng, self.words, (*_YAML_RAW, *trees.RAW))
            return trees.dumps(tree, first)
        for rng in edits:
            data = self._line_edit(data, rng)
        return data

    def _line_edit(self, data: bytes, rng: random.Random) -> bytes:
        lines = data.decode("utf-8", "surrogateescape").split("\n")
        at, kind = rng.randrange(len(lines)), rng.randrange(9)
        raw = rng.choice(_YAML_RAW)
        if kind < 3:
            key, colon, _ = lines[at].partition(":")
            lines[at] = f"{key}{colon} {raw}" if colon else f"- {raw}"
        elif kind == 3:
            lines.insert(at, rng.choice(lines))
        elif kind == 4:
            lines[at] = rng.choice((" ", "   ", "\t", "- ", "? ", "# ", "&a ", "*a ", "!!x ", "<<: ")) + lines[at]
        elif kind == 5:
            del lines[at]
        elif kind == 6:
            lines.insert(at, raw)
        elif kind == 7:
            lines[at:at] = rng.choice(_YAML_LARGE)(rng)
        else:
            return _text_edit(data, rng)
        return "\n".join(lines).encode("utf-8", "surrogateescape")


def _doubling(rng: random.Random) -> list[str]:
    """Aliases that double: a few lines that stand for 2^n values."""
    lines = ["x0: &x0 [a, a]"]
    return lines + [f"x{n}: &x{n} [*x{n - 1}, *x{n - 1}]" for n in range(1, rng.choice((3, 15, 30)))]


def _merging(rng: random.Random) -> list[str]:
    """The same by merge keys."""
    lines = ["m0: &m0 {a: 1}"]
    return lines + [f"m{n}: &m{n} {{<<: [*m{n - 1}, *m{n - 1}]}}" for n in range(1, rng.choice((3, 12, 18)))]


_YAML_LARGE: tuple[Callable[[random.Random], list[str]], ...] = (
    _doubling,
    _merging,
    lambda rng: [f"key{n}: {n}" for n in range(rng.choice((10, 300, 3000)))],
    lambda rng: ["deep: " + "[" * rng.choice((10, 90, 900)) + "1" + "]" * 10],
    lambda rng: ["a:\n" + "".join(" " * n + f"b{n}:\n" for n in range(1, rng.choice((5, 60, 200))))],
    lambda rng: ["- " * rng.choice((10, 100, 900)) + "x"],
    lambda rng: [f"long: {'x' * rng.choice((100, 10_000))}"],
)


class Tensors:
    """A safetensors file: its header as a tree, laid out anew where that is asked for, and the bytes of all."""

    def __init__(self, good: bytes, words: Sequence[Any] = ()):
        self.good = good
        length = struct.unpack("<Q", good[:8])[0]
        header = json.loads(good[8 : 8 + length])
        self._data = good[8 + length :]
        self._near = (*range(8), 8, length, 8 + length)
        self._pickled = pickle.dumps(header)
        self.words = ("dtype", "shape", "data_offsets", "__metadata__", *_DTYPES, *header, *words, len(self._data))

    def edited(self, edits: Sequence[random.Random]) -> bytes:
        header, data, late = pickle.loads(self._pickled), self._data, []
        changed = False
        for rng in edits:
            kind = rng.random()
            if kind < 0.45:
                header, changed = trees.edit(header, rng, self.words), True
            elif kind < 0.75:
                header, data = self._laid_out(header, data, rng)
                changed = True
            else:
                late.append(rng)
        whole = self.good
        if changed:
            text = trees.dumps(header, edits[0])
            text += b" " * (-len(text) % 8)
            whole = struct.pack("<Q", len(text)) + text + data
        for rng in late:
            whole = blobs.edit(whole, rng, self._near)
        return whole

    def _laid_out(self, header: Any, data: bytes, rng: random.Random) -> tuple[Any, bytes]:
        """An edit after which the file is often still one: other order, shapes, types, names, sizes, gaps."""
        names = [name for name in header if _is_entry(header[name])] if isinstance(header, dict) else []
        if not names:
            return header, data
        kind, name = rng.randrange(10), rng.choice(names)
        entry = header[name]
        if kind == 0:  # another order of the entries
            order = list(header)
            rng.shuffle(order)
            return {each: header[each] for each in order}, data
        if kind == 1:
            rng.shuffle(entry["shape"])
        elif kind == 2:
            entry["shape"] = [_product(entry["shape"])] if rng.random() < 0.5 else [1, *entry["shape"]]
        elif kind == 3:
            entry["dtype"] = rng.choice(_DTYPES)
        elif kind == 4:  # one tensor less, its bytes gone
            begin, end = entry["data_offsets"]
            return _moved({k: v for k, v in header.items() if k != name}, end, begin - end), data[:begin] + data[end:]
        elif kind == 5:  # bytes between two tensors
            end, gap = entry["data_offsets"][1], rng.choice((1, 8, 64))
            return _moved(header, end, gap), data[:end] + b"\0" * gap + data[end:]
        elif kind == 6:  # an empty tensor, or one more
            shape = rng.choice(([0], [0, 3], [3, 0], [1 << 40, 0], [0] * 9, []))
            size = 4 if shape == [] else 0
            header[rng.choice((*self.words[-6:-1], "new", ""))] = {
                "dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + size],
            }  # fmt: skip
            return header, data + b"\0" * size
        elif kind == 7:
            header["__metadata__"] = rng.choice(({}, {"format": "pt"}, {"a": 1}, [], None, {"a": "b" * 1000}))
        elif kind == 8:
            other = header[rng.choice(names)]
            entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
        else:
            header[rng.choice((f"{name}.x", name.upper(), "x", *trees.TEXTS))] = header.pop(name)
        return header, data


_DTYPES = (
    "BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "U16", "I16", "F16", "BF16", "U32", "I32",
    "F32", "U64", "I64", "F64", "C64", "F4", "F6_E2M3", "f32", "F128", "",
)  # fmt: skip


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        return False
    offsets, shape = entry["data_offsets"], entry["shape"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not isinstance(shape, list):
        return False
    return all(type(number) is int and 0 <= number < 1 << 40 for number in (*offsets, *shape))


def _moved(header: dict[str, Any], since: int, by: int) -> dict[str, Any]:
    for entry in header.values():
        if _is_entry(entry) and entry["data_offsets"][0] >= since:
            entry["data_offsets"] = [number + by for number in entry["data_offsets"]]
    return header


def _product(shape: list[int]) -> int:
    product = 1
    for extent in shape:
        product *= extent
    return product


class TorchArchive:
    """What `torch.save` writes: objects in a pickle, tensors beside it, in a zip file."""

    def __init__(self, values: Any, words: Sequence[Any] = ()):
        self.values, self.words = values, words
        self.good = _saved(values)

    def edited(self, edits: Sequence[random.Random]) -> bytes:
        values, early, late = self.values, [], []
        for rng in edits:
            (early if rng.random() < 0.6 else late).append(rng)
        if early:
            values = copy.deepcopy(values)
            for rng in early:
                values = trees.edit(values, rng, (*self.words, *_odd_tensors()))
        whole = _saved(values) if early else self.good
        for rng in late:
            whole = blobs.edit(whole, rng) if rng.random() < 0.4 else _member_edit(whole, rng)
        return whole


# A pickle that calls what nobody should call: `tests.fuzz.tripwire` is imported, and says so.
_SPRINGS = b"ctests.fuzz.tripwire\nspring\n(tR."


def _odd_tensors() -> tuple[Any, ...]:
    import torch

    return (
        torch.zeros(0), torch.tensor(1.0), torch.full((2, 3), float("nan")), torch.ones(2, 3, dtype=torch.int64),
        torch.ones(3, 2, dtype=torch.complex64), torch.eye(2).to_sparse(), torch.ones(2, dtype=torch.bool), b"bytes",
        torch.ones(1).expand(2, 3), torch.ones(2, 3, dtype=torch.float64), torch.nn.Parameter(torch.ones(2, 3)), {1: 2},
        torch.ones(2, 3, dtype=torch.float8_e4m3fn), torch.zeros(2, 3, device="meta"), (1, 2), {1, 2},
    )  # fmt: skip


def _saved(values: Any) -> bytes:
    import torch

    stream = io.BytesIO()
    try:
        torch.save(_plain(values), stream)
    except (RuntimeError, TypeError, ValueError, RecursionError, pickle.PicklingError):
        return b""
    return stream.getvalue()


def _plain(values: Any) -> Any:
    """Without the marks that only text has."""
    if isinstance(values, trees.Raw):
        return values.text
    if type(values) is dict:
        return {key.replace("\x02", "") if isinstance(key, str) else key: _plain(v) for key, v in values.items()}
    return [_plain(value) for value in values] if type(values) is list else values


def _member_edit(data: bytes, rng: random.Random) -> bytes:
    """An edit of one file of an archive, whose checksums are right again."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, EOFError):
        return blobs.edit(data, rng)
    if not members:
        return data
    name = rng.choice([*members, *[each for each in members if each.endswith(".pkl")] * 3])
    kind = rng.randrange(6)
    if kind < 3:
        members[name] = blobs.edit(members[name], rng)
    elif kind == 3:
        del members[name]
    elif kind == 4:
        members[rng.choice((f"{name}x", "../x", "archive/data.pkl", "/x"))] = members.pop(name)
    else:
        members[name] = rng.choice([*members.values(), b"", _SPRINGS])
    stream = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w", rng.choice((0, 0, 8))) as archive:
        warnings.simplefilter("ignore")
        for each, content in members.items():
            archive.writestr(each, content)
    return stream.getvalue()


def _text_edit(data: bytes, rng: random.Random) -> bytes:
    """An edit of a text as a whole, or of its bytes."""
    kind = rng.randrange(12)
    if kind == 0:
        return b"\xef\xbb\xbf" + data
    if kind == 1:
        return data.decode("utf-8", "replace").encode(rng.choice(("utf-16", "utf-16-le", "utf-32", "utf-7")))
    if kind == 2:
        return rng.choice((b"", b" ", b"null", b"[]", b"{}", b"0", b'""', b"true", b"\0", b"\xff\xfe", b"NaN", b"\n"))
    if kind == 3:
        return data + data
    if kind == 4:
        return data + rng.choice((b",", b"}", b"\0", b"\xff", b"null", b"\n\n"))
    return blobs.edit(data, rng)
