"""A GGUF file as the only file of a model: a model directory is made of it once, the experts stay in the file.

The directory holds config.json, the tokenizer and the weights outside the experts in bf16. transformers and
LLaMA-Factory then see a model like any other, whose experts are read from the GGUF file (`weight_path`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from kt_sft.errors import FormatError, OutputError
from kt_sft.formats.gguf import SUFFIX, GgufIndex
from kt_sft.formats.gguf_config import model_config
from kt_sft.formats.gguf_expert_tensors import INPUT_SCALE, is_expert_tensor
from kt_sft.formats.gguf_names import PlainTensor, plain_tensors, scale_of
from kt_sft.formats.safetensors_index import SINGLE_NAME
from kt_sft.formats.safetensors_writer import PlannedTensor, write
from kt_sft.formats.source_hash import hash_source
from kt_sft.formats.staging import new_path
from kt_sft.integrations.gguf.tokenizer import read_tokenizer
from kt_sft.integrations.transformers.auto_class import errors_in_one_line
from kt_sft.integrations.transformers.model_files import GGUF_SOURCES
from kt_sft.models.expert_keys import KeyMap
from kt_sft.models.spec import find_experts
from kt_sft.sources.gguf import GgufExperts

logger = logging.getLogger(__name__)

_CACHE = Path(".cache") / "kt_sft" / "gguf"
# Of what is written into the directories: another number where it changes, or those that are there stay in use.
_VERSION = 3


def is_gguf_model(path: str | os.PathLike[str]) -> bool:
    """Whether a model path names a GGUF file rather than a model directory."""
    return str(path).endswith(SUFFIX) and not os.path.isdir(path)


def model_directory(file: str | os.PathLike[str], cache: str | os.PathLike[str] | None = None) -> Path:
    """The model directory of a GGUF file: made now, or found in the cache.

    Args:
        cache: folder of such directories; None: `~/.cache/kt_sft/gguf`.
    Raises:
        FormatError: the file is damaged or incomplete.
        UnsupportedModel: an architecture or a tokenizer that is not known.
    """
    with GgufIndex.from_path(file) as index:
        files = sorted({index.info(name).file for name in index})
        # The time alone can be kept by who writes the file, the digest alone sees no small edit of a large one.
        marks = [[str(part.resolve()), part.stat().st_mtime_ns, hash_source(part).digest] for part in files]
        identity = hashlib.sha256(json.dumps([_VERSION, marks]).encode()).hexdigest()[:16]
        folder = Path(cache).expanduser() if cache is not None else Path.home() / _CACHE
        target = folder / f"{Path(file).stem}-{identity}"
        if not target.is_dir():
            logger.info("writing config, tokenizer and weights outside the experts of %s to %s", file, target)
            write_model_directory(index, target)
    return target


def read_config(index: GgufIndex) -> PreTrainedConfig:
    """The model's config from the metadata.

    Raises:
        FormatError: a key is missing or of a wrong type.
        UnsupportedModel: an architecture that is not known, or a dense model.
    """
    values = model_config(index)
    with errors_in_one_line(index.source):
        return AutoConfig.for_model(values.pop("model_type"), **values)


def write_model_directory(index: GgufIndex, target: Path) -> None:
    """Write the directory aside and rename it when it is complete; one that another process has made is kept.

    Raises:
        FormatError: a weight of the model is missing or has another shape.
        UnsupportedModel: see `model_directory`.
    """
    config = model_config(index)
    tensors = list(plain_tensors(index, config))
    if inputs := [name for name in index if name.endswith(INPUT_SCALE) and not is_expert_tensor(name)]:
        text = "%s: %d tensors such as %s are for activations in fp4 and not used: these stay as the model has them"
        logger.warning(text, index.source, len(inputs), inputs[0])
    plan = [PlannedTensor(tensor.name, _dtype(tensor.name), tensor.shape) for tensor in tensors]
    try:
        with new_path(target, is_file=False, needed_bytes=sum(tensor.num_bytes for tensor in plan)) as staging:
            (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            sources = {"files": [str(file.resolve()) for file in index.files]}
            (staging / GGUF_SOURCES).write_text(json.dumps(sources) + "\n", encoding="utf-8")
            _check(staging, tensors, index)
            read_tokenizer(index).save_pretrained(staging)
            write(staging / SINGLE_NAME, plan, _pieces(index, tensors))
    except OutputError:
        if not (target / SINGLE_NAME).is_file():
            raise


def _dtype(name: str) -> str:
    """DeepSeek-V3's routing bias decides by small differences and is f32 in every checkpoint."""
    return "torch.float32" if name.endswith("e_score_correction_bias") else "torch.bfloat16"


def _pieces(index: GgufIndex, tensors: list[PlainTensor]) -> Iterator[Tensor]:
    for tensor in tensors:
        dtype = getattr(torch, _dtype(tensor.name).removeprefix("torch."))
        parts = [_read(index, name, dtype) for name in tensor.sources]
        yield (parts[0] if tensor.make is None else tensor.make(*parts)).reshape(tensor.shape)


def _read(index: GgufIndex, source: str, dtype: torch.dtype) -> Tensor:
    """Stored numbers times the scale beside them, rounded once."""
    scale = scale_of(index, source)
    return index.read(source, dtype) if scale == 1.0 else index.read(source).mul_(scale).to(dtype)


def _check(directory: Path, tensors: list[PlainTensor], index: GgufIndex) -> None:
    """Every weight of the model is there, once and of the right shape, before anything long is done."""
    with torch.device("meta"), errors_in_one_line(index.source):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    specs = find_experts(model)
    GgufExperts(index, specs)
    key_map = KeyMap(model, specs)
    shapes: dict[str, Any] = {}
    for tensor in tensors:
        shape = key_map.plain_shape(tensor.name)
        if shape is None or shape != tensor.shape:
            expected = "no such tensor" if shape is None else f"shape {list(shape)}"
            what = f"tensor {tensor.sources[0]} ({tensor.name})"
            raise FormatError(index.source, what, expected=expected, found=list(tensor.shape))
        shapes[key_map.target(tensor.name)[0]] = tensor.shape
    tied = set(getattr(model, "all_tied_weights_keys", None) or {}) if model.config.tie_word_embeddings else set()
    inside = tuple(f"{name}." for name in specs)
    missing = [k for k in model.state_dict() if k not in shapes and k not in tied and not k.startswith(inside)]
    if missing:
        found = f"{len(missing)} missing, first that of {missing[0]}"
        raise FormatError(index.source, "tensors", expected="every weight of the model", found=found)
