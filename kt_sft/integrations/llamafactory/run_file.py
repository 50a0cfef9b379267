"""The configuration of a run: a file and `key=value` words, read as LLaMA-Factory reads them (through OmegaConf).

OmegaConf itself comes with LLaMA-Factory only, and a run can be planned without both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from kt_sft.errors import ConfigError, FormatError


class _Loader(yaml.SafeLoader):
    """OmegaConf's YAML: `1e3` is a number, dates are text, a key twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [name for name in names if names.count(name) > 1 and name != "<<"]:
            raise yaml.constructor.ConstructorError(problem=f"{twice[0]} is there twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_config(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Keys and values of a YAML or JSON file.

    Args:
        overrides: `key=value` or `key.inner=value`, as `llamafactory-cli` takes them.
    Raises:
        FormatError: no such file, or no mapping in it.
        ConfigError: lists every override that is none.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = json.loads(text) if Path(path).suffix == ".json" else yaml.load(text, _Loader)
    except OSError as error:
        raise FormatError(
            path, "run configuration", expected="a file", found=error.strerror, remedy="check the path"
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise FormatError(path, "run configuration", expected="YAML or JSON", found=_in_one_line(error)) from None
    values = {} if values is None else values
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        found = type(values).__name__ if not isinstance(values, dict) else "a key that is no text"
        raise FormatError(path, "run configuration", expected="a mapping of keys to values", found=found)
    faults = []
    for override in overrides:
        key, sign, value = override.partition("=")
        try:
            _put(values, key.split("."), yaml.load(value, _Loader))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            faults.append(f"{override}: expected a value in YAML, found {_in_one_line(error)}")
        if not sign:
            faults.append(f"{override}: expected key=value")
    if faults:
        raise ConfigError(faults)
    return values


def _put(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = values.get(key)
        values[key] = inner if isinstance(inner, dict) else {}
        values = values[key]
    values[keys[-1]] = value


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())
