"""A model's files: its config.json, and the weights beside it with the quantisation that this one states."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import cached_file

from kt_sft.errors import FormatError
from kt_sft.formats.quantized_index import Quantization, QuantizedIndex, read_quantization
from kt_sft.formats.safetensors_index import SafetensorsIndex
from kt_sft.integrations.auto_class import HUB_ARGS, read_auto_config

# In a model directory that was made of GGUF files: which.
GGUF_SOURCES = "kt_sft_gguf.json"


def find_config_file(path: str | os.PathLike[str], hub_kwargs: dict[str, Any]) -> Path:
    """The model's config.json: local, from the hub's cache, or fetched.

    Args:
        hub_kwargs: cache_dir, revision, token, ... as `from_pretrained` gets them.
    Raises:
        FormatError: neither there nor to be had.
    """
    text = os.fspath(path)
    directory = Path(text)
    is_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) is not None and not text.startswith((".", "~"))
    if not directory.is_dir() and (directory.exists() or not is_hub_id):
        found = "a file" if directory.exists() else "nothing"
        raise FormatError(text, "model directory", expected="a directory", found=found, remedy="correct the path")
    if directory.is_dir():
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
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise FormatError(
            text,
            "model",
            expected="a model directory, or a hub id that is cached or can be reached",
            found=f"neither ({reason})",
            remedy="correct the path or download the model first",
        ) from error


def read_config_file(config_file: Path) -> dict[str, Any]:
    """Values of a config.json.

    Raises:
        FormatError: no JSON object.
    """
    try:
        values = json.loads(config_file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"a JSON {type(values).__name__}")
        return values
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(
            config_file, "config", expected="a JSON object", found=str(error), remedy="download it again"
        ) from None


def check_config_file(config_file: Path) -> Quantization | None:
    """How the weights beside a config.json are quantised; None: they are not.

    Raises:
        FormatError: no JSON object.
        UnsupportedModel: weights quantised in a way that is not read.
    """
    return read_quantization(read_config_file(config_file).get("quantization_config"), config_file)


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
    with suppress(OSError, ValueError, TypeError, AttributeError):
        files = [Path(name) for name in json.loads((folder / GGUF_SOURCES).read_text(encoding="utf-8"))["files"]]
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
