"""A model's files: its config.json, and the weights beside it with the quantisation that this one states."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from kt_sft.errors import FormatError
from kt_sft.formats.config_values import check_values
from kt_sft.formats.json_object import read_object
from kt_sft.formats.quantized_index import Quantization, QuantizedIndex, read_quantization
from kt_sft.formats.safetensors_index import SafetensorsIndex
from kt_sft.integrations.transformers.auto_class import HUB_ARGS, errors_in_one_line, read_auto_config

_LAYERS_IN_A_SECOND = 96
_NUMBER = re.compile(r"\.(\d{1,9})\.")
# In a model directory that was made of GGUF files: which.
GGUF_SOURCES = "kt_sft_gguf.json"
_MOST_BYTES = 4 << 20  # the largest that are known have some 600 KB (lists of modules that are not quantised)


def find_config_file(path: str | os.PathLike[str], hub_kwargs: dict[str, Any]) -> Path:
    """The model's config.json: local, from the hub's cache, or fetched.

    Args:
        hub_kwargs: cache_dir, revision, token, ... as `from_pretrained` gets them.
    Raises:
        FormatError: neither there nor to be had.
    """
    text = os.fspath(path)
    directory = Path(text)
    is_directory, is_there = os.path.isdir(text), os.path.exists(text)  # those of Path raise where a name is too long
    is_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) is not None and not text.startswith((".", "~"))
    if not is_directory and (is_there or not is_hub_id):
        found = "a file" if is_there else "nothing"
        raise FormatError(text, "model directory", expected="a directory", found=found, remedy="correct the path")
    if is_directory:
        local = directory / (hub_kwargs.get("subfolder") or "") / "config.json"
        if local.is_file():
            return local
        remedy = "point to the folder that save_pretrained wrote"
        raise FormatError(local, "model configuration", expected="present", found="missing", remedy=remedy)
    try:
        found_file = cached_file(text, "config.json", **hub_kwargs)
        if found_file is None:
            raise OSError("it has no config.json")
        return Path(found_file)
    except (OSError, ValueError, TypeError) as error:  # the last two of other arguments: names, revisions, folders
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FormatError(
            text,
            "model",
            expected="a model directory, or a hub id that is cached or can be reached",
            found=f"neither ({reason})",
            remedy="correct the path or download the model first",
        ) from error


def read_config_file(config_file: Path) -> dict[str, Any]:
    """Values of a config.json that a model can be built of.

    Raises:
        FormatError: no JSON object, values that no model has, or more layers than the weights beside it.
    """
    values = read_object(
        config_file, "config", most_bytes=_MOST_BYTES, may_be_infinite=True, remedy="download it again"
    )
    check_values(config_file, values)
    _check_size(config_file, values)
    return values


def check_config_file(config_file: Path) -> Quantization | None:
    """How the weights beside a config.json are quantised; None: they are not. Checks the settings of both files there.

    Raises:
        FormatError: see `read_config_file`; the same of generation_config.json.
        UnsupportedModel: weights quantised in a way that is not read, or settings that transformers does not take.
    """
    values = read_config_file(config_file)
    _check_generation_config(config_file.with_name(GENERATION_CONFIG_NAME), values)
    return read_quantization(values.get("quantization_config"), config_file)


def _check_size(config_file: Path, values: dict[str, Any]) -> None:
    """Raise where a config.json has more layers than the weights beside it: only building them would show that.

    Those that are built in a second are left to the comparison of every tensor, which follows anyway.

    Raises:
        FormatError: with the numbers of both.
    """
    parts = [values, *(part for part in values.values() if isinstance(part, dict))]
    asked = max((part.get("num_hidden_layers") or 0 for part in parts), default=0)
    if asked <= _LAYERS_IN_A_SECOND:
        return
    try:
        with SafetensorsIndex.from_directory(config_file.parent) as index:
            numbers = {int(found[1]) for name in index if (found := _NUMBER.search(name))}  # experts' come later
    except FormatError:
        return  # of a model on the hub, or without weights, whoever reads them says so
    if asked > (stored := max(numbers, default=-1) + 1):
        expected = f"at most {stored}, the layers of the weights beside it"
        raise FormatError(config_file, "num_hidden_layers", expected=expected, found=asked, remedy="download it again")


def _check_generation_config(file: Path, values: dict[str, Any]) -> None:
    """Raise where transformers would refuse a generation_config.json, which it reads after all weights.

    Args:
        values: of the config.json beside it.
    Raises:
        FormatError: names what is wrong.
    """
    if not file.exists():
        return
    settings = read_object(
        file, "generation config", most_bytes=_MOST_BYTES, may_be_infinite=True, remedy="correct it or remove it"
    )
    text = values.get("text_config")
    size = values.get("vocab_size") or (text.get("vocab_size") if isinstance(text, dict) else None)
    check_values(file, {**({} if size is None else {"vocab_size": size}), **settings})
    with errors_in_one_line(file, "generation config"):
        GenerationConfig.from_dict(settings)


def open_checkpoint(files: Iterable[str | Path] | str) -> QuantizedIndex:
    """A safetensors checkpoint, quantised as the config.json beside it says.

    Args:
        files: weight files of one directory, or a directory.
    Raises:
        FormatError: file missing or damaged, scales missing or of a wrong shape.
        UnsupportedModel: quantised in a way that is not read.
    """
    index = SafetensorsIndex.from_directory(files) if isinstance(files, str) else SafetensorsIndex.from_files(files)
    config_file = index.source / "config.json"
    return QuantizedIndex(index, check_config_file(config_file) if config_file.is_file() else None)


def gguf_sources(folder: Path | None) -> list[Path]:
    """The GGUF files that a model directory was made of; none for others, and for files that are gone."""
    with suppress(FormatError, KeyError, TypeError):
        files = [Path(name) for name in read_object(folder / GGUF_SOURCES, "GGUF sources")["files"]]
        return [file for file in files if file.is_file()]
    return []


def load_config(path: str | os.PathLike[str], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `from_pretrained` with a config from which the checkpoint's own quantization and code are gone.

    transformers refuses a `quantization_config` argument beside one of another kind in the model's config.

    Args:
        kwargs: arguments of `from_pretrained`; those that change the config are used up, as it does itself.
    """
    config = kwargs.get("config")
    if config is None:
        kept = {name: kwargs[name] for name in (*HUB_ARGS, "trust_remote_code", "code_revision") if name in kwargs}
        config, rest = read_auto_config(path, return_unused_kwargs=True, **kwargs)
        kwargs = {**rest, **kept, "config": config}
    drop_quantization(config)
    return kwargs


def drop_quantization(config: PreTrainedConfig) -> None:
    """Have transformers take a checkpoint for one in floating point; its weights are dequantised by us."""
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config


def untie(values: dict[str, Any]) -> None:
    """Say in the values of a config.json that head and embedding are two matrices, wherever transformers looks."""
    values["tie_word_embeddings"] = False
    for name in ("text_config", "thinker_config", "language_config", "llm_config"):
        if isinstance(values.get(name), dict):
            untie(values[name])
