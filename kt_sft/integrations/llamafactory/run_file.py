"""The configuration of a run: a file and `key=value` words, put together by OmegaConf as LLaMA-Factory does it.

Both are read by our own readers first: OmegaConf waits for pipes, crashes on lists in lists, and knows no limits.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from kt_sft.errors import ConfigError, FormatError, as_ours, one_line
from kt_sft.formats.json_object import num_values, read_object, texts_of
from kt_sft.formats.yaml_files import MOST_BYTES, MOST_DEPTH, MOST_VALUES, parse_yaml, read_yaml

_WHAT = "run configuration"
_MOST_INTERPOLATED = 1 << 13  # characters


def read_run_file(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Keys and values of a YAML or JSON file.

    Args:
        overrides: `key=value` or `key.inner=value`, as `llamafactory-cli` takes them.
    Raises:
        FormatError: no such file, or no mapping in it; see `read_yaml`.
        ConfigError: lists every override that is none.
    """
    values = _read(path)
    words = list(overrides)
    if faults := [fault for word in words if (fault := _fault_of(word))]:
        raise ConfigError(faults)
    _check_interpolations(path, [values, words])

    def of_file(error: BaseException) -> FormatError:  # of a key or `${...}` that it does not take
        return FormatError(path, _WHAT, expected="what OmegaConf takes", found=one_line(error))

    def of_words(error: BaseException) -> ConfigError:
        return ConfigError(f"{' '.join(words)}: expected what OmegaConf takes, found {one_line(error)}")

    with as_ours(of_file):
        given = OmegaConf.create(values)
    with as_ours(of_words):
        merged = OmegaConf.merge(given, OmegaConf.from_dotlist(words))
    with as_ours(of_file):
        return OmegaConf.to_container(merged)


def _check_interpolations(path: str | Path, value: Any) -> None:
    """Raise where there is more `${...}` than OmegaConf parses in a moment: a thousand take 0.2 s.

    Raises:
        FormatError: how long all texts with one are.
    """
    length = sum(len(text) for text in texts_of(value) if "${" in text)
    if length > _MOST_INTERPOLATED:
        expected, found = f"texts with ${{...}} of {_MOST_INTERPOLATED} characters at most", length
        raise FormatError(path, _WHAT, expected=expected, found=found)


def _read(path: str | Path) -> dict[str, Any]:
    is_json = Path(path).suffix == ".json"
    values = read_object(path, _WHAT, most_bytes=MOST_BYTES) if is_json else read_yaml(path, _WHAT)
    values = {} if values is None else values
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        found = type(values).__name__ if not isinstance(values, dict) else "a key that is no text"
        raise FormatError(path, _WHAT, expected="a mapping of keys to values", found=found)
    if is_json and (count := num_values(values)) > MOST_VALUES:
        raise FormatError(path, _WHAT, expected=f"at most {MOST_VALUES} keys and values", found=count)
    return values


def _fault_of(override: str) -> str | None:
    """What is wrong with a word, before OmegaConf reads it."""
    key, sign, value = override.partition("=")
    names = key.split(".")
    if not sign or len(names) > MOST_DEPTH or not all(names):
        return f"{override}: expected key=value"
    try:
        parse_yaml(value)
    except ValueError as error:
        return f"{override}: expected a value in YAML, found {error}"
    return None
