"""Rule files: YAML to `Rule` objects, with every fault of a file in one error. docs/rules.md has the syntax."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kt_sft.config import METHODS
from kt_sft.errors import ConfigError, nearest, unknown_names
from kt_sft.formats.patterns import Allowance, Pattern
from kt_sft.formats.yaml_files import read_yaml
from kt_sft.placement.classes import (
    EXPERTS,
    GPU_EXPERTS,
    KNOWN_TARGETS,
    LINEAR,
    OPERATORS,
    PACKED_LINEAR,
    refused_operator,
    target_of,
)

logger = logging.getLogger(__name__)

MOST_RULES = 500
# Characters of a value in which the variables are filled in: one that names another twice doubles.
MOST_VALUE = 4000
_MOST_HINTS = 40
DEVICE_TYPES = ("cpu", "cuda", "xpu", "npu")
LINEAR_FORMATS = ("bf16", "int8")
_DEVICES = ("generate_device", "prefill_device", "out_device")
_OPS = ("generate_op", "prefill_op")
_METHODS = ("backend", "method")
# Of ktransformers' files; here hidden states follow the modules by themselves.
_WITHOUT_EFFECT = ("transfer_map", "absorb_for_prefill")
_LAYERWISE = "per_layer_prefill_intput_threshold"  # spelt so in the files
_KWARGS = (*_DEVICES, *_OPS, *_METHODS, *_WITHOUT_EFFECT, _LAYERWISE)
_VARIABLE = re.compile(r"\$\{([^}]*)\}")


@dataclass(frozen=True)
class Layers:
    """Decoder layers: `first` to `last`, or the part `first` of `parts` equal ones, counted from 1."""

    first: int
    last: int
    parts: int | None = None

    def range(self, num_layers: int) -> range:
        """The numbers of these layers in a model of so many."""
        if self.parts is None:
            return range(self.first, self.last + 1)
        return range(num_layers * (self.first - 1) // self.parts, num_layers * self.first // self.parts)


@dataclass(frozen=True)
class Rule:
    """What to do with the modules that name, class and layer pick; a part that is None picks all.

    Args:
        target: `stock`, `linear`, `packed linear` or `experts` (`placement.classes`).
        device: where it goes; None: where the module around it is.
        out_device: of an experts module's result, if the file says so.
        method: format of experts (a value of `config.METHODS`) or of a packed linear layer; None: of the settings.
        recursive: rules are asked about the modules below, too.
        on_gpu: the keys by which experts ask for a GPU; they are computed on the CPU all the same.
    """

    number: int
    name: Pattern | None
    class_name: str | None
    layers: Layers | None
    target: str
    device: str | None = None
    out_device: str | None = None
    method: str | None = None
    recursive: bool = True
    on_gpu: str | None = None


@dataclass(frozen=True)
class RuleFile:
    """The rules of one file, in order, with its variables filled in."""

    path: str
    rules: tuple[Rule, ...]
    variables: Mapping[str, str] = field(default_factory=dict)

    def where(self, rule: Rule) -> str:
        """A rule in messages."""
        return f"{self.path}, rule {rule.number}"


def load_rules(path: str | Path, variables: Mapping[str, object] | None = None, *, local_rank: int = 0) -> RuleFile:
    """Read a rule file.

    Args:
        variables: replace those of the file.
        local_rank: of this process; `cuda` without a number is this GPU.
    Raises:
        FormatError: no such file, or no YAML; see `read_yaml`.
        ConfigError: lists every fault with its rule.
    """
    content = read_yaml(path, "kt_optimize_rule", kind="a rule file", is_ours=True)
    rules = parse_rules(content, str(path), variables, local_rank=local_rank)
    if local_rank == 0 and (asking := [rule for rule in rules.rules if rule.on_gpu]):
        numbers = ", ".join(str(rule.number) for rule in asking)
        _say_once(f"{path}, rule {numbers}: {asking[0].on_gpu}: no effect: routed experts are computed on the CPU")
    return rules


@functools.cache
def _say_once(message: str) -> None:
    logger.warning("%s", message)


def parse_rules(
    content: Any, path: str, variables: Mapping[str, object] | None = None, *, local_rank: int = 0
) -> RuleFile:
    """`load_rules` for what is in the file: a list of rules, or a mapping of `vars` and `rules`.

    Raises:
        ConfigError: lists every fault with its rule.
    """
    faults: list[str] = []
    if isinstance(content, list):
        content = {"rules": content}
    entries = content.get("rules") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path}: expected a list of rules, or a mapping with `rules`, found {_kind(content)}")
    if len(entries) > MOST_RULES:
        raise ConfigError(f"{path}: expected at most {MOST_RULES} rules, found {len(entries)}; join those that agree")
    unknown = (key for key in content if key not in ("vars", "rules"))
    faults += [f"{path}: {fault}" for fault in unknown_names(unknown, lambda key: nearest(key, ("vars", "rules")))]
    known = _variables(content.get("vars"), variables or {}, path, faults)
    rules, allowance = [], Allowance()
    for number, entry in enumerate(entries, 1):
        try:
            rules.append(_rule(number, _fill(entry, known), local_rank, allowance))
        except ConfigError as error:
            faults += [f"{path}, rule {number}: {fault}" for fault in error.faults]
        if len(faults) > _MOST_HINTS:
            break  # more than anybody reads, and each takes milliseconds
    if faults:
        raise ConfigError(faults)
    return RuleFile(path, tuple(rules), known)


def parse_variables(values: str | Mapping[str, object] | None) -> dict[str, str]:
    """Variables from a mapping, or from `name=value,name=value`.

    Raises:
        ConfigError: a part without `=`.
    """
    if not isinstance(values, str):
        return {str(name): str(value) for name, value in (values or {}).items()}
    parts = [part.strip() for part in values.split(",") if part.strip()]
    faults = [f"rule_vars: expected name=value, found {part!r}" for part in parts if "=" not in part]
    if faults:
        raise ConfigError(faults)
    return {name.strip(): value.strip() for name, _, value in (part.partition("=") for part in parts)}


def _variables(defaults: Any, given: Mapping[str, object], path: str, faults: list[str]) -> dict[str, str]:
    """Values of all variables, those that refer to others filled in."""
    if not isinstance(defaults, dict | None):
        faults.append(f"{path}: vars: expected a mapping of names to values, found {_kind(defaults)}")
        defaults = {}
    texts = {name: value for name, value in (defaults or {}).items() if isinstance(value, str | int | float)}
    raw = {str(name): str(value) for name, value in texts.items() if not isinstance(value, bool)}
    for name in (defaults or {}).keys() - {name for name in texts if str(name) in raw}:
        expected = "a text or a number, in quotes if it is a word such as `on`"
        faults.append(f"{path}: variable {name}: expected {expected}, found {_kind(defaults[name])}")
    for name in given.keys() - {str(name) for name in defaults or {}}:
        hint = nearest(name, raw) if raw else "the file has no variables"
        faults.append(f"{path}: variable {name}: unknown; {hint}")
    raw.update({name: str(value) for name, value in given.items() if name in raw})
    values: dict[str, str] = {}

    def value_of(name: str, within: tuple[str, ...]) -> str:
        """`within`: the variables whose values are being filled in, this one the last."""

        def other(found: re.Match[str]) -> str:
            known = found.group(1)
            if known in raw and known not in within:
                return value_of(known, (*within, known))
            if len(faults) > _MOST_HINTS:
                return "cpu"
            unknown = f"variable {name}: ${{{known}}} is unknown; {nearest(known, raw)}"
            faults.append(f"{path}: {f'variable {known}: refers to itself' if known in raw else unknown}")
            return "cpu"

        if name not in values:
            values[name] = _filled(raw[name], other, f"{path}: variable {name}")
        return values[name]

    try:
        return {name: value_of(name, (name,)) for name in raw}
    except RecursionError:
        raise ConfigError(f"{path}: vars: expected values that name others a few times, found hundreds") from None


def _filled(text: str, value_of: Callable[[re.Match[str]], str], what: str) -> str:
    """A text with the values of its variables.

    Raises:
        ConfigError: it becomes too long.
    """
    parts, at, length = [], 0, len(text)
    for found in _VARIABLE.finditer(text):
        parts += [text[at : found.start()], value_of(found)]
        at, length = found.end(), length + len(parts[-1])
        if length > MOST_VALUE:
            raise ConfigError(f"{what}: expected at most {MOST_VALUE} characters with its variables, found more")
    return "".join([*parts, text[at:]])


def _fill(value: Any, variables: Mapping[str, str]) -> Any:
    """A rule with the values of variables in its strings."""
    if isinstance(value, dict):
        return {key: _fill(inner, variables) for key, inner in value.items()}
    if isinstance(value, list):
        return [_fill(inner, variables) for inner in value]
    if not isinstance(value, str):
        return value
    for name in _VARIABLE.findall(value):
        if name not in variables:
            hint = nearest(name, variables) if variables else "the file has no `vars`"
            raise ConfigError(f"${{{name}}}: unknown variable; {hint}")
    return _filled(value, lambda found: variables[found.group(1)], repr(value[:80]))


def _rule(number: int, entry: Any, local_rank: int, allowance: Allowance) -> Rule:
    """One rule of a file.

    Raises:
        ConfigError: lists its faults.
    """
    faults: list[str] = []
    entry = _mapping(entry, "rule", ("match", "replace", "recursive"), faults)
    match = _mapping(entry.get("match"), "match", ("name", "class", "layers"), faults)
    replace = _mapping(entry.get("replace"), "replace", ("class", "kwargs"), faults)
    given = replace.get("kwargs")
    kwargs = _mapping({} if given is None else given, "kwargs", _KWARGS, faults)
    if isinstance(entry.get("match"), dict) and all(value is None for value in match.values()):
        faults.append("match: expected a name, a class or layers, found none of them")
    class_name = replace.get("class", "default")
    target = target_of(class_name) if isinstance(class_name, str) else None
    if target is None:
        faults.append(f"replace class {class_name!r}: unknown; {nearest(class_name, KNOWN_TARGETS)}")
    recursive = entry.get("recursive", True)
    if not isinstance(recursive, bool):
        faults.append(f"recursive: expected true or false, found {recursive!r}")
    if not isinstance(match.get("class", ""), str):
        faults.append(f"match class: expected a class name, found {match['class']!r}")
    name, layers = _pattern(match.get("name"), allowance, faults), _layers(match.get("layers"), faults)
    devices = {key: _device(key, kwargs.get(key), local_rank, faults) for key in _DEVICES}
    faults += _kwarg_faults(kwargs, devices, target)
    method = _method(kwargs, target, faults)
    if faults:
        raise ConfigError(faults)
    assert target is not None
    device, on_gpu = devices["generate_device"] or devices["prefill_device"], None
    if target == EXPERTS:
        device, on_gpu = device and "cpu", _gpu_keys(kwargs, devices)
    place = (device, devices["out_device"], method, recursive, on_gpu)
    return Rule(number, name, match.get("class"), layers, target, *place)


def _mapping(value: Any, what: str, known: tuple[str, ...], faults: list[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        faults.append(f"{what}: expected a mapping of {', '.join(known[:3])}, found {_kind(value)}")
        return {}
    unknown = unknown_names((key for key in value if key not in known), lambda key: nearest(key, known))
    faults += [f"{what}: {fault}" for fault in unknown]
    return {key: inner for key, inner in value.items() if key in known}


def _pattern(value: Any, allowance: Allowance, faults: list[str]) -> Pattern | None:
    if value is None:
        return None
    if not isinstance(value, str):
        faults.append(f"match name: expected a regular expression, found {_kind(value)}")
        return None
    try:
        return Pattern(value, "match name", allowance)
    except ConfigError as error:
        faults += error.faults
        return None


def _layers(value: Any, faults: list[str]) -> Layers | None:
    """`3`, `0-2`, or `2/4`: the second of four equal parts."""
    if value is None:
        return None
    found = re.fullmatch(r"([0-9]{1,6})(?:([-/])([0-9]{1,6}))?", str(value).replace(" ", ""))
    if found:
        first, sign, second = int(found[1]), found[2], int(found[3] or found[1])
        if sign != "/" and first <= second:
            return Layers(first, second)
        if sign == "/" and 1 <= first <= second:
            return Layers(first, first, second)
    faults.append(f"match layers: expected a number, a range such as 0-2, or a part such as 2/4, found {value!r}")
    return None


def _device(key: str, value: Any, local_rank: int, faults: list[str]) -> str | None:
    """A device as `cpu` or with its number; None if there is none."""
    if value is None:
        return None
    found = re.fullmatch(r"([a-z]+)(?::([0-9]{1,4}))?", str(value).strip().lower())
    if not found or found[1] not in DEVICE_TYPES or (found[1] == "cpu" and found[2] not in (None, "0")):
        hint = nearest(value, DEVICE_TYPES)
        faults.append(f"{key}: expected cpu, cuda, cuda:1, xpu or npu, found {value!r}; {hint}")
        return None
    return "cpu" if found[1] == "cpu" else f"{found[1]}:{found[2] or local_rank}"


def _kwarg_faults(kwargs: dict[str, Any], devices: dict[str, str | None], target: str | None) -> Iterator[str]:
    """Settings of a module that cannot be followed."""
    generate, prefill = devices["generate_device"], devices["prefill_device"]
    if target == PACKED_LINEAR:
        for key in ("generate_device", "prefill_device"):
            if devices[key] not in (None, "cpu"):
                yield f"{key}: expected cpu for {target}, which our kernels compute in all passes, found {devices[key]}"
    elif target != EXPERTS and generate and prefill and generate != prefill:
        yield f"prefill_device: expected generate_device's {generate}, since weights are held once, found {prefill}"
    if devices["out_device"] and target is not None and target != EXPERTS:
        yield "out_device: only experts have one; remove it"
    for key in _OPS:
        name = kwargs.get(key)
        if name is None:
            continue
        if why := refused_operator(str(name)):
            yield f"{key} {name}: {why}"
        wanted = LINEAR if target == PACKED_LINEAR else target
        known = [operator for operator, kind in OPERATORS.items() if kind == wanted]
        if why is None and name not in known:
            hint = nearest(name, known) if known else "remove it"
            yield f"{key} {name!r}: no operator for {target or 'this class'}; {hint}"
    if kwargs.get(_LAYERWISE):
        yield f"{_LAYERWISE}: prefill layer by layer is not done here; set 0, and chunk_size for long prompts"


def _gpu_keys(kwargs: dict[str, Any], devices: dict[str, str | None]) -> str | None:
    """The keys of experts that ask for a GPU, with their values."""
    keys = [key for key in ("generate_device", "prefill_device") if devices[key] not in (None, "cpu")]
    asking = [f"{key} {devices[key]}" for key in keys]
    asking += [f"{key} {kwargs[key]}" for key in _OPS if kwargs.get(key) in GPU_EXPERTS and not keys]
    return ", ".join(asking) or None


def _method(kwargs: dict[str, Any], target: str | None, faults: list[str]) -> str | None:
    given = {key: kwargs[key] for key in _METHODS if kwargs.get(key) is not None}
    formats = {METHODS.get(str(value).upper(), str(value).lower()) for value in given.values()}
    if len(formats) > 1:
        faults.append("backend, method: two names of the same setting with different values; remove one")
    for key, value in given.items():
        if target == EXPERTS and str(value).upper() in METHODS:
            return METHODS[str(value).upper()]
        if target == PACKED_LINEAR and str(value).lower() in LINEAR_FORMATS:
            return str(value).lower()
        if target in (EXPERTS, PACKED_LINEAR):
            known = tuple(METHODS) if target == EXPERTS else LINEAR_FORMATS
            faults.append(f"{key} {value!r}: unknown; {nearest(value, known)}")
        elif target is not None:
            faults.append(f"{key}: only experts and PackedLinear have a format; remove it")
    return None


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:60]!r}"
