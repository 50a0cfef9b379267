"""Damage to JSON-like trees: one edit at a time, each from a random generator of its own.

A tree is what `json.loads` gives. Edits may put `Raw` text into it (what JSON has no value for: `1e999`, half a
number, a YAML tag) and keys that are there twice; `dumps` writes both.
"""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

# Around the limits of machine numbers, of our own checks, and of what a factor of four or eight makes of them.
NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 7, 8, 9, 15, 16, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 4095, 4096, 65535,
    65536, 2**15, 2**20, 2**24, 2**29, 2**31 - 1, 2**31,
    2**32 - 1, 2**32, 2**53, 2**53 + 1, 2**60, 2**61, 2**62, 2**63 - 1, 2**63,
    2**64 - 1, 2**64, 2**70, -(2**31), -(2**63), -(2**63) - 1, 10**30, 10**400, 0.0, -0.0, 0.5, 1.0, 1.5, -1.5,
    1e-45, 1e-320, 1e15, 1e16, 1e30, 1e38, 3.5e38, 1e308, -1e308, float("inf"), float("-inf"), float("nan"),
)  # fmt: skip
TEXTS: tuple[str, ...] = (
    "", " ", "0", "1", "-1", "1.0", "1e3", "nan", "inf", "true", "false", "yes", "no", "null", "None", "on", "auto",
    "a\nb", "\0", "a\0b", "\t", "\r\n", "\u2028", "\ud800", "\udfff", "\ufeff", "\ufffd", "é", "e\u0301", "𝔘", "１",
    "²", "..", ".", "/", "../x", "../../../../etc/passwd", "/dev/zero", "/dev/stdin", "/proc/self/mem", "~", "~root",
    "a/b", "a\\b", "model.safetensors", "config.json", "x" * 255, "x" * 256, "x" * 5000, "%s%n", "{x}", "${x}", "$(x)",
    "*", "(", "[", "\\", "(a+)+$", "(.*)*(.*)*(.*)*x", "(?P<a>", "^(?:a|aa)+$", "<|im_start|>", "__class__", "self",
    "tests.fuzz.tripwire", "tests.fuzz.tripwire.spring", "os.system", "cpu", "cuda", "cuda:99", "meta", "2001-13-45",
)  # fmt: skip
# Written as they stand, where a value was.
RAW: tuple[str, ...] = (
    "1e999", "-1e999", "NaN", "-Infinity", "01", "1.", ".5", "+1", "0x10", "1_000", "1" * 300, "1" * 5000, "'a'", "",
    "undefined", "True", '"\\ud800"', '"\\u0000"', '"\\x41"', '"a', "]", "}", "{", "[", ",", ":", "//", "/**/", "\x00",
    "[" * 100 + "]" * 100, "[" * 3000 + "]" * 3000, "[" * 100_000, '{"a":' * 3000 + "1" + "}" * 3000, "\ufeff", "-",
)  # fmt: skip


class Raw:
    """Text that stands in the file as it is."""

    def __init__(self, text: str):
        self.text = text


def edit(tree: Any, rng: random.Random, words: Sequence[Any] = (), raw: Sequence[str] = RAW) -> Any:
    """The tree, changed in place where it can be, after one edit.

    Args:
        words: values and keys that mean something to the reader.
    """
    parent, key = _place(tree, rng)
    if parent is None:
        return _value(tree, rng, words, raw)
    rng.choice(_EDITS)(parent, key, tree, rng, words, raw)
    return tree


def dumps(tree: Any, rng: random.Random | None = None) -> bytes:
    """The text of a tree with all that edits put into it."""
    found: list[str] = []

    def stand_in(value: Any) -> str:
        assert isinstance(value, Raw)
        found.append(value.text)
        return f"\x01{len(found) - 1}\x01"

    try:
        text = json.dumps(tree, default=stand_in, ensure_ascii=rng is None or rng.random() < 0.7)
    except RecursionError:
        text = "[" * 2000 + "]" * 2000
    text = re.sub(r'"\\u0001(\d+)\\u0001"', lambda mark: found[int(mark[1])], text)
    if "\\u0002" in text:  # keys that are there twice
        for index in range(_MOST_TWINS):
            text = text.replace(f"\\u0002{index}", "")
    return text.encode("utf-8", "surrogatepass")


_MOST_TWINS = 20
_MOST_VALUES = 100_000


def _place(tree: Any, rng: random.Random) -> tuple[Any, Any]:
    """A container and one of its keys, anywhere; (None, None) for the tree itself."""
    if rng.random() < 0.02 or not isinstance(tree, dict | list) or not tree:
        return None, None
    place = tree
    while True:
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.25:
            return place, key
        place = inner


def _value(old: Any, rng: random.Random, words: Sequence[Any], raw: Sequence[str]) -> Any:
    """Something else for a value."""
    kind = rng.randrange(12)
    if kind < 4 and words:
        return _copied(rng.choice(words))
    if kind < 6:
        return rng.choice(NUMBERS)
    if kind == 6:
        return rng.choice(TEXTS)
    if kind == 7:
        return rng.choice((None, True, False, [], {}, [[]], [None], {"": None}, {"a": {}}, [1, "a"], ["a"] * 300))
    if kind == 8:
        return Raw(rng.choice(raw))
    if kind == 9:
        return rng.choice((rng.randrange(-(2**66), 2**66), rng.random() * 10 ** rng.randrange(-320, 309)))
    return _disguised(old, rng)


def _disguised(old: Any, rng: random.Random) -> Any:
    """The same value as another type, or one beside it."""
    kind = rng.randrange(6)
    if kind == 0:
        return [old]
    if kind == 1:
        return {"": old} if rng.random() < 0.5 else {"type": old}
    if kind == 2:
        return old if isinstance(old, dict | list) else str(old)
    if isinstance(old, bool):
        return rng.choice((int(old), str(old), not old, float(old)))
    if isinstance(old, int | float):
        choices: tuple[Callable[[Any], Any], ...] = (
            lambda v: v + 1, lambda v: v - 1, lambda v: -v, lambda v: v * 2, lambda v: v * 1000, lambda v: v << 32,
            lambda v: float(v), lambda v: v + 0.5, lambda v: bool(v), lambda v: v // 2, lambda v: 1 / v,
            lambda v: str(v),
        )  # fmt: skip
        try:
            return rng.choice(choices)(old)
        except (TypeError, ArithmeticError):
            return -1
    if isinstance(old, str):
        at = rng.randrange(len(old) + 1)
        texts: tuple[Callable[[], str], ...] = (
            lambda: old[:at], lambda: old[at:], lambda: old.upper(), lambda: old.swapcase(), lambda: old + " ",
            lambda: old[:at] + rng.choice(TEXTS) + old[at:], lambda: old * 2, lambda: old[::-1],
            lambda: old * (3000 if len(old) < 100 else 1),
            lambda: f"./{old}", lambda: f"../{old}", lambda: old + ".", lambda: old.replace(".", "/"),
        )  # fmt: skip
        return rng.choice(texts)()
    if isinstance(old, list):
        lists: tuple[Callable[[], Any], ...] = (
            lambda: old[:-1], lambda: old + old, lambda: old[::-1], lambda: [*old, None], lambda: old * 1000,
            lambda: dict.fromkeys(map(str, range(len(old)))), lambda: (old or [0])[0],
            lambda: [*old, rng.choice(NUMBERS)],
        )  # fmt: skip
        make = rng.choice(lists)
        return _copied(make()) if _size(old) * 1000 <= _MOST_VALUES else old[:1]
    if isinstance(old, dict):
        return list(old.values()) if rng.random() < 0.5 else list(old)
    return rng.choice(NUMBERS)


def _replace(parent: Any, key: Any, tree: Any, rng: random.Random, words: Sequence[Any], raw: Sequence[str]) -> None:
    parent[key] = _value(parent[key], rng, words, raw)


def _delete(parent: Any, key: Any, tree: Any, rng: random.Random, words: Sequence[Any], raw: Sequence[str]) -> None:
    del parent[key]


def _swap(parent: Any, key: Any, tree: Any, rng: random.Random, words: Sequence[Any], raw: Sequence[str]) -> None:
    other, at = _place(tree, rng)
    if other is not None and not _holds(parent[key], other) and not _holds(other[at], parent):
        parent[key], other[at] = other[at], parent[key]


def _copy(parent: Any, key: Any, tree: Any, rng: random.Random, words: Sequence[Any], raw: Sequence[str]) -> None:
    other, at = _place(tree, rng)
    if other is not None:
        parent[key] = _copied(other[at])


def _insert(parent: Any, key: Any, tree: Any, rng: random.Random, words: Sequence[Any], raw: Sequence[str]) -> None:
    value = _value(parent[key], rng, words, raw)
    if isinstance(parent, list):
        parent.insert(key, value)
    else:
        names = [word for word in words if isinstance(word, str)]
        parent[rng.choice(names) if names and rng.random() < 0.7 else rng.choice(TEXTS)] = value


def _twice(parent: Any, key: Any, tree: Any, rng: random.Random, words: Sequence[Any], raw: Sequence[str]) -> None:
    value = _copied(parent[key]) if rng.random() < 0.3 else _value(parent[key], rng, words, raw)
    if isinstance(parent, list):
        parent.insert(rng.randrange(len(parent) + 1), value)
    else:
        parent[f"{key}\x02{rng.randrange(_MOST_TWINS)}"] = value


def _rename(parent: Any, key: Any, tree: Any, rng: random.Random, words: Sequence[Any], raw: Sequence[str]) -> None:
    if isinstance(parent, list):
        parent.reverse()
        return
    renamed = _disguised(str(key), rng)
    parent[renamed if isinstance(renamed, str) else rng.choice(TEXTS)] = parent.pop(key)


def _deepen(parent: Any, key: Any, tree: Any, rng: random.Random, words: Sequence[Any], raw: Sequence[str]) -> None:
    for _ in range(rng.choice((1, 2, 5, 40, 300))):
        parent[key] = [parent[key]] if rng.random() < 0.5 else {"a": parent[key]}


def _widen(parent: Any, key: Any, tree: Any, rng: random.Random, words: Sequence[Any], raw: Sequence[str]) -> None:
    count = rng.choice((2, 10, 100, 1000))
    if _size(parent[key]) * count > _MOST_VALUES:
        return
    if isinstance(parent, dict):
        for number in range(count):
            parent[f"{key}{number}"] = parent[key]
    else:
        parent[key:key] = [parent[key]] * count


def _size(tree: Any, most: int = _MOST_VALUES) -> int:
    """Values in a tree, counted up to `most`: edits of edits would make trees that take minutes to write."""
    found, waiting = 0, [tree]
    while waiting and found < most:
        inner = waiting.pop()
        found += 1 + len(inner) // 8 if isinstance(inner, str | dict) else 1
        waiting.extend(inner.values() if isinstance(inner, dict) else inner if isinstance(inner, list) else ())
    return found


def _copied(tree: Any) -> Any:
    try:
        return copy.deepcopy(tree)
    except RecursionError:
        return None


def _holds(tree: Any, wanted: Any) -> bool:
    if tree is wanted:
        return True
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return any(_holds(each, wanted) for each in inner)


_EDITS = (
    *(_replace,) * 9, _delete, _delete, _swap, _copy, _insert, _insert, _twice, _rename, _deepen, _widen,
)  # fmt: skip
