"""KTransformers' keys for LLaMA-Factory, those of its main branch: read as ours where we have the thing.

There they stand in a mapping `kt_config`, or, in earlier releases, beside the other keys. What is here without effect
is said, with the reason; a setting that is given twice must have the same value.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from kt_sft.config import METHODS
from kt_sft.errors import ConfigError
from kt_sft.formats.yaml_files import parse_yaml
from kt_sft.integrations.llamafactory.args import KEYS, kt_config, nearest_key

NESTED = "kt_config"
# Their key -> ours, or LLaMA-Factory's own.
SAME_AS = {
    "kt_backend": "kt_method",
    "kt_expert_weight_format": "kt_method",
    "kt_num_threads": "cpu_infer",
    "kt_chunked_prefill_size": "chunk_size",
    "kt_lora_rank": "lora_rank",
    "kt_lora_alpha": "lora_alpha",
    "kt_lora_dropout": "lora_dropout",
    "kt_train_mode": "finetuning_type",
    "lora_rank": "lora_rank",
    "lora_alpha": "lora_alpha",
    "kt_use_lora_experts": "kt_use_lora_experts",
    **{key: key for key in KEYS},
}
_BUFFERS = "kt_cpu_activation says what is kept for backward"
WITHOUT_EFFECT = {
    "kt_tp_enabled": "groups of threads share every expert anyway",
    "kt_max_cache_depth": _BUFFERS,
    "kt_share_backward_bb": _BUFFERS,
    "kt_share_cache_pool": _BUFFERS,
    "kt_activation_policy": _BUFFERS,
    "kt_model_max_length": "cutoff_len bounds the length",
    "model_max_length": "cutoff_len bounds the length",
    "kt_num_gpu_experts": "all routed experts are computed on the CPU",
    "kt_weight_lifecycle": "experts stay in memory, or in the mapped files of a container",
    "kt_non_expert_weight_path": "all but the experts is read from model_name_or_path",
    "kt_force_fused_expert_lora": "kt_expert_lora says whether experts have LoRA",
    "kt_lora_expert_num": "there are no extra LoRA experts",
    "kt_lora_expert_intermediate_size": "there are no extra LoRA experts",
    "kt_full_weight_grad": "experts are trained by LoRA",
    "kt_skip_expert_loading": "experts are never loaded by transformers",
    "bypass_device_map_check": "kt_optimize_rule places modules",
    "skip_device_placement": "kt_optimize_rule places modules",
    "enabled": "use_kt switches",
}
_SILENT = ("enabled", "kt_skip_expert_loading", "kt_full_weight_grad")  # if they say what is so anyway
_ONLY_NESTED = ("enabled", "lora_rank", "lora_alpha", "model_max_length", "kt_use_lora_experts", *KEYS)
_AUTO = "auto"
_CHECKED = ("kt_backend", "kt_num_threads", "kt_chunked_prefill_size")  # settings here, under another name


def translate(values: dict[str, Any] | list[str]) -> tuple[dict[str, Any] | list[str], list[str]]:
    """A configuration with their keys replaced, and one line for each that has no effect.

    Args:
        values: keys and values, or command line words; stays as it is.
    Raises:
        ConfigError: lists unknown keys of `kt_config`, and settings that are given twice with different values.
    """
    if isinstance(values, dict):
        own, theirs = _split(values)
        if not theirs:
            return values, []
        found, notes = _read(theirs, own)
        return {**own, **found}, notes
    own_words, theirs = _split_words(values)
    if not theirs:
        return values, []
    given = {word[2:].partition("=")[0].replace("-", "_"): _value(word, own_words[at + 1 : at + 2])
             for at, word in enumerate(own_words) if word.startswith("--")}  # fmt: skip
    found, notes = _read(theirs, given)
    more = [word for key, value in found.items() if key not in given for word in (f"--{key}", str(value))]
    return [*own_words, *more], notes


def _split(values: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    """Their keys apart from all others: (name as the user wrote it, value)."""
    own, theirs = {}, []
    for key, value in values.items():
        is_flat = key in (*SAME_AS, *WITHOUT_EFFECT) and key not in _ONLY_NESTED
        if is_flat or key == NESTED or key.startswith(f"{NESTED}."):
            theirs.append((key, value))
        else:
            own[key] = value
    return own, theirs


def _split_words(words: list[str]) -> tuple[list[str], list[tuple[str, Any]]]:
    own, theirs = [], []
    at = 0
    while at < len(words):
        word, name = words[at], words[at].removeprefix("--").partition("=")[0].replace("-", "_")
        is_theirs = word.startswith("--") and bool(_split({name: None})[1])
        if not is_theirs:
            own.append(word)
        else:
            following = words[at + 1 : at + 2]
            theirs.append((name, _value(word, following)))
            at += "=" not in word and bool(following) and not following[0].startswith("--")
        at += 1
    return own, theirs


def _value(word: str, following: list[str]) -> Any:
    """Of an option: the text behind `=`, the next word, or True of a flag alone; as YAML reads it."""
    _, sign, text = word.partition("=")
    if not sign:
        if not following or following[0].startswith("--"):
            return True
        text = following[0]
    try:
        return parse_yaml(text)
    except ValueError:
        return text


def _read(theirs: list[tuple[str, Any]], own: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Our keys for theirs, and the notes.

    Raises:
        ConfigError: see `translate`.
    """
    found: dict[str, tuple[str, Any]] = {}  # our key -> (name as the user wrote it, value)
    faults: list[str] = []
    notes: list[str] = []
    for name, key, value in _flat(theirs, faults):
        if key in SAME_AS:
            faults += _faults(name, key, value)
            _take(name, key, value, found, faults, notes)
        elif key in WITHOUT_EFFECT:
            if not (key in _SILENT and value is (key != "kt_full_weight_grad")):
                notes.append(f"{name}: no effect: {WITHOUT_EFFECT[key]}")
        else:
            faults.append(f"{name}: unknown key; {nearest_key(key, [*SAME_AS, *WITHOUT_EFFECT])}")
    for key, (name, value) in found.items():
        if own.get(key) is not None and not _agree(key, own[key], value):
            faults.append(f"{name}: {value!r} means {key}, which is {own[key]!r}; remove one of them")
    if faults:
        raise ConfigError(faults)
    return {key: value for key, (_, value) in found.items() if own.get(key) is None}, notes


def _flat(theirs: list[tuple[str, Any]], faults: list[str]) -> Iterator[tuple[str, str, Any]]:
    """(name as the user wrote it, key, value) of each key, also of those in the mapping."""
    for name, value in theirs:
        if name != NESTED:
            yield name, name.removeprefix(f"{NESTED}."), value
            continue
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                value = _value(f"={value}", [])
        if isinstance(value, dict):
            yield from ((f"{NESTED}.{key}", str(key), inner) for key, inner in value.items())
        elif value is not None:
            faults.append(f"{NESTED}: expected a mapping of keys to values, found {value!r}")


def _faults(name: str, key: str, value: Any) -> list[str]:
    """What `KTConfig` would say under our name of a key."""
    ours = SAME_AS[key]
    if key not in _CHECKED or value is None or (ours == "kt_method" and str(value).lower() == _AUTO):
        return []
    try:
        kt_config(SimpleNamespace(**{ours: value}))
    except ConfigError as error:
        return [f"{name}:{fault.partition(':')[2]}" for fault in error.faults]
    return []


def _take(
    name: str, key: str, value: Any, found: dict[str, tuple[str, Any]], faults: list[str], notes: list[str]
) -> None:
    """One of their keys that is a setting here."""
    ours = SAME_AS[key]
    if value is None or (ours == "kt_method" and str(value).lower() == _AUTO):
        return
    if key == "kt_expert_weight_format" and str(value).upper() not in METHODS:
        notes.append(
            f"{name}: no effect: checkpoints in {value} are read, but experts are held in a format of kt_method; "
            "INT8 needs as much memory as FP8"
        )
        return
    if ours in found and not _agree(ours, found[ours][1], value):
        other, before = found[ours]
        faults.append(f"{name}: {value!r} and {other}: {before!r} are two values of {ours}; remove one of them")
        return
    found[ours] = (name, str(value).upper() if ours == "kt_method" else value)


def _agree(key: str, one: Any, other: Any) -> bool:
    if key == "kt_method":
        one, other = (METHODS.get(str(value).upper(), value) for value in (one, other))
    return one == other or str(one) == str(other)
