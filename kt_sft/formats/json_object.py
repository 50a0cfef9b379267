"""JSON files that hold one object, read strictly: of a sane size, UTF-8, no name twice, no NaN and no Infinity."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from kt_sft.errors import FormatError
from kt_sft.formats.regular_file import open_regular

# An adapter_config.json that names each matrix of each expert has 3 MB.
_MAX_BYTES = 8 << 20


def read_object(path: Path) -> dict[str, Any]:
    """Values of a JSON file.

    Raises:
        FormatError: no regular file, too large, damaged, or no JSON object.
    """
    with os.fdopen(open_regular(path, "file"), "rb") as stream:
        raw = stream.read(_MAX_BYTES + 1)
    if len(raw) > _MAX_BYTES:
        raise FormatError(path, "size", expected=f"at most {_MAX_BYTES >> 20} MiB", found="more")
    try:
        values = json.loads(raw.decode("utf-8"), object_pairs_hook=without_repeats, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(path, "damaged", expected="JSON", found=str(error)[:120]) from None
    if not isinstance(values, dict):
        raise FormatError(path, "content", expected="a JSON object", found=type(values).__name__)
    return values


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, for `object_pairs_hook`; ValueError where a name is there twice: readers would differ."""
    values = dict(pairs)
    if len(values) != len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{name[:80]!r} is there twice")
    return values


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")
