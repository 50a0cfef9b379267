"""A model's settings as transformers reads them: where config.json is, what it takes of it, generation_config.json."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from kt_sft.errors import FormatError, first_line
from kt_sft.formats.checkpoint import MOST_CONFIG_BYTES
from kt_sft.formats.config_values import check_values
from kt_sft.formats.json_object import read_object
from kt_sft.models.auto_class import (
    HUB_ARGS,
    auto_class,
    config_file,
    errors_in_one_line,
    read_auto_config,
)


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
        raise FormatError(
            text,
            "model",
            expected="a model directory, or a hub id that is cached or can be reached",
            found=f"neither ({first_line(error)})",
            remedy="correct the path or download the model first",
        ) from error


def check_generation_config(config: Path, values: Mapping[str, Any]) -> None:
    """Raise where transformers would refuse the generation_config.json beside a config; it reads it after all weights.

    Args:
        values: of the config.json.
    Raises:
        FormatError, UnsupportedModel: names what is wrong.
    """
    file = config.with_name(GENERATION_CONFIG_NAME)
    if not file.exists():
        return
    remedy = "correct it or remove it"
    settings = read_object(file, "generation config", most_bytes=MOST_CONFIG_BYTES, may_be_infinite=True, remedy=remedy)
    text = values.get("text_config")
    size = values.get("vocab_size") or (text.get("vocab_size") if isinstance(text, dict) else None)
    check_values(file, {**({} if size is None else {"vocab_size": size}), **settings})
    with errors_in_one_line(file, "generation config"):
        GenerationConfig.from_dict(settings)


def load_config(path: str | os.PathLike[str], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `from_pretrained` with a config from which the checkpoint's own quantization and code are gone.

    transformers refuses a `quantization_config` argument beside one of another kind in the model's config.

    Args:
        kwargs: arguments of `from_pretrained`; those that change the config are used up, as it does itself.
    """
    kept = {name: kwargs[name] for name in (*HUB_ARGS, "trust_remote_code", "code_revision") if name in kwargs}
    config, rest = read_auto_config(path, return_unused_kwargs=True, **kwargs)
    drop_quantization(config)
    return {**rest, **kept, "config": config}


def drop_quantization(config: PretrainedConfig) -> None:
    """Have transformers take a checkpoint for one in floating point; its weights are dequantised by us."""
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config


def meta_model(config: PretrainedConfig, trust_remote_code: bool | None = None) -> PreTrainedModel:
    """The model of a config without weights; takes the config's own quantization off.

    Raises:
        FormatError: a value that no model has.
        UnsupportedModel: a config that no model can be built of, or whose own code does not run.
    """
    drop_quantization(config)
    path = config.name_or_path or "model"
    check_values(config_file(path), config.to_dict(), has_defaults=True)
    with torch.device("meta"), errors_in_one_line(path, trust_remote_code=trust_remote_code):
        return auto_class(config).from_config(config, trust_remote_code=trust_remote_code)


def untie(values: dict[str, Any]) -> None:
    """Say in the values of a config.json that head and embedding are two matrices, wherever transformers looks."""
    values["tie_word_embeddings"] = False
    for name in ("text_config", "thinker_config", "language_config", "llm_config"):
        if isinstance(values.get(name), dict):
            untie(values[name])
