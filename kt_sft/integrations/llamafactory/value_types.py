"""Types of the values in a configuration: a mapping reaches LLaMA-Factory's dataclasses as it is.

There every text is true, `"false"` as well, and a number in quotes fails when the model has been loaded. Words of the
command line are no concern: argparse reads them by the same types.
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kt_sft.errors import near
from kt_sft.integrations.llamafactory.args import KEYS

# LLaMA-Factory's own lists: it splits a text at its commas and takes a list as well.
_LISTS = frozenset(
    ("dataset", "eval_dataset", "interleave_probs", "adapter_name_or_path", "add_tokens", "add_special_tokens")
    + ("lora_target", "additional_target", "freeze_trainable_modules", "freeze_extra_modules", "oft_target")
    + ("galore_target", "apollo_target")
)
_LOOKED_AT = (*KEYS, "infer_backend")  # by `args.check`, which knows more values
_PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_NONE = type(None)


def read(values: Mapping[str, Any], kinds: Iterable[type]) -> tuple[dict[str, Any], list[str]]:
    """A configuration whose values have the types of their keys, and what is wrong with the others.

    Args:
        kinds: the dataclasses that it is parsed into; keys of none of them stay as they are, and so do ours.
    Returns:
        The values, whole numbers that YAML reads as `1000.0` (1e3) made whole; one sentence for each fault.
    """
    read_values, faults = dict(values), []
    known = _types(kinds)
    for key, value in values.items():
        kind = known.get(key, Any)
        if isinstance(value, float) and value.is_integer() and not _fits(key, value, kind):
            value = read_values[key] = int(value)
        if not _fits(key, value, kind):
            faults.append(f"{key}: expected {_expected(kind)}, found {_found(value, kind)}")
        elif key in _LISTS and not all(map(str.strip, _names(value))):
            faults.append(f"{key}: expected names, found an empty one in {value!r}; remove its comma, or the key")
    return read_values, faults


def _types(kinds: Iterable[type]) -> dict[str, Any]:
    found = {}
    for kind in kinds:
        hints = typing.get_type_hints(kind)
        found |= {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}
    return {key: kind for key, kind in found.items() if key not in _LOOKED_AT}


def _fits(key: str, value: Any, kind: Any) -> bool:
    options = _options(kind)
    if any(_is(value, option) for option in options):
        return True
    if key in _LISTS and isinstance(value, list):
        return all(isinstance(entry, str | float | int) and not isinstance(entry, bool) for entry in value)
    return False


def _names(value: Any) -> list[str]:
    return [] if value is None else list(map(str, value)) if isinstance(value, list) else str(value).split(",")


def _options(kind: Any) -> tuple[Any, ...]:
    options = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    # A choice that may also be given as text is one of the choices, and no other text.
    return tuple(option for option in options if option is not str) if any(map(_is_choice, options)) else options


def _is_choice(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, enum.Enum)


def _is(value: Any, kind: Any) -> bool:
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        return any(value == choice and type(value) is type(choice) for choice in typing.get_args(kind))
    if kind is bool:
        return isinstance(value, bool) or (type(value) is int and value in (0, 1))
    if kind is int:
        return type(value) is int
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind in (str, Path):
        return isinstance(value, str | Path)
    if kind is _NONE:
        return value is None
    if _is_choice(kind):
        return isinstance(value, kind) or value in [choice.value for choice in kind]
    if (origin or kind) in (dict, list):
        return isinstance(value, origin or kind)
    return True  # types of others, as transformers' GenerationConfig


def _expected(kind: Any) -> str:
    words = list(dict.fromkeys(word for option in _options(kind) for word in _words(option)))
    return " or ".join(words)


def _words(kind: Any) -> list[str]:
    if (choices := _choices(kind)) is not None:
        return [f"one of {', '.join(map(str, choices))}"]
    if kind is _NONE:
        return ["nothing"]
    name = {dict: "a mapping", list: "a list"}.get(typing.get_origin(kind) or kind)
    return [name or _PLAIN.get(kind, "text")]


def _choices(kind: Any) -> list[Any] | None:
    if typing.get_origin(kind) is typing.Literal:
        return list(typing.get_args(kind))
    return [choice.value for choice in kind] if _is_choice(kind) else None


def _found(value: Any, kind: Any) -> str:
    options = _options(kind)
    if value is None:
        return "nothing; remove the key, or give it a value"
    if isinstance(value, bool) and bool not in options:
        return f"{value}, as YAML reads yes, no, on and off; put the word in quotes"
    if isinstance(value, str) and set(options) & {bool, int, float}:
        return f"{value!r}; write the value without quotes" if _is_in_quotes(value) else repr(value)
    if isinstance(value, int | float) and str in options:
        return f"{value!r}; put it in quotes"
    close = near(value, [str(choice) for option in options for choice in _choices(option) or ()])
    return repr(value) if close is None else f"{value!r}; did you mean {close!r}?"


def _is_in_quotes(text: str) -> bool:
    """Whether YAML would read a text as a number or a boolean if it had no quotes."""
    try:
        float(text)
    except ValueError:
        return text.lower() in ("true", "false", "yes", "no", "on", "off")
    return True
