"""JSON files that hold one object, read strictly: of a sane size and depth, UTF-8, no name twice, no NaN."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from kt_sft.errors import FormatError
from kt_sft.formats.regular_file import read_text

# An adapter_config.json that names each matrix of each expert, with ranks and alphas, has 10 MB.
MOST_BYTES = 16 << 20
MOST_DEPTH = 32


def read_object(
    path: str | os.PathLike[str],
    what: str = "file",
    *,
    most_bytes: int = MOST_BYTES,
    may_be_infinite: bool = False,
    remedy: str = "download or write it again",
) -> dict[str, Any]:
    """The JSON object of a file.

    Args:
        what: names it in messages.
        most_bytes: of a larger file nothing is read.
        may_be_infinite: `Infinity` is a number, as in ranges of some models' configurations.
    Raises:
        FormatError: no regular file, too large, or something else in it.
    """
    text = read_text(path, what, most_bytes, remedy=remedy)
    try:
        constant = _not_nan if may_be_infinite else _no_constant
        values = json.loads(text, object_pairs_hook=without_repeats, parse_constant=constant)
        if not isinstance(values, dict):
            raise ValueError(f"a JSON {type(values).__name__}")
        if is_deeper(values, MOST_DEPTH):
            raise ValueError(f"more than {MOST_DEPTH} levels")
    except (ValueError, RecursionError) as error:
        found = str(error)[:200] if isinstance(error, ValueError) else "levels without end"
        raise FormatError(path, what, expected="a JSON object", found=found, remedy=remedy) from None
    return values


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, for `object_pairs_hook`; ValueError where a name is there twice: readers would differ."""
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the name {twice[:80]!a} twice")
    return values


def is_deeper(value: Any, most: int) -> bool:
    """Whether mappings and lists lie in one another more than so many levels deep.

    Args:
        value: a mapping or a list.
    """
    level = [value]
    for _ in range(most):
        values = (inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer))
        level = [inner for inner in values if isinstance(inner, dict | list)]
        if not level:
            return False
    return True


def num_values(value: Any) -> int:
    """Keys, entries and values in mappings and lists, whatever their depth."""
    inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    return len(inner) + sum(num_values(entry) for entry in inner if isinstance(entry, dict | list))


def texts_of(value: Any) -> Iterator[str]:
    """Every text in mappings, their keys too, and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from texts_of(inner)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name}, which is no number of JSON")


def _not_nan(name: str) -> float:
    return _no_constant(name) if name == "NaN" else float(name)
