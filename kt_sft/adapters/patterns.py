"""Regular expressions in adapter_config.json: which key of a pattern a name has, and whether matching comes to an end.

PEFT runs `target_modules`, `exclude_modules` and the keys of `rank_pattern` through Python's `re`, which can take
exponential time (`(.*)*x`) and cannot be interrupted in a thread. So a process of its own matches them first, with the
same engine against the same names and a limit of CPU time: what ends there ends here.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kt_sft.errors import FormatError

_LITERAL = re.compile(r"(?:\w|\\?[.-])+", re.ASCII)
_OPTIONAL_WEIGHT = r"(\.weight)?"  # which `peft_config` writes
_MIN_SECONDS, _SECONDS_PER_MATCH = 0.3, 2e-6  # of CPU time; a match of such names takes 0.2 microseconds
_WALL_SECONDS = 60  # on a machine that has other work
_CHILD = """
import json, re, resource, signal, sys, warnings
warnings.simplefilter("ignore")
limit, expressions, names = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
signal.setitimer(signal.ITIMER_VIRTUAL, limit)
for number, (method, expression) in enumerate(expressions):
    print(number, flush=True)
    matches = getattr(re.compile(expression), method)
    for name in names:
        matches(name)
print("done")
"""


class Patterns(dict):
    """A rank_pattern or alpha_pattern: the key of a name is found in a time that hardly grows with the number of keys,
    as long as these are names."""

    @classmethod
    def of(cls, values: Mapping[str, Any] | None) -> Patterns:
        """The same, without work where it is one."""
        return values if isinstance(values, cls) else cls(values or {})

    def key_of(self, target: str) -> str | None:
        """The first key that matches a module's or parameter's name, or its last parts, as PEFT does it; or None."""
        by_length, others = self._places
        best = len(self)
        for tail in tails(target):
            for dots, places in by_length.get(len(tail), {}).items():
                best = min(best, places.get(_with_dots(tail, dots), best))
        for place, expression in others:
            if place > best:
                break
            if expression.match(target):
                best = place
        return self._keys[best] if best < len(self) else None

    @functools.cached_property
    def _keys(self) -> list[str]:
        return list(self)

    @functools.cached_property
    def _places(self) -> tuple[dict[int, dict[tuple[int, ...], dict[str, int]]], list[tuple[int, re.Pattern[str]]]]:
        """Places in PEFT's order: of names, by length and by where they have a dot that stands for any character; and
        of other expressions."""
        by_length: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        others = []
        for place, key in enumerate(self):
            if _LITERAL.fullmatch(key) is None:
                others.append((place, re.compile(whole_name(key))))
                continue
            parts = re.findall(r"\\?.", key)
            name = "".join(part[-1] for part in parts)
            dots = tuple(i for i, part in enumerate(parts) if part == ".")
            by_length.setdefault(len(name), {}).setdefault(dots, {}).setdefault(name, place)
        return by_length, others


def whole_name(pattern: str) -> str:
    """What PEFT makes of a key of a pattern."""
    return rf"(.*\.)?({pattern})$"


def tails(name: str) -> Iterator[str]:
    """`a.b.c`, `b.c`, `c`."""
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name


def _with_dots(name: str, dots: tuple[int, ...]) -> str:
    letters = list(name)
    for place in dots:
        letters[place] = "."
    return "".join(letters)


def check_speed(config: Mapping[str, Any], names: Iterable[str], path: Path) -> None:
    """Match every regular expression of a config, as PEFT does it, with all names of a model, in a limited time.

    Raises:
        FormatError: names the one that takes too long.
    """
    found = tuple(_expressions(config))
    if not found:
        return
    slow = _slow(tuple((method, expression) for _, method, expression in found), tuple(sorted(set(names))))
    if slow is not None:
        raise FormatError(
            path, found[slow][0], expected="a regular expression that is matched with the model's names in a moment",
            found="one that did not come to an end in a process of its own",
            remedy="name the modules in a list, or rewrite nested repetitions such as (a+)+",
        )  # fmt: skip


def _expressions(config: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Key, method of `re` and expression of all that are more than names."""
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config.get(key), str) and not is_literal(config[key]):
            yield key, "fullmatch", config[key]
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in config.get(key) or {}:
            if not is_literal(pattern):
                yield f"{key}, {pattern[:80]!r}", "match", whole_name(pattern)


def is_literal(pattern: str) -> bool:
    """Whether a pattern is a name, dots being any character where they are not escaped: linear in any engine."""
    return _LITERAL.fullmatch(pattern.removesuffix(_OPTIONAL_WEIGHT)) is not None


@functools.lru_cache(maxsize=8)  # the doors of one loading ask for the same
def _slow(expressions: tuple[tuple[str, str], ...], names: tuple[str, ...]) -> int | None:
    """The place of the first expression that does not come to an end; None if all do."""
    limit = _MIN_SECONDS + _SECONDS_PER_MATCH * len(expressions) * len(names)
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=json.dumps([limit, expressions, names]), capture_output=True, text=True, timeout=_WALL_SECONDS,
            check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return 0
    lines = child.stdout.split()
    return None if lines[-1:] == ["done"] else int(lines[-1]) if lines else 0
