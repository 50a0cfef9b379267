"""What adapter_config.json may say: every key with its type and range, checked once, before PEFT or anybody sees it.

PEFT checks no types (`use_rslora: "no"` is true there) and acts on keys that name code: `megatron_core` is imported.
Keys beyond plain LoRA, whether of this PEFT or of later ones, may stand there at their harmless defaults only.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kt_sft.adapters.patterns import Patterns, is_literal, whole_name
from kt_sft.errors import FormatError

_MOST_RANK = 1 << 16
MAX_SCALE = 1_000_000  # of lora_alpha; 1e30 makes every weight infinite
_MIN_SCALE = 1e-6
_MAX_LAYER = 100_000
_MAX_TOKEN = 1 << 31
# Each matrix of each expert may be named.
_MAX_ENTRIES = 1 << 17
_MAX_NAME = 1024  # characters
_MAX_REGEX = 1 << 16
_MAX_REGEXES = 1024  # among the keys of a pattern
_MAX_TEXT = 4096
_short = reprlib.Repr()
_short.maxlevel, _short.maxlist, _short.maxdict, _short.maxstring = 2, 3, 3, 60
_TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
_BEGINNINGS = re.compile(
    r"gaussian|eva|olora|pissa|pissa_niter_[0-9]{1,2}|orthogonal|corda|loftq|lora_ga|mica", re.IGNORECASE
)
# Libraries that PEFT names as home of a model's class, for its AutoPeftModel; nothing here looks there.
_HOMES = re.compile(r"(transformers|transformers_modules|kt_sft)(\.\w+)*", re.ASCII)


@dataclass(frozen=True)
class _Rule:
    """Which values a key may have.

    Args:
        expected: the same in words.
        limits: what else a message says of them.
        of_entries: whether it is about the values of an object.
        is_needed: whether the key must be there.
    """

    accepts: Callable[[Any], bool]
    expected: str
    limits: str = ""
    of_entries: bool = False
    is_needed: bool = False


def _is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: Any) -> bool:
    """Whether a value is a number of JSON; true is none, although it is 1 to Python."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_scale(value: Any) -> bool:
    return is_number(value) and _MIN_SCALE <= value <= MAX_SCALE


def is_dropout(value: Any) -> bool:
    """Whether a value is a share that is left out."""
    return is_number(value) and 0 <= value < 1


def _is_text(value: Any, limit: int = _MAX_NAME) -> bool:
    return isinstance(value, str) and 0 < len(value) <= limit and value.isprintable()


def _is_list(value: Any, accepts: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and len(value) <= _MAX_ENTRIES and all(map(accepts, value))


def _names(value: Any) -> bool:
    return value is None or _is_list(value, _is_text)


def _parts(value: Any) -> bool:
    """Names that PEFT puts into regular expressions of its own."""
    return value is None or _is_list(value, lambda entry: _is_text(entry) and is_literal(entry))


def _names_or_regex(value: Any) -> bool:
    return _names(value) or (_is_text(value, _MAX_REGEX) and _is_regex(value))


def _is_regex(text: str) -> bool:
    """Whether it can be compiled; matching is another matter (`patterns.check_speed`)."""
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError, MemoryError):
        return False
    return True


def _layers(value: Any) -> bool:
    def is_layer(entry: Any) -> bool:
        return _is_whole(entry, 0, _MAX_LAYER)

    return value is None or is_layer(value) or _is_list(value, is_layer)


def _rows(value: Any) -> bool:
    """Of one embedding, or of several by name."""

    def is_list(rows: Any) -> bool:
        return bool(rows) and _is_list(rows, lambda row: _is_whole(row, 0, _MAX_TOKEN))

    if isinstance(value, dict) and len(value) <= _MAX_ENTRIES:
        return all(_is_text(module) and is_list(rows) for module, rows in value.items())
    return value is None or value == [] or is_list(value)


def _home(value: Any) -> bool:
    """What PEFT writes where an adapter has no task_type; others add marks of theirs to it."""
    if value is None:
        return True
    if not isinstance(value, dict) or len(value) > 8:
        return False
    kind, home = value.get("base_model_class"), value.get("parent_library")
    others = [v for key, v in value.items() if key not in ("base_model_class", "parent_library")]
    is_class = kind is None or (_is_text(kind) and kind.isidentifier())
    is_known = home is None or (_is_text(home) and _HOMES.fullmatch(home) is not None)
    return is_class and is_known and all(other is None or isinstance(other, bool) for other in others)


def _optional_text(value: Any) -> bool:
    return value is None or value == "" or _is_text(value, _MAX_TEXT)


_SWITCH = _Rule(lambda value: isinstance(value, bool), "true or false")
_LIST = _Rule(_names, "a list of names")
_PARTS = _Rule(_parts, "a list of names")
_TARGETS = _Rule(_names_or_regex, "a list of names, or a regular expression")
_TEXT = _Rule(_optional_text, "text")
_SCALE = ("a positive number", f"the least is {_MIN_SCALE:g}, the most {MAX_SCALE}")
_RANK = ("a positive number", f"a whole one, {_MOST_RANK} at most")
_KEYS = {
    "peft_type": _Rule(lambda value: value == "LORA", "LORA", is_needed=True),
    "task_type": _Rule(lambda value: value is None or value in _TASKS, f"one of {', '.join(_TASKS)}"),
    "peft_version": _Rule(lambda value: value is None or (isinstance(value, str) and len(value) <= 80), "a version"),
    "auto_mapping": _Rule(_home, "a class of transformers"),
    "base_model_name_or_path": _TEXT,
    "revision": _TEXT,
    "inference_mode": _SWITCH,
    "r": _Rule(lambda value: _is_whole(value, 1, _MOST_RANK), *_RANK, is_needed=True),
    "lora_alpha": _Rule(_is_scale, *_SCALE, is_needed=True),
    "lora_dropout": _Rule(is_dropout, "a number from 0 to below 1"),
    "bias": _Rule(lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "use_rslora": _SWITCH,
    "use_dora": _SWITCH,
    "lora_bias": _SWITCH,
    "ensure_weight_tying": _SWITCH,
    "init_lora_weights": _Rule(
        lambda value: isinstance(value, bool) or (isinstance(value, str) and _BEGINNINGS.fullmatch(value) is not None),
        "true, false, gaussian or another way of PEFT's to begin",
    ),
    "target_modules": _TARGETS,
    "exclude_modules": _TARGETS,
    "target_parameters": _LIST,
    "modules_to_save": _PARTS,
    "layers_to_transform": _Rule(_layers, f"whole numbers from 0 to {_MAX_LAYER}"),
    "layers_pattern": _Rule(
        lambda value: value == "" or _parts([value] if isinstance(value, str) else value), "a name, or a list of names"
    ),
    "trainable_token_indices": _Rule(_rows, "row numbers, or lists of them by module"),
    "rank_pattern": _Rule(lambda value: _is_whole(value, 1, _MOST_RANK), *_RANK, of_entries=True),
    "alpha_pattern": _Rule(_is_scale, *_SCALE, of_entries=True),
}
# Keys that plain LoRA leaves alone, with their defaults in PEFT 0.18 to 0.21 where these are no empty value.
_DEFAULTS: Mapping[str, tuple[Any, ...]] = {
    "megatron_core": ("megatron.core",),
    "runtime_config": ({"ephemeral_gpu_offload": False},),
}
_WITHOUT_EFFECT = {"qalora_group_size": _Rule(lambda value: _is_whole(value, 0, _MOST_RANK), "a whole number")}


@dataclass(frozen=True)
class Fault:
    """One value that cannot be."""

    key: str
    expected: str
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.key}: expected {self.expected}, found {self.found}{'; ' if self.remedy else ''}{self.remedy}"


def checked(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The keys of an adapter_config.json that mean something, with objects for patterns.

    Raises:
        FormatError: the first value that is of another type or out of range, or a key that nobody needs.
    """
    if isinstance(values.get("peft_type"), str) and values["peft_type"] != "LORA":
        raise FormatError(path, "peft_type", expected="LORA", found=values["peft_type"][:80])
    fault = next(find_faults(values), None)
    if fault is not None:
        raise FormatError(path, fault.key, expected=fault.expected, found=fault.found, remedy=fault.remedy)
    kept = {key: value for key, value in values.items() if key in _KEYS and key != "auto_mapping"}
    if not kept.get("trainable_token_indices"):
        kept.pop("trainable_token_indices", None)  # PEFT would train no rows, and ask for a tensor of them
    return kept | {key: Patterns(values.get(key) or {}) for key in ("rank_pattern", "alpha_pattern")}


def find_faults(values: Mapping[str, Any], *, is_file: bool = True) -> Iterator[Fault]:
    """What is wrong with a config.

    Args:
        is_file: False: a user's own LoraConfig, whose further keys `options` knows.
    """
    for key, rule in _KEYS.items():
        if key in values:
            yield from _faults_of(key, values[key], rule)
        elif rule.is_needed:
            yield Fault(key, rule.expected, "nothing", rule.limits)
    for key in values if is_file else ():  # beyond plain LoRA
        if key in _KEYS:
            continue
        if key in _WITHOUT_EFFECT:
            yield from _faults_of(key, values[key], _WITHOUT_EFFECT[key])
        elif not _is_harmless(values.get(key), _DEFAULTS.get(key, ())):
            expected = "plain LoRA, which has no such key"
            yield Fault(_shown(key), expected, _shown(values[key]), "remove it if the adapter is whole without it")


def _faults_of(key: str, value: Any, rule: _Rule) -> Iterator[Fault]:
    if not rule.of_entries:
        if not rule.accepts(value):
            yield Fault(key, rule.expected, _shown(value), rule.limits)
        return
    if value is None:
        return
    if not isinstance(value, dict) or len(value) > _MAX_ENTRIES:
        yield Fault(key, "an object", type(value).__name__ if not isinstance(value, dict) else f"{len(value)} entries")
        return
    regexes = [pattern for pattern in value if not is_literal(pattern)]
    if len(regexes) > _MAX_REGEXES:
        yield Fault(key, f"names, and at most {_MAX_REGEXES} regular expressions", str(len(regexes)))
        return
    for pattern, entry in value.items():
        if not _is_text(pattern) or (not is_literal(pattern) and not _is_regex(whole_name(pattern))):
            yield Fault(f"{key}, key {_shown(pattern)}", "a regular expression", "none")
        if not rule.accepts(entry):
            yield Fault(f"{key}, {_shown(pattern)}", rule.expected, _shown(entry), rule.limits)


def _is_harmless(value: Any, defaults: tuple[Any, ...]) -> bool:
    return value is None or value is False or value in ("", [], {}) or value in defaults


def _shown(value: Any) -> str:
    """A value as far as it fits into a message."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a number of more than 20 digits"
    return "infinity" if isinstance(value, float) and math.isinf(value) else _short.repr(value)
