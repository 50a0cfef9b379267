"""YAML of run files, rule files and `key=value` words, read as OmegaConf (and so LLaMA-Factory) reads it.

`1e3` is a number and dates are text. What a reader would misunderstand silently is refused: a key twice, tags, in files
of ours numbers in base 60 or 8. So is what is small in the file and large in memory. The limits are checked on the
stream of events: libyaml's own tree, which OmegaConf uses, ends the process where lists lie in one another deeply.
"""

from __future__ import annotations

import os
import re
from typing import Any

import yaml

from kt_sft.errors import FormatError
from kt_sft.formats.text_files import read_text

MOST_BYTES = 1 << 18
# As many as OmegaConf takes by default.
MOST_VALUES = 10_000
MOST_DEPTH = 32
_BASE: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = {None, "!", *(_TAG + name for name in ("str", "int", "float", "bool", "null", "map", "seq"))}
_MISREAD = re.compile(
    r"[-+]?(?P<base60>[1-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?)|[-+]?(?P<base8>0[0-7_]*[1-7][0-7_]*)"
)
_LONG_NUMBER = re.compile(r"[-+]?[0-9][0-9a-fA-FxX_.:+-]{100,}")


class _Loader(_BASE):
    """The values of a document that `_check` has let through."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise _fault(f"{key.value[:80]} is there twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    f"{_TAG}float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: str | os.PathLike[str], what: str, *, kind: str = "a file", is_ours: bool = False) -> Any:
    """The one document of a file; None of an empty one.

    Args:
        what: names it in messages.
        kind: what is expected there.
        is_ours: nobody else reads it: numbers that YAML takes to be in base 60 or 8 are refused.
    Raises:
        FormatError: no such file, no YAML, or more than a configuration holds.
    """
    text = read_text(path, what, MOST_BYTES, kind=kind, remedy="correct the path or the file")
    try:
        return parse_yaml(text, is_ours=is_ours)
    except ValueError as error:
        raise FormatError(path, what, expected="YAML", found=error, remedy="correct the file") from None


def parse_yaml(text: str, *, is_ours: bool = False) -> Any:
    """The value of a text; see `read_yaml`.

    Raises:
        ValueError: what is wrong and where, in one line.
    """
    try:
        _check(text, is_ours)
        return yaml.load(text, _Loader)
    except Exception as error:  # PyYAML's constructors raise what Python does: ValueError, KeyError, AttributeError
        raise ValueError(_in_one_line(error)) from None


def _check(text: str, is_ours: bool) -> None:
    """Raise where a document holds more than a configuration does, or what is easily misread.

    Raises:
        yaml.YAMLError: what and where.
    """
    open_: list[tuple[str | None, int]] = []  # anchor and number of values before it, of each level
    sizes: dict[str, int] = {}  # of anchors, with everything that they refer to
    count = documents = 0
    for event in yaml.parse(text, _BASE):
        mark = event.start_mark
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise _fault("a second document", mark)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise _fault(f"*{event.anchor}, which refers to itself or to nothing", mark)
            count += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            _check_scalar(event, is_ours)
            count += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            _check_tag(event)
            open_.append((event.anchor, count))
            count += 1
            if len(open_) > MOST_DEPTH:
                raise _fault(f"more than {MOST_DEPTH} levels", mark)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_.pop()
            if anchor is not None:
                sizes[anchor] = count - before
        if count > MOST_VALUES:
            raise _fault(f"more than {MOST_VALUES} keys and values", mark)


def _check_scalar(event: yaml.ScalarEvent, is_ours: bool) -> None:
    _check_tag(event)
    if "\0" in event.value:
        raise _fault("a NUL in a text", event.start_mark)
    if not event.style and _LONG_NUMBER.fullmatch(event.value):  # Python writes none of thousands of digits
        raise _fault(f"a number of {len(event.value)} digits", event.start_mark)
    misread = _MISREAD.fullmatch(event.value) if is_ours and not (event.style or event.tag) else None
    if misread:
        base = "60" if misread["base60"] else "8"
        raise _fault(f"{event.value[:80]}, a number in base {base} if it is not in quotes", event.start_mark)


def _check_tag(event: Any) -> None:
    if event.tag not in _PLAIN_TAGS:
        raise _fault(f"the tag {event.tag[:80]}", event.start_mark)


def _fault(found: str, mark: Any) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(problem=found, problem_mark=mark)


def _in_one_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    if isinstance(error, RecursionError):
        return "levels without end"
    if mark is None:
        return " ".join(str(error).split())[:400]
    text = " ".join(filter(None, (getattr(error, "context", None), getattr(error, "problem", None))))
    return f"{text} in line {mark.line + 1}, column {mark.column + 1}"
