"""The configuration of a run: a file and `key=value` words, read as LLaMA-Factory reads them (through OmegaConf).

OmegaConf itself comes with LLaMA-Factory only, and a run can be planned without both.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kt_sft.errors import ConfigError, FormatError
from kt_sft.formats.text_files import read_json
from kt_sft.formats.yaml_files import MOST_DEPTH, parse_yaml, read_yaml


def read_config(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Keys and values of a YAML or JSON file.

    Args:
        overrides: `key=value` or `key.inner=value`, as `llamafactory-cli` takes them.
    Raises:
        FormatError: no such file, or no mapping in it; see `read_yaml`.
        ConfigError: lists every override that is none.
    """
    is_json = Path(path).suffix == ".json"
    values = read_json(path, "run configuration") if is_json else read_yaml(path, "run configuration")
    values = {} if values is None else values
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        found = type(values).__name__ if not isinstance(values, dict) else "a key that is no text"
        raise FormatError(path, "run configuration", expected="a mapping of keys to values", found=found)
    faults = []
    for override in overrides:
        key, sign, value = override.partition("=")
        names = key.split(".")
        if not sign or len(names) > MOST_DEPTH or not all(names):
            faults.append(f"{override}: expected key=value")
            continue
        try:
            _put(values, names, parse_yaml(value))
        except ValueError as error:
            faults.append(f"{override}: expected a value in YAML, found {error}")
    if faults:
        raise ConfigError(faults)
    return values


def _put(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = values.get(key)
        values[key] = inner if isinstance(inner, dict) else {}
        values = values[key]
    values[keys[-1]] = value
